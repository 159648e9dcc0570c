"""`precision: bf16` computes in bf16, whatever the strategy; weights, gradients and reductions stay
fp32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lwo_dist
from lwo_dist.config import ModelConfig, TrainConfig
from tests import oracle
from tests.distributed.collectives import CountCollectives
from tests.distributed.training import micro_batches, train
from tests.loading import load_model
from tests.models import save_tiny_model
from tests.ranks import run_ranks


def train_in(precision: str, strategy: str, folder: Path) -> tuple[list[float], set, set, int]:
    train_config = TrainConfig(precision=precision)  # type: ignore[arg-type]
    model = load_model(ModelConfig(name=str(folder)), train_config, strategy=strategy)
    lwo = lwo_dist.attach(model, lwo_dist.LWOConfig(lr=1e-3, steps_per_layer=5))
    computed: set[torch.dtype] = set()
    projection = model.get_submodule("model.layers.1.mlp.down_proj")

    def note(module: Any, inputs: Any, output: torch.Tensor) -> None:
        computed.add(output.dtype)
        # It would keep bf16 copies of all trained weights.
        assert not (torch.is_autocast_enabled("cpu") and torch.is_autocast_cache_enabled())

    projection.register_forward_hook(note)
    losses, weights = train(lwo, 40)
    tokens, labels = micro_batches(40, 1)[0]
    with CountCollectives() as counter:
        lwo.backward(oracle.loss_sum(lwo.model, tokens, labels))
        stored = {p.grad.dtype for p in model.parameters() if p.grad is not None} | {
            t.dtype for t in weights.values()
        }
        lwo.step()
    return (
        losses,
        computed,
        stored,
        max(size for kind, size in counter.calls if kind == "reduce_scatter"),
    )


@pytest.mark.parametrize("strategy", ["replicate", "fsdp"])
def test_bf16_follows_fp32(strategy: str, tmp_path: Path) -> None:
    save_tiny_model(tmp_path, ["def f(x):\n    return x\n"])
    exact, computed, _, reduced = run_ranks(train_in, 2, "fp32", strategy, tmp_path)[0]
    assert computed == {torch.float32}
    losses, computed, stored, reduced_bf16 = run_ranks(train_in, 2, "bf16", strategy, tmp_path)[0]
    assert computed == {torch.bfloat16} and stored == {torch.float32}
    assert reduced == reduced_bf16  # bytes: the reduction is in fp32 either way
    assert losses != exact
    assert all(abs(a - b) < 0.02 * b for a, b in zip(losses, exact, strict=True))
