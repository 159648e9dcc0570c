"""A hook on a model that the caller has sharded or wrapped, and the plain loop for comparison."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import lwo_dist
from lwo_dist import LWO, LWOConfig
from lwo_dist.layers import find_layers
from tests import oracle
from tests.distributed.training import train_step

# Every layer once, and the lowest again; each visit has a second step, which uses its moments.
RECIPE = oracle.Recipe(steps=14, steps_per_layer=2, max_grad_norm=0.5)
TOLERANCE = 1e-10


def attach(model: nn.Module, **config: Any) -> LWO:
    settings = {
        "lr": RECIPE.lr,
        "eps": RECIPE.eps,
        "weight_decay": 0.01,
        "max_grad_norm": RECIPE.max_grad_norm,
        "steps_per_layer": RECIPE.steps_per_layer,
    }
    return lwo_dist.attach(model, LWOConfig(**{**settings, **config}))


def tiny_model(*, tied: bool) -> Any:
    return oracle.tiny_model(tied=tied, dtype=torch.float64)


def shard(model: Any, **options: Any) -> Any:
    """A group for each layer, and the rest in the root's, as most people do it."""
    for layer in model.model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def assert_equals_plain_loop(
    found: dict[str, Tensor], *, tied: bool, case: str, recipe: oracle.Recipe = RECIPE
) -> None:
    model = tiny_model(tied=tied)
    layers = [layer.parameter_names for layer in find_layers(model)]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    oracle.train(model, layers, recipe)
    assert found.keys() == before.keys(), case
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[name]), name
        difference = (parameter.detach() - found[name]).abs().max().item()
        assert difference < TOLERANCE, f"{case}: {name} differs by {difference}"


def train_from(lwo: LWO, start: int) -> None:
    for step in range(start, RECIPE.steps):
        train_step(lwo, step)
