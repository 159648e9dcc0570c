"""A run for which the cluster has no room now."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.cluster.launching import command, followed, make_inputs, summary_of
from tests.cluster.raylets import Raylets, raylets


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
    assert (
        "lwo_dist/cli.py" not in said
    )  # No traceback of ours; Ray's own actors may have one as their driver leaves.


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
