"""One writer per run: only one of two drivers trains, and orphaned workers of a killed driver
cannot commit. On a disk and in an object store.
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from lwo_dist import lease
from lwo_dist.callback import Callback
from lwo_dist.checkpoint.format import committed_steps, read_checkpoint
from lwo_dist.config import Config
from lwo_dist.driver import prepare
from lwo_dist.errors import UserError
from lwo_dist.run import run
from lwo_dist.spool import read_spool
from lwo_dist.storage import RunFolder
from tests import contenders
from tests.distributed import test_object_store, test_run
from tests.distributed.test_run import make_config
from tests.ranks import run_ranks

bucket = test_object_store.bucket
inputs = test_run.inputs
STEPS = 12


@pytest.fixture(params=["disk", "object store"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "disk":
        return str(tmp_path)
    # moto's servers of one process share their buckets.
    return f"{request.getfixturevalue('bucket')}/{tmp_path.name}"


@pytest.fixture
def notes(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "notes"
    folder.mkdir()
    yield folder


def check_commits(storage: str, notes: Path, claims: int) -> None:
    """Every step was committed exactly once, is intact, and attempts do not interleave."""
    made = contenders.commits(notes)
    steps = [step for step, _ in made]
    # During a takeover, a step may be committed without its writer acknowledging it.
    assert steps == sorted(set(steps)) and len(steps) >= STEPS - 1
    numbers = [claim for _, claim in made]
    assert numbers == sorted(numbers) and len(set(numbers)) == claims
    run = RunFolder(storage, "r")
    assert committed_steps(run) == list(range(1, steps[-1] + 1))
    assert [read_checkpoint(run, step).state["attempt"] for step in steps] == numbers


def finish(notes: Path, *drivers: ForkServerProcess) -> None:
    (notes / "finish").write_text("\n")
    for driver in drivers:
        driver.join(contenders.DEADLINE_S)
        assert driver.exitcode == 0


def two_drivers(storage: str, notes: Path, rng: random.Random) -> None:
    first = contenders.start(storage, notes, "a", STEPS)
    time.sleep(rng.choice((0, rng.uniform(0, 0.5))))  # the result is the same for every delay
    second = contenders.start(storage, notes, "b", STEPS)
    for process in (first[1], second[1]):
        process.join(contenders.DEADLINE_S)
    finish(notes, first[0], second[0])
    errors = [error for error in (contenders.error(notes, name) for name in "ab") if error]
    assert len(errors) == 1
    assert re.fullmatch(
        r"run_name = r: process \d+ of user \S+ on \S+ has been writing this run since [\d: +-]+;"
        r" wait until it ends, choose another run_name, or take over the run with"
        r" checkpoint.take_over=true",
        errors[0],
    )
    check_commits(storage, notes, claims=1)


def an_orphaned_worker(storage: str, notes: Path, rng: random.Random) -> None:
    driver, orphan = contenders.start(storage, notes, "a", 1000)
    contenders.wait_for(notes / "commits.log", lines=rng.randint(1, 4))
    os.kill(int(driver.pid or 0), signal.SIGKILL)
    driver.join()
    heir, worker = contenders.start(storage, notes, "b", STEPS)
    for process in (worker, orphan):
        process.join(contenders.DEADLINE_S)
    finish(notes, heir)
    assert contenders.error(notes, "b") == ""
    assert re.fullmatch(
        r"run_name = r: process \d+ of user \S+ on \S+ took over this run at [\d: +-]+;"
        r" this process stops",
        contenders.error(notes, "a"),
    )
    check_commits(storage, notes, claims=2)


@pytest.mark.parametrize("scene", [two_drivers, an_orphaned_worker])
@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(n, marks=pytest.mark.long) for n in range(1, 20))]
)
def test_a_run_has_one_writer(storage: str, notes: Path, seed: int, scene: object) -> None:
    assert callable(scene)
    scene(storage, notes, random.Random(seed))


def test_take_over_from_a_live_driver(
    storage: str, notes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    driver, worker = contenders.start(storage, notes, "a", 1000)
    contenders.wait_for(notes / "commits.log", lines=2)
    run = RunFolder(storage, "r")
    claim = lease.take(run, force=True)
    worker.join(contenders.DEADLINE_S)
    finish(notes, driver)
    assert "took over this run" in contenders.error(notes, "a")
    assert re.fullmatch(
        rf"took over the run r from process {driver.pid} of user \S+ on \S+, which had been writing"
        r" it since [\d: +-]+\n",
        capsys.readouterr().out,
    )
    claim.check()
    lease.refuse_held(run)  # ours


@pytest.mark.parametrize("force", [False, True])
def test_a_finished_run_is_free_at_once(
    storage: str, notes: Path, force: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    driver, worker = contenders.start(storage, notes, "a", 1)
    worker.join(contenders.DEADLINE_S)
    finish(notes, driver)
    run = RunFolder(storage, "r")
    lease.refuse_held(run)
    assert lease.take(run, force=force).number == 3
    assert lease.take(run, force=force).number == 4  # our own
    assert capsys.readouterr().out == ""


def test_a_new_worker_group_revokes_the_previous_claim(tmp_path: Path) -> None:
    """Ray restarts workers while the old ones may live on behind a network partition."""
    run = RunFolder(str(tmp_path), "r")
    holder = lease.take(run).holder
    old, new = lease.join(run, holder), lease.join(run, holder)
    new.check()
    with pytest.raises(lease.LostRunError):
        old.check()
    assert old.is_lost() and not new.is_lost() and lease.is_ours(run)


def test_a_remote_holder_is_dead_when_its_heartbeat_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(str(tmp_path), "r")
    monkeypatch.setattr(lease, "this_process", lambda: ELSEWHERE)
    lease.take(run)
    monkeypatch.undo()
    monkeypatch.setattr(lease, "EXPIRES_S", 0.2)
    monkeypatch.setattr(lease, "_LOOK_S", 0.05)
    assert lease.take(run).number == 2
    with pytest.raises(lease.LostRunError, match="took over this run"):
        lease.join(run, ELSEWHERE["holder"])


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Waiting takes no time; each wait is noted."""
    waits: list[float] = []
    clock = lambda: sum(waits)  # noqa: E731
    monkeypatch.setattr(lease, "time", SimpleNamespace(sleep=waits.append, monotonic=clock))
    return waits


