"""A run for which the cluster has no room now."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from lwo_dist.cluster import waiting
from lwo_dist.config import ClusterConfig, Config
from lwo_dist.stop import StopRequest
from tests.cluster.launching import command, followed, make_inputs, summary_of
from tests.cluster.raylets import Raylets, raylets

CONFIG = Config(run_name="r", cluster=ClusterConfig(num_workers=2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("waiting"))


@pytest.fixture
def cluster(folder: Path) -> Iterator[tuple[Raylets, dict[str, str]]]:
    """A head without CPUs and two nodes of one CPU each."""
    with raylets(folder) as (nodes, own):
        for _ in range(2):
            nodes.add()
        yield nodes, own


@contextmanager
def _others_work(own: dict[str, str]) -> Iterator[None]:
    """Another driver, which has one CPU of the cluster."""
    code = (
        "import ray, sys; ray.init(log_to_driver=False); work = ray.remote(num_cpus=1)(type('Work',"
        " (), {})).remote();ray.get(work.__ray_ready__.remote()); print('works', flush=True);"
        " sys.stdin.read()"
    )
    driver = subprocess.Popen(
        [sys.executable, "-c", code],
        env=own,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    with driver:
        assert driver.stdout is not None and driver.stdout.readline() == "works\n"
        yield
        driver.communicate("")


def slots(monkeypatch: pytest.MonkeyPatch, *states: str) -> None:
    """Ray's placement groups are in these states, one after the other, then in the last one."""
    left = list(states)

    def groups() -> dict[str, str]:
        return {"group": left.pop(0) if len(left) > 1 else left[0]}

    monkeypatch.setattr(waiting, "placement_groups", groups)
    monkeypatch.setattr(waiting, "nodes_of_cluster", lambda: [{"CPU": 2.0}])
    monkeypatch.setattr(waiting, "_LOOK_S", 0.01)
    monkeypatch.setattr(waiting, "_FIRST_LINE_S", 0.05)
    monkeypatch.setattr(waiting, "_PATIENCE_S", 0.0)


def wait_for(condition: Callable[[], bool]) -> None:
    """In the main thread, where signals arrive; as Ray's controller, it does not listen itself."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_run_that_waits_says_so_and_one_that_finds_room_is_silent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The short form of the three below, without Ray."""
    slots(monkeypatch, "PENDING")
    said: list[str] = []

    def has_said() -> bool:
        said.append(capsys.readouterr().out)
        return "waiting for room" in "".join(said)

    with waiting.watched_waiting(CONFIG, {"CPU": 1}, StopRequest()):
        wait_for(has_said)
    assert "waiting for room for 2 worker(s) of 1 CPU for 0 s; the nodes that are" in "".join(said)
    assert "have room for 2, which others use" in "".join(said)
    slots(monkeypatch, "CREATED")
    with waiting.watched_waiting(CONFIG, {"CPU": 1}, StopRequest()):
        looks = time.monotonic() + 0.2
        wait_for(lambda: time.monotonic() > looks)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("asks", ["ctrl-c", "stop"])
def test_ctrl_c_and_a_stop_end_the_wait(asks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    slots(monkeypatch, "PENDING")
    # A stop waits for workers that may still be saving; Ctrl-C does not.
    monkeypatch.setattr(waiting, "_PATIENCE_S", 0.0 if asks == "stop" else 3600.0)
    stop = StopRequest()
    with (
        pytest.raises(KeyboardInterrupt),
        stop.listening(),
        waiting.watched_waiting(CONFIG, {"CPU": 1}, stop),
    ):
        if asks == "ctrl-c":
            os.kill(os.getpid(), signal.SIGINT)
        else:
            stop.request("SIGTERM")
        wait_for(lambda: False)
    assert stop.reason == ("Ctrl-C" if asks == "ctrl-c" else "SIGTERM")


@pytest.mark.long  # a minute
def test_ctrl_c_is_heard_while_a_run_waits(
    folder: Path, cluster: tuple[Raylets, dict[str, str]]
) -> None:
    _, own = cluster
    with (
        _others_work(own),
        followed(command(folder, "impatient", "cluster.num_workers=2"), own) as train,
    ):
        train.until(
            r"^waiting for room for 2 worker\(s\) of 1 CPU for 1\d s; .* have room for 2, which"
            r" others use"
        )
        train.process.send_signal(signal.SIGINT)
        said = train.end()
    assert train.process.returncode == 130, said
    assert "lwo-dist: stopped by Ctrl-C at step 0; no step was done" in said
    # No traceback of ours; Ray's own actors may have one as their driver leaves.
    assert "lwo_dist/cli.py" not in said


@pytest.mark.long  # a minute
def test_a_run_waits_until_others_are_done(
    folder: Path, cluster: tuple[Raylets, dict[str, str]]
) -> None:
    _, own = cluster
    with ExitStack() as others:
        others.enter_context(_others_work(own))
        with followed(command(folder, "patient", "cluster.num_workers=2"), own) as train:
            train.until(r"^waiting for room for 2 worker")
            others.close()
            said = train.end()
    assert train.process.returncode == 0, said
    assert summary_of(folder, "patient")["world_size"] == 2


@pytest.mark.long  # two minutes
def test_a_run_that_waits_for_a_lost_node_can_be_stopped(
    folder: Path, cluster: tuple[Raylets, dict[str, str]]
) -> None:
    nodes, own = cluster
    settings = (
        "cluster.num_workers=2",
        "train.steps=300",
        "train.sequence_length=256",
        "train.global_batch_size=8",
        "checkpoint.steps=10",
        "lwo.steps_per_layer=5",
        "train.logging_steps=5",
        "eval.num_lines=2",
        "tracking.enabled=true",
    )
    with followed(command(folder, "stopped", *settings), own) as train:
        train.until(r"^step 3\d/")
        nodes.remove(nodes.hosts()[-1])
        train.until(
            r"^waiting for room for 2 worker\(s\) .* have room for 1, add nodes, or stop it"
        )
        train.process.send_signal(signal.SIGTERM)
        said = train.end()
    assert train.process.returncode == 75, said
    stopped = re.search(
        r"^lwo-dist: stopped by SIGTERM at step (\d+); checkpoint (\S+); the same command",
        said,
        re.M,
    )
    assert stopped, said
    assert Path(stopped[2], "state.json").is_file()
    # MLflow has its end: FAILED, by a rank that saw the other go, or KILLED.
    records = (folder / "runs" / "stopped" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(records[-1])["kind"] == "end"
    nodes.add()
    with followed(command(folder, "stopped", *settings), own) as train:
        assert train.until(r"on 2 CPU worker\(s\).*, from step (\d+)")[1] == stopped[1]
        said = train.end()
    assert train.process.returncode == 0, said
    assert summary_of(folder, "stopped")["steps"] == 300
