"""In a step the host reads nothing back from the device, so that on a GPU it never waits there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests import oracle
from tests.distributed.training import attach, follow, train_step
from tests.ranks import run_ranks

# What gives a number, a bool or a shape that depends on values.
READS = {"_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "unique"}


class CountReads(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if name in READS:
            self.calls.append(name)
        return func(*args, **(kwargs or {}))


def read_in_a_cycle(strategy: str, method: str) -> list[list[str]]:
    recipe = oracle.Recipe(steps_per_layer=3, max_grad_norm=0.5, accumulation=2)
    lwo = attach(strategy, recipe, tied=False, dtype=torch.float32, method=method)
    visits = follow(lwo)
    inner, calls = lwo.backward, []

    def backward(loss: torch.Tensor) -> None:
        with CountReads() as counter:
            inner(loss)
        calls.append(counter.calls)

    def step(step=lwo.step) -> Any:
        with CountReads() as counter:
            report = step(wait=False)
        calls.append(counter.calls)
        return report

    lwo.backward, lwo.step = backward, step
    begin, after = visits.begin_step, visits.after_step

    def begin_step() -> None:
        with CountReads() as counter:
            begin()
        calls.append(counter.calls)

    def after_step(*args: Any) -> None:
        with CountReads() as counter:
            after(*args)
        calls.append(counter.calls)

    visits.begin_step, visits.after_step = begin_step, after_step
    for number in range(7 * recipe.steps_per_layer):
        train_step(lwo, number, visits)
    return calls


@pytest.mark.parametrize("method", ["lwo", "full"])
@pytest.mark.parametrize("strategy", ["replicate", "fsdp"])
def test_a_step_reads_nothing_back(strategy: str, method: str) -> None:
    for calls in run_ranks(read_in_a_cycle, 2, strategy, method):
        assert len(calls) == 7 * 3 * 6
        assert not any(calls), next(found for found in calls if found)


def skip_a_step(strategy: str) -> dict[str, Any]:
    """Two loops over the same batches; one has a step with a loss that is infinite."""
    weights, moments = [], []
    for bad in (None, 1):
        recipe = oracle.Recipe(steps_per_layer=5)
        lwo = attach(strategy, recipe, tied=False, dtype=torch.float32)
        for number in (0, 2, 3) if bad is None else (0, 1, 2, 3):
            loss_scale = float("inf") if number == bad else 1.0
            tokens, labels = oracle.global_batch(number)
            lwo.backward(oracle.loss_sum(lwo.model, tokens, labels) * loss_scale)
            with CountReads() as counter:
                report = lwo.step(lr=1e-3)
            assert counter.calls == []
            assert float(report.skipped) == (number == bad)
        weights.append(lwo.read_layer(lwo.active_layer))
        moments.append(lwo.read_moments(lwo.active_layer))
    same = all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    for name, states in moments[0].items():
        same = same and all(torch.equal(t, moments[1][name][key]) for key, t in states.items())
    return {"same": same, "steps": float(next(iter(moments[1].values()))["step"])}


@pytest.mark.parametrize("strategy", ["replicate", "fsdp"])
def test_a_skipped_step_is_exactly_none_at_all(strategy: str) -> None:
    for rank in run_ranks(skip_a_step, 2, strategy):
        assert rank == {"same": True, "steps": 3.0}
