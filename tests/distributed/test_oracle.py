"""`replicate` and `fsdp` at 1, 2 and 4 ranks equal a plain single-process loop."""

from __future__ import annotations

import itertools

import pytest
import torch

from lwo_dist.layers import find_layers
from tests import oracle
from tests.distributed.training import attach, train
from tests.ranks import run_ranks

CASES = list(itertools.product([torch.float64, torch.float32], [False, True], [1, 2], [0.0, 0.5]))
# The bound is the promise: 1e-10 in float64, 1e-5 in float32.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def run_cases(strategy: str) -> dict:
    results = {}
    for dtype, tied, accumulation, max_norm in CASES:
        recipe = oracle.Recipe(accumulation=accumulation, max_grad_norm=max_norm)
        lwo = attach(strategy, recipe, tied=tied, dtype=dtype)
        results[dtype, tied, accumulation, max_norm] = train(lwo, recipe.steps)
    return results


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("strategy", ["replicate", "fsdp"])
def test_equals_the_plain_loop(strategy: str, world_size: int) -> None:
    ranks = run_ranks(run_cases, world_size, strategy, timeout=300)
    for (dtype, tied, accumulation, max_norm), (losses, weights) in ranks[0].items():
        case = f"{dtype} tied={tied} accumulation={accumulation} max_norm={max_norm}"
        model = oracle.tiny_model(tied=tied, dtype=dtype)
        layers = [layer.parameter_names for layer in find_layers(model)]
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        expected = oracle.train(model, layers, oracle.Recipe(max_grad_norm=max_norm))
        parameters = dict(model.named_parameters())
        assert all(not torch.equal(parameters[name], before[name]) for name in parameters), case
        assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) < TOLERANCE[dtype], (
            case
        )
        for name, parameter in parameters.items():
            difference = (parameter.detach() - weights[name]).abs().max().item()
            assert difference < TOLERANCE[dtype], f"{case}: {name} differs by {difference}"


@pytest.mark.parametrize("strategy", ["replicate", "fsdp"])
def test_a_rerun_is_bitwise_equal(strategy: str) -> None:
    first, second = run_ranks(run_twice, 2, strategy)[0]
    assert first[0] == second[0]
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])


def run_twice(strategy: str) -> list:
    recipe = oracle.Recipe(max_grad_norm=0.5)
    return [
        train(attach(strategy, recipe, tied=True, dtype=torch.float32), recipe.steps)
        for _ in range(2)
    ]
