"""A run of the hook on one rank, with the model of the oracle; called inside `run_ranks`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import lwo_dist
from lwo_dist.hook import LWO
from lwo_dist.strategies.fsdp.builder import shard_model
from lwo_dist.training.visits import Visits
from tests import oracle


def attach(
    strategy: str,
    recipe: oracle.Recipe,
    *,
    tied: bool,
    dtype: torch.dtype,
    method: str = "lwo",
    precision: str = "fp32",
    model: nn.Module | None = None,
    **config: Any,
) -> LWO:
    """`model`: instead of the oracle's, which has `tied` and `dtype`."""
    model = model or oracle.tiny_model(tied=tied, dtype=dtype)
    if strategy == "fsdp":
        shard_model(model, precision=precision, device_type="cpu")
    lwo_config = lwo_dist.LWOConfig(
        lr=recipe.lr,
        eps=recipe.eps,
        weight_decay=0.01,
        max_grad_norm=recipe.max_grad_norm,
        steps_per_layer=recipe.steps_per_layer,
        gradient_accumulation_steps=recipe.accumulation,
        **config,
    )
    return lwo_dist.attach(model, lwo_config, method)


def micro_batches(step: int, accumulation: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """This rank's share of the oracle's global batch."""
    tokens, labels = oracle.global_batch(step)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    parts = zip(
        tokens.chunk(world_size * accumulation),
        labels.chunk(world_size * accumulation),
        strict=True,
    )
    return list(parts)[rank * accumulation : (rank + 1) * accumulation]


def follow(lwo: LWO) -> Visits:
    """To give to `train_step`: follows the visits of `lwo` as the trainer's meter does."""
    visits = Visits(lwo, torch.device("cpu"), time.perf_counter)
    lwo.before_switch = visits.before_switch
    return visits


def train_step(
    lwo: LWO, step: int, visits: Visits | None = None
) -> tuple[float, lwo_dist.StepReport]:
    """One optimizer step; returns the loss of the global batch."""
    accumulation = lwo.config.gradient_accumulation_steps
    tokens_in_batch = (oracle.global_batch(step)[1][:, 1:] != -100).sum()
    total = torch.zeros((), dtype=torch.float64)
    if visits is not None:
        visits.begin_step()
    for tokens, labels in micro_batches(step, accumulation):
        loss = oracle.loss_sum(lwo.model, tokens, labels)
        total += loss.detach()
        lwo.backward(loss * dist.get_world_size() * accumulation / tokens_in_batch)
        report = lwo.step()
    if visits is not None:
        visits.after_step(total / tokens_in_batch, report)
    dist.all_reduce(total)
    return (total / tokens_in_batch).item(), report


def weights(lwo: LWO) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for layer in [*lwo.layers, lwo.rest]
        for name, tensor in lwo.read_layer(layer).items()
    }


def train(
    lwo: LWO, steps: int, each_step: Callable[[LWO, int], None] | None = None
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses, and the whole weights at the end."""
    losses = []
    for step in range(steps):
        losses.append(train_step(lwo, step)[0])
        if each_step is not None:
            each_step(lwo, step)
    return losses, weights(lwo)
