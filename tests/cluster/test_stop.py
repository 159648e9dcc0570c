"""Stopping and hanging, through the real commands."""

from __future__ import annotations

import json
import re
import signal
import sqlite3
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from tests.benchmarks.kill_points import Moment, plan
from tests.cluster.launching import (
    REPOSITORY,
    command,
    environment,
    make_inputs,
    torchrun,
    without_raylets,
)

# Runs that last until they are stopped.
ENDLESS = (
    "train.steps=1000000",
    "train.logging_steps=20",
    "eval.num_lines=2",
    "eval.max_new_tokens=1",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("stop"))


@contextmanager
def started(
    command: list[str], environment: dict[str, str], until: str = "step "
) -> Iterator[subprocess.Popen[str]]:
    """A process that trains: it has said a line that starts so."""
    with subprocess.Popen(
        command,
        cwd=environment["HOME"],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        limit = threading.Timer(400, process.kill)
        limit.start()
        assert process.stdout is not None
        if until:
            next((line for line in process.stdout if line.startswith(until)), None)
        yield process
        limit.cancel()


def stopped_line(stderr: str, reason: str, run_folder: Path) -> int:
    """The one line that says it; returns the step, whose checkpoint is there."""
    lines = [line for line in stderr.splitlines() if line.startswith("lwo-dist: ")]
    said = (
        rf"lwo-dist: stopped by {reason} at step (\d+); checkpoint (\S+); the same command goes on"
        r" from there"
    )
    found = re.fullmatch(said, lines[0]) if len(lines) == 1 else None
    assert found, stderr
    checkpoint = Path(found[2])
    assert checkpoint.parent == run_folder / "checkpoints"
    assert json.loads((checkpoint / "state.json").read_text())["step"] == int(found[1])
    return int(found[1])


def test_a_signal_to_one_rank_of_torchrun_stops_all(folder: Path) -> None:
    with started(torchrun(folder, "signalled", *ENDLESS), environment(folder)) as launcher:
        ranks = {
            child.environ()["RANK"]: child for child in psutil.Process(launcher.pid).children()
        }
        ranks["1"].send_signal(signal.SIGUSR1)
        _, stderr = launcher.communicate()
    assert stopped_line(stderr, "SIGUSR1", folder / "runs" / "signalled") >= 20
    assert re.findall(r"exitcode +: (\S+)", stderr)[0] == "75"
    assert "Error" not in stderr.replace("ChildFailedError", "").replace("error_file", "")


@pytest.mark.parametrize(
    ("number", "reason"),
    [(15, "SIGTERM"), (2, "Ctrl-C"), (9, "the death of its launcher")],
)
def test_a_signal_to_torchrun_itself_stops_all(number: int, reason: str, folder: Path) -> None:
    with started(torchrun(folder, f"signal-{number}", *ENDLESS), environment(folder)) as launcher:
        launcher.send_signal(number)
        _, stderr = launcher.communicate()  # to the end of its ranks, which write there too
    assert stopped_line(stderr, reason, folder / "runs" / f"signal-{number}") >= 20


def test_a_stopped_rank_ends_the_run_and_is_named(folder: Path) -> None:
    # Rank 1 stops in the middle of step 5, as if its machine had frozen.
    killing = folder / "frozen"
    plan(killing, [Moment("worker", "step", 4, rank=1, signal="SIGSTOP")])
    script = REPOSITORY / "tests" / "benchmarks" / "kill_points.py"
    frozen = torchrun(folder, "frozen", *ENDLESS, "cluster.timeout_s=5", script=script)
    with started(frozen, environment(folder, KILL_FOLDER=str(killing)), until="") as launcher:
        assert launcher.stderr is not None
        said = next(line for line in launcher.stderr if "CollectiveError: rank 0 on " in line)
        # torchrun would give the stopped one 30 s, then kill it.
        psutil.Process(int((killing / "pid_1").read_text())).resume()
        _, rest = launcher.communicate()
    assert re.search(
        r"rank 0 on \S+, step 5, layer \w+: a collective failed; no answer from rank 1 ", said
    )
    # Rank 1 wakes to a closed connection, or to torchrun's SIGTERM, whichever comes first.
    assert launcher.returncode == 1 and set(re.findall(r"exitcode +: (\S+)", rest)) <= {"1", "-15"}
    assert not [path for path in killing.glob("pid_*") if psutil.pid_exists(int(path.read_text()))]


@pytest.mark.parametrize(
    ("number", "reason", "code"), [(signal.SIGTERM, "SIGTERM", 75), (signal.SIGINT, "Ctrl-C", 130)]
)
def test_a_signal_to_the_driver_of_ray_saves(
    number: signal.Signals, reason: str, code: int, folder: Path
) -> None:
    name = f"ray-{number}"
    with started(command(folder, name, *ENDLESS), environment(folder)) as driver:
        driver.send_signal(number)
        out, stderr = driver.communicate()
    assert driver.returncode == code, stderr
    step = stopped_line(stderr, reason, folder / "runs" / name)
    assert step >= 20
    assert out.count("Ctrl-C again stops at once") == (number == signal.SIGINT)


@pytest.mark.long  # three minutes: Ray takes its time to end workers that do not move
def test_a_second_ctrl_c_ends_a_run_that_cannot_save(folder: Path) -> None:
    with started(command(folder, "twice", *ENDLESS), environment(folder)) as driver:
        workers = [
            child
            for child in psutil.Process(driver.pid).children(recursive=True)
            if "RayTrainWorker" in "".join(child.cmdline()[:1])
        ]
        assert len(workers) == 2
        try:
            for worker in workers:
                worker.suspend()
            driver.send_signal(signal.SIGINT)
            assert driver.stdout is not None
            assert any("Ctrl-C again stops at once" in line for line in driver.stdout)
            driver.send_signal(signal.SIGINT)
            driver.wait()
        finally:
            for worker in workers:
                with suppress(psutil.NoSuchProcess):
                    worker.kill()
        _, stderr = driver.communicate()
    assert driver.returncode == 130, stderr
    assert "stopped by Ctrl-C at step 0; no step was done, so nothing was saved" in stderr


@pytest.mark.parametrize("launcher", ["ray", "torchrun"])
def test_a_signal_while_a_run_starts_ends_it_at_once(launcher: str, folder: Path) -> None:
    name = f"starting-{launcher}"
    make, until = {"ray": (command, "starting Ray"), "torchrun": (torchrun, "loading model")}[
        launcher
    ]
    tracked = make(folder, name, *ENDLESS, "tracking.enabled=true")
    with started(tracked, environment(folder), until=until) as process:
        process.send_signal(signal.SIGTERM)
        out, stderr = process.communicate()
    said = "lwo-dist: stopped by SIGTERM at step 0; no step was done, so nothing was saved; the"
    assert said in stderr
    assert "step 2" not in out
    if launcher == "ray":
        assert process.returncode == 75
        assert len(without_raylets(stderr)) == 1, stderr  # no stack of Ray's
    with sqlite3.connect(folder / "runs" / "mlflow.db") as database:
        found = database.execute("SELECT status FROM runs WHERE name = ?", (name,))
        assert found.fetchall() == [("KILLED",)]
