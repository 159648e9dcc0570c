"""`prepare` for a loop of accelerate on two ranks: it equals a plain loop, and goes on from a saved
state in mid-visit with the same bits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DummyScheduler
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, get_linear_schedule_with_warmup
from transformers.distributed import DistributedConfig

from lwo_dist.integrations.accelerate import prepare
from tests import oracle, trainers
from tests.ranks import run_ranks


def make(kind: str, folder: Path) -> tuple[Any, list[Any]]:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    world_size = dist.get_world_size()
    more: dict[str, Any] = {"cpu": True}
    others: list[Any] = []
    dtype = torch.float64
    if kind.startswith("zero"):
        from accelerate import DeepSpeedPlugin

        from lwo_dist.strategies.deepspeed.builder import load_deepspeed

        load_deepspeed().check_environment()
        import deepspeed

        deepspeed.init_distributed(dist_init_required=False)
        settings = {
            "train_micro_batch_size_per_gpu": "auto",
            "train_batch_size": "auto",
            "gradient_accumulation_steps": "auto",
            "zero_optimization": {"stage": int(kind[4])},
            "steps_per_print": 2**31,
        }
        if "optimizer" in kind:
            settings["optimizer"] = {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}}
        if "scheduler" in kind:
            own = {"warmup_num_steps": trainers.WARMUP, "total_num_steps": trainers.STEPS}
            own |= {"warmup_min_lr": 0.0, "warmup_max_lr": trainers.LR, "warmup_type": "linear"}
            settings["scheduler"] = {"type": "WarmupDecayLR", "params": own}
            others = [DummyScheduler(None)]
        PartialState(cpu=True)  # else DeepSpeed on CPUs is a world of one
        more = {"deepspeed_plugin": DeepSpeedPlugin(hf_ds_config=settings)}
        dtype = torch.float32
    accelerator = Accelerator(gradient_accumulation_steps=trainers.ACCUMULATION, **more)
    if kind == "fsdp":
        trainers.use_fsdp(accelerator)
    model = oracle.tiny_model(tied=False, dtype=dtype)
    if kind == "distributed_config":
        model = sharded_at_load(folder / "model", dtype)
    if kind == "fully_shard":
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    parts = prepare(
        accelerator,
        model,
        trainers.config(lr=trainers.LR, eps=1e-6),
        DataLoader(trainers.Rows(), batch_size=trainers.ROWS // world_size),
        *others,
    )
    if others:
        return accelerator, list(parts)
    # accelerate steps it once for each rank.
    scheduler = get_linear_schedule_with_warmup(
        parts[1], trainers.WARMUP * world_size, trainers.STEPS * world_size
    )
    return accelerator, [*parts, accelerator.prepare(scheduler)]


def sharded_at_load(folder: Path, dtype: torch.dtype) -> Any:
    """The model of the oracle, sharded by transformers while it is read."""
    oracle.tiny_model(tied=False, dtype=dtype).save_pretrained(folder)  # on rank 0
    dist.barrier()
    shards = DistributedConfig(fsdp_size=dist.get_world_size())
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, distributed_config=shards)


def train(kind: str, folder: Path) -> dict[str, Any]:
    accelerator, parts = make(kind, folder)
    norms, rates = trainers.accelerate_loop(accelerator, parts, save=folder)
    lwo = parts[1].lwo
    unbroken = trainers.weights(lwo)
    accelerator.free_memory()
    accelerator, parts = make(kind, folder)
    for parameter in parts[0].parameters():
        nn.init.zeros_(parameter)
    accelerator.load_state(str(folder))
    trainers.accelerate_loop(accelerator, parts, done=3)
    return {
        "strategy": lwo.strategy_name,
        "layers": [layer.parameter_names for layer in lwo.layers],
        "norms": norms,
        "rates": rates,
        "unbroken": unbroken,
        "again": trainers.weights(parts[1].lwo),
    }


@pytest.mark.parametrize(
    ("kind", "strategy"),
    [
        ("replicate", "replicate"),
        ("fsdp", "fsdp"),
        ("fully_shard", "fsdp"),
        ("distributed_config", "fsdp"),
        ("zero1", "deepspeed"),
        ("zero2+optimizer+scheduler", "deepspeed"),
        ("zero3", "deepspeed"),
    ],
)
def test_two_ranks(kind: str, strategy: str, tmp_path: Path) -> None:
    exact = strategy != "deepspeed"
    for result in run_ranks(train, 2, kind, tmp_path, deepspeed=not exact):
        assert result["strategy"] == strategy
        dtype = torch.float64 if exact else torch.float32
        expected = trainers.plain_loop(
            result["layers"], dtype, rates=result["rates"], count=trainers.LABELS
        )
        # Without AVX-512 a CPU rounds to 2.2e-5 of the plain loop.
        assert expected.relative_difference(result["unbroken"]) < (1e-9 if exact else 4e-5)
        if "scheduler" not in kind:
            assert result["rates"] == pytest.approx(trainers.linear_rates())
        assert len(set(result["rates"])) > 5  # DeepSpeed's own begins one step later
        assert result["norms"] == pytest.approx(expected.norms, rel=1e-4)
        for name, weight in result["unbroken"].items():
            assert torch.equal(result["again"][name], weight), name
