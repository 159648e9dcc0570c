"""What every strategy holds is what the formulas say: `LWO.memory()` of all ranks together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from lwo_dist.hook import LWO
from lwo_dist.memory import deepspeed_bytes, fsdp_bytes, park_bytes, replicate_bytes
from tests import oracle
from tests.distributed import training, zero
from tests.distributed.test_parks import FP32_SUMS, attach_sharded
from tests.ranks import run_ranks

RECIPE = oracle.Recipe(steps_per_layer=2)
PLAIN = ("replicate", "fsdp", "fsdp bf16")
ZERO = ("zero 1", "zero 2", "zero 3", "zero 1 bf16", "zero 2 bf16", "zero 3 bf16")


def attach(kind: str) -> LWO:
    strategy, *more = kind.split()
    if strategy == "zero":
        precision = {"precision": "bf16", **FP32_SUMS} if "bf16" in more else {}
        return zero.attach_engine(int(more[0]), RECIPE, tied=False, **precision)
    if "bf16" in more:
        return attach_sharded(torch.bfloat16, RECIPE)
    return training.attach(strategy, RECIPE, tied=False, dtype=torch.float32)


def formula(kind: str, numel: int, active: int, parked: int) -> dict[str, int]:
    strategy, *more = kind.split()
    world_size = dist.get_world_size()
    bytes_each = 2 if "bf16" in more else 4
    if strategy == "replicate":
        held = replicate_bytes(numel, active, world_size)
    elif strategy == "fsdp":
        held = fsdp_bytes(numel, active, world_size, storage_bytes=bytes_each)
    else:
        stage = int(more[0])
        held = deepspeed_bytes(numel, active, world_size, stage=stage, weight_bytes=bytes_each)
    parks = park_bytes(parked // world_size, moments=False, masters="bf16" in more)
    return held | {"park_bytes": parks}


def hold(kinds: tuple[str, ...]) -> list[tuple[str, str, dict[str, int], dict[str, int]]]:
    """Of every layer, after the first step of its first visit: kind, layer, held, formula."""
    rows = []
    for kind in kinds:
        lwo = attach(kind)
        sizes: dict[str, Any] = {
            name: getattr(parameter, "ds_numel", parameter.numel())
            for name, parameter in lwo.module.named_parameters()
        }
        visited = 0
        for step in range(2 * len(lwo.layers)):
            active = sum(sizes[name] for name in lwo.active_layer.parameter_names)
            layer = lwo.active_layer.name
            training.train_step(lwo, step)
            if step % 2 == 0:
                expected = formula(kind, sum(sizes.values()), active, visited)
                rows.append((kind, layer, lwo.memory(), expected))
                visited += active
    return rows


def check(world_size: int, kinds: tuple[str, ...], *, deepspeed: bool = False) -> None:
    ranks = run_ranks(hold, world_size, kinds, deepspeed=deepspeed, timeout=300)
    for rows in zip(*ranks, strict=True):
        kind, layer, _, expected = rows[0]
        for key, each in expected.items():
            # Together, because a rank's part of odd rows is one row more; padding is a few
            # elements for each tensor.
            held = sum(row[2][key] for row in rows)
            assert each * world_size <= held + world_size, (kind, layer, key)
            assert held <= 1.01 * each * world_size + 200, (kind, layer, key)


@pytest.mark.parametrize("world_size", [1, 2])
def test_replicate_and_fsdp_hold_what_the_formulas_say(world_size: int) -> None:
    check(world_size, PLAIN)


def test_deepspeed_holds_what_the_formulas_say() -> None:
    check(2, ZERO, deepspeed=True)
