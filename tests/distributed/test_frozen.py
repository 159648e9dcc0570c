"""What the caller has frozen stays frozen under every strategy."""

from __future__ import annotations

import warnings
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

import lwo_dist
from tests import oracle
from tests.distributed import training, zero
from tests.ranks import run_ranks

MODEL = oracle.tiny_model
FROZEN = ("model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight")


def partly_frozen(**how: Any) -> nn.Module:
    model = MODEL(**how)
    for name in FROZEN:
        model.get_parameter(name).requires_grad_(False)
    return model


def weights_after_a_cycle(strategy: str, stage: int, late: bool) -> dict[str, Tensor]:
    recipe = oracle.Recipe(steps_per_layer=1, lr=1e-2)
    with warnings.catch_warnings(), patch.object(oracle, "tiny_model", partly_frozen):
        warnings.simplefilter("ignore")
        if strategy == "deepspeed":
            engine = zero.make_engine(stage, recipe, tied=False, late=late)
            lwo = lwo_dist.attach(engine, zero.lwo_config(recipe))
        else:
            lwo = training.attach(strategy, recipe, tied=False, dtype=torch.float32)
    assert [layer.name for layer in lwo.layers] == [*(f"layer_{i}" for i in range(4)), "head"]
    return training.train(lwo, len(lwo.layers))[1]


@pytest.mark.parametrize(
    ("strategy", "stage", "late"),
    [("fsdp", 0, False), ("deepspeed", 2, False), ("deepspeed", 3, False), ("deepspeed", 3, True)],
)
def test_what_is_frozen_stays_frozen(strategy: str, stage: int, late: bool) -> None:
    found = run_ranks(
        weights_after_a_cycle, 2, strategy, stage, late, deepspeed=strategy == "deepspeed"
    )[0]
    before = oracle.tiny_model(tied=False).state_dict()
    unchanged = {name for name, value in before.items() if torch.equal(value, found[name])}
    assert unchanged == set(FROZEN)