def take_as(run: RunFolder, holder: Mapping[str, Any]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lease, "this_process", lambda: holder)
        lease.take(run, force=True)


def test_a_run_that_was_ended_is_not_waited_for(tmp_path: Path, waits: list[float]) -> None:
    run = RunFolder(str(tmp_path), "r")
    take_as(run, ELSEWHERE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lease, "this_process", lambda: ELSEWHERE)
        with lease.renewed(run):
            assert run.read("lease/0123456789abcdef.alive", limit=100) is not None
    assert run.read("lease/0123456789abcdef.alive", limit=100) is None
    lease.refuse_held(run)
    assert lease.take(run).number == 2 and waits == []


@pytest.mark.parametrize("how", ["gone", "zombie"])
def test_a_holder_of_this_machine_that_has_died_is_not_waited_for(
    how: str, tmp_path: Path, waits: list[float]
) -> None:
    run = RunFolder(str(tmp_path), "r")
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = psutil.Process(process.pid).create_time()
    holder = {**lease.this_process(), **PROCESS, "pid": process.pid, "started": started}
    take_as(run, holder)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    if how == "gone":
        process.wait()
    assert lease.take(run).number == 2 and waits == []
    process.kill()
    process.communicate()


def test_the_heartbeat_decides_if_the_pid_is_another_process_s(
    tmp_path: Path, waits: list[float]
) -> None:
    """A clock that was set makes the holder itself look like another process."""
    run = RunFolder(str(tmp_path), "r")
    take_as(run, {**lease.this_process(), **PROCESS, "started": 1.0})
    assert lease.take(run).number == 2 and sum(waits) >= lease.EXPIRES_S


def test_a_holder_of_this_machine_that_lives_keeps_the_run(
    tmp_path: Path, waits: list[float]
) -> None:
    run = RunFolder(str(tmp_path), "r")
    parent = psutil.Process(os.getppid())
    known = {"pid": parent.pid, "started": parent.create_time()}
    take_as(run, {**lease.this_process(), **PROCESS, **known})
    assert not lease._has_died({**lease.this_process(), **known})
    run.write("lease/0123456789abcdef.alive", b"before")

    def renew(seconds: float) -> None:
        waits.append(seconds)
        run.write("lease/0123456789abcdef.alive", b"renewed")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lease.time, "sleep", renew)
        for ask in (lease.take, lease.refuse_held):
            run.write("lease/0123456789abcdef.alive", b"before")
            with pytest.raises(UserError, match="has been writing this run since"):
                ask(run)
    assert len(waits) == 2
    assert run.read("lease/000002.json", limit=100) is None


