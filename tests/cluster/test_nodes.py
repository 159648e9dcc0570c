"""Nodes that come and go: several raylets on this machine, one driver."""

from __future__ import annotations

import json
import queue
import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cluster.launching import command, environment, make_inputs
from tests.cluster.raylets import Raylets, raylets

pytestmark = pytest.mark.long  # a minute or two each

STEPS = 500
# About 0.1 s a step.
SETTINGS = (
    f"train.steps={STEPS}", "train.sequence_length=256", "train.global_batch_size=8", "checkpoint.steps=10",
    "eval.num_lines=2", "eval.max_new_tokens=1", "lwo.steps_per_layer=5", "train.logging_steps=5",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("nodes"))


@pytest.fixture
def cluster(folder: Path) -> Iterator[tuple[Raylets, dict[str, str]]]:
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 4}
    short = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # Ray's sockets do not fit below pytest's folders.
    own = environment(folder, RAY_TMPDIR=short, OMP_NUM_THREADS="1", RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S="1", **token)
    with raylets(own) as nodes:
        yield nodes, own | {"RAY_ADDRESS": nodes.address}
    shutil.rmtree(short, ignore_errors=True)


class Driver:
    """`lwo-dist train`, and what it says line by line."""

    def __init__(self, process: subprocess.Popen[str]):
        self.process, self.said = process, list[str]()
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def until(self, pattern: str, timeout_s: float = 240) -> re.Match[str]:
        """The next line in which `pattern` is found."""
        deadline = time.monotonic() + timeout_s
        while True:
            line = self._lines.get(timeout=max(0.1, deadline - time.monotonic()))
            assert line is not None, f"the driver ended without saying {pattern}:\n{''.join(self.said)}"
            self.said.append(line)
            if found := re.search(pattern, line):
                return found

    def end(self) -> str:
        """Wait for the driver; all it said."""
        while (line := self._lines.get(timeout=240)) is not None:
            self.said.append(line)
        self.process.wait()
        return "".join(self.said)


@contextmanager
def driver(command: list[str], environment: dict[str, str]) -> Iterator[Driver]:
    with subprocess.Popen(
        command, cwd=environment["HOME"], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        try:
            yield Driver(process)
        finally:
            process.kill()


def summary_of(folder: Path, run_name: str) -> dict:
    return json.loads((folder / "runs" / run_name / "summary.json").read_text())


def test_a_run_survives_the_loss_of_a_node(folder: Path, cluster: tuple[Raylets, dict[str, str]]) -> None:
    nodes, own = cluster
    for _ in range(3):
        nodes.add()
    with driver(command(folder, "lost", *SETTINGS, "cluster.num_workers=2"), own) as train:
        train.until(r"^step 3\d/")
        lost = time.monotonic()
        nodes.remove(nodes.hosts()[-1])
        resumed = int(train.until(r"on 2 CPU worker\(s\).*, from step (\d+)")[1])
        print(f"\na node lost: training goes on from step {resumed} after {time.monotonic() - lost:.0f} s")
        said = train.end()
    assert train.process.returncode == 0, said
    assert resumed >= 10
    assert "failure 1 of at most 3 (cluster.max_failures)" in said
    assert summary_of(folder, "lost")["steps"] == STEPS


def test_an_elastic_run_shrinks_and_grows(folder: Path, cluster: tuple[Raylets, dict[str, str]]) -> None:
    nodes, own = cluster
    for _ in range(2):
        nodes.add()
    elastic = ("cluster.num_workers=[1,2]", "cluster.elastic_resize_monitor_interval_s=5")
    with driver(command(folder, "elastic", *SETTINGS, *elastic), own) as train:
        train.until(r"on 2 CPU worker\(s\)")
        train.until(r"^step 3\d/")
        lost = time.monotonic()
        nodes.remove(nodes.hosts()[-1])
        shrunk = int(train.until(r"on 1 CPU worker\(s\).*, from step (\d+)")[1])
        print(f"\na node lost: training goes on on 1 worker from step {shrunk} after {time.monotonic() - lost:.0f} s")
        train.until(r"^step ")
        came = time.monotonic()
        nodes.add()
        grown = int(train.until(r"on 2 CPU worker\(s\).*, from step (\d+)")[1])
        print(f"a node came: training goes on on 2 workers from step {grown} after {time.monotonic() - came:.0f} s")
        said = train.end()
    assert train.process.returncode == 0, said
    assert 10 <= shrunk < grown < STEPS
    assert (summary_of(folder, "elastic")["world_size"], summary_of(folder, "elastic")["steps"]) == (2, STEPS)


def test_a_node_that_is_taken_away(folder: Path, cluster: tuple[Raylets, dict[str, str]]) -> None:
    nodes, own = cluster
    for _ in range(3):
        nodes.add()
    with driver(command(folder, "preempted", *SETTINGS, "cluster.num_workers=2"), own) as train:
        train.until(r"^step 3\d/")
        first = nodes.hosts()[-1]
        nodes.drain(first, 120)
        stopped = train.until(rf"stopped by the preemption of node {first[:8]} at step (\d+); checkpoint .*; going on")
        # The others have room: it goes on at the very step, long before the node is gone.
        assert train.until(r"on 2 CPU worker\(s\).*, from step (\d+)")[1] == stopped[1]
        train.until(r"^step ")
        second = nodes.hosts()[-1]
        nodes.drain(second, 120)
        said = train.end()
    # Now there is room for one only.
    assert train.process.returncode == 75, said
    assert re.search(
        rf"lwo-dist: stopped by the preemption of node {second[:8]} at step \d+; checkpoint \S+; the", said
    )
