"""Nodes that come and go: several raylets on this machine, one driver."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.launching import command, followed, make_inputs, summary_of
from tests.cluster.raylets import Raylets, raylets

pytestmark = pytest.mark.long  # a minute or two each

STEPS = 500
# About 0.1 s a step.
SETTINGS = (
    f"train.steps={STEPS}",
    "train.sequence_length=256",
    "train.global_batch_size=8",
    "checkpoint.steps=10",
    "eval.num_lines=2",
    "eval.max_new_tokens=1",
    "lwo.steps_per_layer=5",
    "train.logging_steps=5",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("nodes"))


@pytest.fixture
def cluster(folder: Path) -> Iterator[tuple[Raylets, dict[str, str]]]:
    with raylets(folder, RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S="1") as cluster:
        yield cluster


def test_a_run_survives_the_loss_of_a_node(
    folder: Path, cluster: tuple[Raylets, dict[str, str]]
) -> None:
    nodes, own = cluster
    for _ in range(3):
        nodes.add()
    with followed(command(folder, "lost", *SETTINGS, "cluster.num_workers=2"), own) as train:
        train.until(r"^step 3\d/")
        lost = time.monotonic()
        nodes.remove(nodes.hosts()[-1])
        resumed = int(train.until(r"on 2 CPU worker\(s\).*, from step (\d+)")[1])
        print(
            f"\na node lost: training goes on from step {resumed} after"
            f" {time.monotonic() - lost:.0f} s"
        )
        said = train.end()
    assert train.process.returncode == 0, said
    assert resumed >= 10
    assert "failure 1 of at most 3 (cluster.max_failures)" in said
    assert summary_of(folder, "lost")["steps"] == STEPS


def test_an_elastic_run_shrinks_and_grows(
    folder: Path, cluster: tuple[Raylets, dict[str, str]]
) -> None:
    nodes, own = cluster
    for _ in range(2):
        nodes.add()
    elastic = ("cluster.num_workers=[1,2]", "cluster.elastic_resize_monitor_interval_s=5")
    with followed(command(folder, "elastic", *SETTINGS, *elastic), own) as train:
        train.until(r"on 2 CPU worker\(s\)")
        train.until(r"^step 3\d/")
        lost = time.monotonic()
        nodes.remove(nodes.hosts()[-1])
        shrunk = int(train.until(r"on 1 CPU worker\(s\).*, from step (\d+)")[1])
        print(
            f"\na node lost: training goes on on 1 worker from step {shrunk} after"
            f" {time.monotonic() - lost:.0f} s"
        )
        train.until(r"^step ")
        came = time.monotonic()
        nodes.add()
        grown = int(train.until(r"on 2 CPU worker\(s\).*, from step (\d+)")[1])
        print(
            f"a node came: training goes on on 2 workers from step {grown} after"
            f" {time.monotonic() - came:.0f} s"
        )
        said = train.end()
    assert train.process.returncode == 0, said
    assert 10 <= shrunk < grown < STEPS
    assert (
        summary_of(folder, "elastic")["world_size"],
        summary_of(folder, "elastic")["steps"],
    ) == (2, STEPS)


def test_a_node_that_is_taken_away(folder: Path, cluster: tuple[Raylets, dict[str, str]]) -> None:
    nodes, own = cluster
    for _ in range(3):
        nodes.add()
    with followed(command(folder, "preempted", *SETTINGS, "cluster.num_workers=2"), own) as train:
        train.until(r"^step 3\d/")
        first = nodes.hosts()[-1]
        nodes.drain(first, 120)
        stopped = train.until(
            rf"stopped by the preemption of node {first[:8]} at step (\d+); checkpoint .*; going on"
        )
        # The others have room: it goes on at the very step, long before the node is gone.
        assert train.until(r"on 2 CPU worker\(s\).*, from step (\d+)")[1] == stopped[1]
        train.until(r"^step ")
        second = nodes.hosts()[-1]
        nodes.drain(second, 120)
        said = train.end()
    # Now there is room for one only.
    assert train.process.returncode == 75, said
    assert re.search(
        rf"lwo-dist: stopped by the preemption of node {second[:8]} at step \d+; checkpoint"
        r" \S+; the",
        said,
    )