def test_a_half_written_claim_counts_and_is_never_replaced(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path), "r")
    claim = lease.take(run)
    name = "lease/000002.json"
    assert run.create(name, b"half a cla")  # its writer died in the middle
    assert claim.is_lost()
    assert not run.create(name, b"mine")
    assert lease.take(run).number == 3
    assert run.read(name, limit=100) == b"half a cla"


PROCESS = {"holder": "0123456789abcdef", "host": "another", "user": "somebody"}
ELSEWHERE = {
    **PROCESS,
    "pid": 1,
    "started": 0.0,
    "machine": "another boot",
}


def lose_at(config: Config, step: int) -> str:
    """Run until another process takes over after `step` steps; return the error."""

    class TakeOver(Callback):
        def on_metrics(self, now: int, metrics: Mapping[str, float]) -> None:
            if now == step:
                lease.take(RunFolder(config.storage, "r"), force=True)

    try:
        run(config, [TakeOver()])
    except UserError as lost:
        return f"{type(lost).__name__}: {lost}"
    return ""


def test_a_lost_run_commits_nothing_and_does_not_end_the_mlflow_run(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    settings = (
        "tracking.enabled=true",
        f"tracking.uri=sqlite:///{tmp_path}/mlflow.db",
        "checkpoint.steps=2",
    )
    config = prepare(make_config(inputs, tmp_path, *settings))
    said = run_ranks(lose_at, 2, config, 6)
    assert said[0].startswith("LostRunError: run_name = r: process ")
    assert said[1].startswith("UserError: run_name = r: process ")
    assert committed_steps(RunFolder(str(tmp_path), "r"))[-1] <= 6
    assert not (tmp_path / "r" / "summary.json").exists()
    kinds = [record.kind for record in read_spool(tmp_path / "r" / "metrics.jsonl")]
    assert "metrics" in kinds and "end" not in kinds


def lose_unseen(config: Config, fails: bool) -> tuple[str, list[str]]:
    """Another process takes the run over; what is raised, and which end the callbacks are told.

    Args:
        fails: a callback raises before the loss is found; else only a save can find it.
    """
    ends: list[str] = []

    class TakeOver(Callback):
        def on_metrics(self, now: int, metrics: Mapping[str, float]) -> None:
            lease.take(RunFolder(config.storage, "r"), force=True)
            if fails:
                raise RuntimeError("it broke")

        def on_run_failed(self, error: BaseException) -> None:
            ends.append(f"failed: {error}")

        def on_run_stopped(self, reason: str) -> None:
            ends.append(f"stopped: {reason}")

        def on_run_end(self, summary: Mapping[str, Any]) -> None:
            ends.append("ended")

    with pytest.MonkeyPatch.context() as patch:
        if not fails:
            patch.setattr(lease.Lease, "is_lost", lambda _: False)
        try:
            run(config, [TakeOver()])
        except (UserError, RuntimeError) as error:
            return type(error).__name__, ends
    return "", ends


@pytest.mark.parametrize(("fails", "raised"), [(False, "LostRunError"), (True, "RuntimeError")])
def test_no_callback_is_told_the_end_of_a_run_that_is_lost(
    inputs: tuple[Path, Path], tmp_path: Path, fails: bool, raised: str
) -> None:
    config = prepare(make_config(inputs, tmp_path, "checkpoint.steps=2"))
    assert run_ranks(lose_unseen, 1, config, fails) == [(raised, [])]


def test_a_second_torchrun_of_the_same_run_is_refused(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    """`prepare` refuses the second one before it changes any file of the run."""
    config = make_config(inputs, tmp_path)
    with contenders.held(str(tmp_path)):
        before = {path: path.read_bytes() for path in (tmp_path / "r").rglob("*.json")}
        with pytest.raises(UserError, match="has been writing this run since"):
            prepare(config)
        assert {path: path.read_bytes() for path in (tmp_path / "r").rglob("*.json")} == before
    prepare(config)
