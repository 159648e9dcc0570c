"""What is said of a visit and of a node, on real ranks."""

from __future__ import annotations

import math
import socket
import time
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from lwo_dist.distributed import gather_floats
from lwo_dist.training.system_metrics import GPU, MAX_HOSTS, NODE, SystemMetrics
from lwo_dist.training.visits import Visit
from tests import oracle
from tests.distributed import zero
from tests.distributed.training import attach, follow, train_step, weights
from tests.ranks import run_ranks

STEPS = 10  # visits of 4 steps: two whole ones and one that has only begun
RECIPE = oracle.Recipe()


def follow_visits(
    strategy: str,
) -> tuple[list[Visit], list[dict[str, Any]], list[dict[str, torch.Tensor]]]:
    """The visits as told, each step as it was, and the weights at every start of a visit."""
    lwo = attach(strategy, RECIPE, tied=False, dtype=torch.float64)
    visits = follow(lwo)
    visits.pause(1e9)  # an evaluation that took long, and was not part of any visit
    told: list[Visit] = []
    steps = []
    masters = [weights(lwo)]
    for step in range(STEPS):
        visits.begin_step()
        loss, report = train_step(lwo, step)
        share = torch.tensor(loss * (0.25 if dist.get_rank() == 0 else 0.75), dtype=torch.float64)
        if step == 1:  # its numbers must not count
            report = type(report)(**{**vars(report), "skipped": torch.tensor(1.0)})
            share = torch.tensor(math.nan)
        visits.after_step(share, report)
        steps.append({"loss": loss, "norm": float(report.grad_norm), "layer": report.layer})
        if (step + 1) % RECIPE.steps_per_layer == 0:
            masters.append(weights(lwo))
        if step in (5, 9):  # as when metrics are logged: not at the end of a visit
            told += visits.take()
    return told, steps, masters


@pytest.mark.parametrize("strategy", ["replicate", "fsdp"])
def test_a_visit_is_told_as_it_was(strategy: str) -> None:
    (told, steps, masters), (told_elsewhere, *_) = run_ranks(follow_visits, 2, strategy)
    per = RECIPE.steps_per_layer
    assert [visit.step for visit in told] == [per, 2 * per]
    for number, (visit, elsewhere) in enumerate(zip(told, told_elsewhere, strict=True)):
        own = steps[number * per : (number + 1) * per]
        counted = [x for x in range(per) if number * per + x != 1]
        slope = np.polyfit(counted, [own[x]["loss"] for x in counted], 1)[0]
        assert visit.layer == own[0]["layer"]
        metrics = visit.metrics
        assert metrics["visit/loss_drop"] == pytest.approx(-slope * (len(counted) - 1), abs=1e-9)
        assert metrics["visit/grad_norm"] == pytest.approx(
            np.mean([own[x]["norm"] for x in counted])
        )
        before, after = masters[number], masters[number + 1]
        change = sum(float((after[name] - before[name]).square().sum()) for name in before) ** 0.5
        assert metrics["visit/change_norm"] == pytest.approx(change, rel=1e-6) and change > 0
        without_time = {**elsewhere.metrics, "visit/seconds": metrics["visit/seconds"]}
        assert without_time == metrics
    assert told[0].metrics["visit/seconds"] < -1e8  # the pause is taken out
    assert 0 < told[1].metrics["visit/seconds"] < 100


def changes_beside_the_embedding(strategy: str) -> list[tuple[float, float]]:
    """Of each visit, the change that is told and that of the active layer's weights."""
    recipe = oracle.Recipe(steps_per_layer=1)
    config = {"embeddings": "always"}
    if strategy == "deepspeed":
        lwo = zero.attach_engine(2, recipe, tied=True, config=config)
    else:
        lwo = attach(strategy, recipe, tied=True, dtype=torch.float64, **config)
    visits = follow(lwo)
    found = []
    for step in range(len(lwo.visits)):
        layer = lwo.active_layer
        before = lwo.read_layer(layer)
        train_step(lwo, step, visits)
        after = lwo.read_layer(layer)
        change = sum(float((after[name] - before[name]).square().sum()) for name in after) ** 0.5
        (visit,) = visits.take()
        found.append((visit.metrics["visit/change_norm"], change))
    return found


