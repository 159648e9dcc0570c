"""`lwo.suffix_backward` under every strategy: equal to a plain loop of the rule, on every number of
ranks; what is dropped does not depend on how the batch is divided, nor on a restart.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
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
        method = config.pop("method", "lwo")
        engine = zero.make_engine(int(strategy[-1]), RECIPE, tied=tied, late=method == "full")
        return lwo_dist.attach(engine, zero.lwo_config(RECIPE, **config), method)
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
    is_full = case.get("method") == "full"
    if is_full:
        layers = [tuple(name for name, _ in model.named_parameters())]
    rule = dropbp.Rule(SHARE, drops_trained=is_full)
    recipe = replace(RECIPE, steps_per_layer=RECIPE.steps) if is_full else RECIPE
    before, choices = dropbp.train(model, layers, recipe, rule)
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
    cases.append({"tied": False, "dtype": torch.float64, "method": "full"})
    ranks = run_ranks(run_case, world_size, strategy, cases, timeout=300)
    for case, *found in zip(cases, *ranks, strict=True):
        assert all(choices == found[0][2] for _, _, choices in found), "ranks chose differently"
        expect(case, found[0])


@needs_deepspeed
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_equals_a_plain_loop_of_the_rule(stage: int) -> None:
    cases = [{"tied": False, "dtype": torch.float32}]
    cases.append({"tied": False, "dtype": torch.float32, "method": "full"})
    ranks = run_ranks(run_case, 2, f"zero_{stage}", cases, timeout=300, deepspeed=True)
    for case, found in zip(cases, ranks[0], strict=True):
        expect(case, found)


def break_off_and_resume(folder: Path, saved_at: int) -> list[Any]:
    """What an unbroken run and one that goes on from a checkpoint lose and drop after it."""
    found = []
    for strategy in ("replicate", "fsdp"):
        lwo = attach(strategy, tied=False, dtype=torch.float32, order="descending")
        choices: list[set[int]] = []
        for step in range(saved_at):
            training.train_step(lwo, step)
        store = LayerStore(RunFolder(str(folder), strategy), stores.model_files)
        stores.save(store, lwo)
        before = _go_on(lwo, saved_at, choices)
        again = attach(strategy, tied=False, dtype=torch.float32, order="descending")
        checkpoint = newest_checkpoint(RunFolder(str(folder), strategy))
        assert checkpoint is not None
        restore(again, checkpoint, has_weights=False)
        own_choices: list[set[int]] = []
        found.append((before, choices, _go_on(again, saved_at, own_choices), own_choices))
    return found


def _go_on(
    lwo: LWO, saved_at: int, choices: list[set[int]]
) -> tuple[list[float], dict[str, torch.Tensor]]:
    losses = []
    for step in range(saved_at, 18):
        choices.append(set(lwo._suffix._dropped))
        losses.append(training.train_step(lwo, step)[0])
    return losses, training.weights(lwo)


@pytest.mark.parametrize("saved_at", [9, 13])
def test_a_resume_is_bitwise_equal(saved_at: int, tmp_path: Path) -> None:
    """In descending order the sensitivities are measured at step 10, after the first checkpoint and
    before the second.
    """
    ranks = run_ranks(break_off_and_resume, 2, tmp_path, saved_at)
    for before, choices, after, own_choices in ranks[0]:
        assert own_choices == choices
        assert any(choices)
        assert after[0] == before[0]
        assert all(torch.equal(after[1][name], before[1][name]) for name in before[1])
