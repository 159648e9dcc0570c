"""`lwo.suffix_backward` under every strategy: equal to a plain loop of the rule, on every number of
ranks; what is dropped does not depend on how the batch is divided, nor on a restart.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

import lwo_dist
from lwo_dist.checkpoint.format import newest_checkpoint
from lwo_dist.checkpoint.resume import restore
from lwo_dist.checkpoint.store import LayerStore
from lwo_dist.hook import LWO
from lwo_dist.layers import find_layers
from lwo_dist.storage import RunFolder
from tests import dropbp, oracle, stores
from tests.distributed import training, zero
from tests.ranks import run_ranks

SHARE = 0.5
# Two cycles of 6 layers (5 where the embedding is tied), and something of a third.
RECIPE = oracle.Recipe(steps=26, steps_per_layer=2, max_grad_norm=0.5)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed"
)


def attach(strategy: str, *, tied: bool, dtype: torch.dtype, **config: Any) -> LWO:
    config = {"suffix_backward": SHARE, **config}
    if strategy.startswith("zero"):
        engine = zero.make_engine(int(strategy[-1]), RECIPE, tied=tied)
        return lwo_dist.attach(engine, zero.lwo_config(RECIPE, **config))
    return training.attach(strategy, RECIPE, tied=tied, dtype=dtype, **config)


def choices_of(lwo: LWO, into: list[set[int]]) -> Any:
    """Record what each step drops."""

    def each_step(*_: Any) -> None:
        into.append(set(lwo._suffix._dropped))

    return each_step


def run_case(strategy: str, cases: list[dict[str, Any]]) -> list[Any]:
    found = []
    for case in cases:
        lwo = attach(strategy, **case)
        choices = [set(lwo._suffix._dropped)]
        found.append((*training.train(lwo, RECIPE.steps, choices_of(lwo, choices)), choices[:-1]))
        lwo.detach()
    return found


def expect(case: dict[str, Any], found: tuple[list[float], dict[str, torch.Tensor], Any]) -> None:
    model = oracle.tiny_model(tied=case["tied"], dtype=case["dtype"])
    layers = [layer.parameter_names for layer in find_layers(model)]
    before, choices = dropbp.train(model, layers, RECIPE, dropbp.Rule(SHARE))
    losses, weights, own_choices = found
    assert own_choices == choices
    assert sum(map(len, choices)) > 30, "hardly anything was dropped"
    bound = TOLERANCE[case["dtype"]]
    assert max(abs(a - b) for a, b in zip(losses, before, strict=True)) < bound
    for name, parameter in model.named_parameters():
        assert (parameter.detach() - weights[name]).abs().max() < bound, name


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("strategy", ["replicate", "fsdp"])
def test_equals_a_plain_loop_of_the_rule(strategy: str, world_size: int) -> None:
    cases = [{"tied": tied, "dtype": torch.float64} for tied in (False, True)]
    ranks = run_ranks(run_case, world_size, strategy, cases, timeout=300)
    for case, *found in zip(cases, *ranks, strict=True):
        assert all(choices == found[0][2] for _, _, choices in found), "ranks chose differently"
        expect(case, found[0])


@needs_deepspeed
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_equals_a_plain_loop_of_the_rule(stage: int) -> None:
    case = {"tied": False, "dtype": torch.float32}
    ranks = run_ranks(run_case, 2, f"zero_{stage}", [case], timeout=300, deepspeed=True)
    expect(case, ranks[0][0])