@pytest.mark.parametrize("strategy", ["replicate", "fsdp", "deepspeed"])
def test_the_change_is_that_of_the_active_layer_alone(strategy: str) -> None:
    more = {"deepspeed": True} if strategy == "deepspeed" else {}
    for told, change in run_ranks(changes_beside_the_embedding, 2, strategy, **more)[0]:
        assert told == pytest.approx(change, rel=1e-5) and change > 0


def full_has_no_visits() -> int:
    lwo = attach("replicate", RECIPE, tied=True, dtype=torch.float32, method="full")
    visits = follow(lwo)
    for step in range(4):
        train_step(lwo, step, visits)
        assert visits.masters_before == []  # no copy of a whole model for a change never told
    return len(visits.take())


def test_full_fine_tuning_has_no_visits() -> None:
    assert run_ranks(full_has_no_visits, 1) == [0]


def sample(
    folder: str, hosts: list[str], local_ranks: list[int], enabled: bool
) -> tuple[dict[str, float], list[str]]:
    rank = dist.get_rank()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "gethostname", lambda: hosts[rank])
        patch.setenv("LOCAL_RANK", str(local_ranks[rank]))
        system = SystemMetrics(torch.device("cpu"), folder, enabled=enabled, interval_s=0.01)
    deadline = time.monotonic() + 30
    while (
        enabled and local_ranks[rank] == 0 and not system._samples and time.monotonic() < deadline
    ):
        time.sleep(0.01)
    rows = gather_floats(system.read(), torch.device("cpu"))
    return system.metrics(rows), system.hosts


def test_every_node_is_sampled_once_and_told_on_rank_0(tmp_path: Any) -> None:
    nodes, ranks = ["a", "a", "b"], [0, 1, 0]
    metrics, hosts = run_ranks(sample, 3, str(tmp_path), nodes, ranks, True)[0]
    assert hosts == ["a", "b"]
    assert set(metrics) == {f"system/{host}/{name}" for host in "ab" for name in NODE}
    assert 0 < metrics["system/b/system_memory_usage_percentage"] < 100
    assert metrics["system/a/disk_available_megabytes"] > 0
    assert run_ranks(sample, 2, str(tmp_path), ["a", "b"], [0, 0], False)[0] == ({}, ["a", "b"])


@pytest.mark.parametrize("hosts", [MAX_HOSTS, MAX_HOSTS + 1, 125])
def test_the_number_of_system_metrics_is_bounded(hosts: int, tmp_path: Any) -> None:
    system = SystemMetrics(torch.device("cpu"), tmp_path, enabled=False)
    system._ranks = [(f"host{host}", gpu) for host in range(hosts) for gpu in range(8)]
    node = lambda host, gpu: float(host) if gpu == 0 else math.nan  # noqa: E731
    rows = [
        [node(int(name.removeprefix("host")), gpu)] * len(NODE) + [float(gpu)] * len(GPU)
        for name, gpu in system._ranks
    ]
    metrics = system.metrics(rows)
    if hosts <= MAX_HOSTS:
        assert len(metrics) == hosts * (len(NODE) + 8 * len(GPU))
        return
    assert len(metrics) == 3 * (len(NODE) + len(GPU))
    cpu = [
        metrics[f"system/hosts/cpu_utilization_percentage_{of}"] for of in ("min", "mean", "max")
    ]
    assert cpu == [0, (hosts - 1) / 2, hosts - 1]
    gpu = [
        metrics[f"system/hosts/gpu_utilization_percentage_{of}"] for of in ("min", "mean", "max")
    ]
    assert gpu == [0, 3.5, 7]
    # Without a GPU, and without samples, there are no names.
    blank = [[math.nan] * len(row) for row in rows]
    assert system.metrics(blank) == {}
