"""Models that no strategy can train, and hidden costs to warn about before training starts."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DataParallel, DistributedDataParallel

from lwo_dist import distributed
from lwo_dist.errors import UserError

from .base import Strategy

__all__ = ["end_backward_at_active_layer", "refuse_wrapped", "warn_of_frozen", "warn_of_rounding"]


def refuse_wrapped(model: nn.Module) -> None:
    """Refuse models that no strategy can train.

    Raises:
        UserError: a DDP, DataParallel or FSDP1 wrapper, or checkpointing that re-enters autograd.
    """
    if isinstance(model, DistributedDataParallel | DataParallel):
        raise UserError(
            f"the model is wrapped in {type(model).__name__}, whose reducer is built for a fixed"
            " set of trainable parameters; pass the bare module (model.module): the replicate"
            " strategy reduces gradients itself"
        )
    if any(isinstance(m, FullyShardedDataParallel) for m in model.modules()):
        raise UserError(
            "the model is wrapped in FSDP1 (FullyShardedDataParallel); wrap it with FSDP2's"
            " fully_shard"
        )
    if any(isinstance(m, FSDPModule) for m in model.modules()) and not isinstance(
        model, FSDPModule
    ):
        raise UserError(
            "fully_shard was called on submodules but not on the root; call it on the root"
            " module too"
        )
    for name, module in model.named_modules():
        checkpoint = getattr(module, "_gradient_checkpointing_func", None)
        if getattr(module, "gradient_checkpointing", False) and getattr(
            checkpoint, "keywords", {}
        ).get("use_reentrant"):
            raise UserError(
                f"activation checkpointing of {name} is reentrant, which loses the active layer's"
                " gradients; call"
                ' gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant":'
                " False})"
            )


def end_backward_at_active_layer(model: nn.Module) -> bool:
    """Undo `enable_input_require_grads`, which makes backward run through the whole frozen prefix.

    Returns whether there was anything to undo. transformers enables it along with activation
    checkpointing, but only the reentrant form needs it. Called twice it loses track of its first
    hooks, so they are looked up on the modules themselves.
    """
    found = False
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__name__", "").startswith("make_inputs_require_grad"):
                del module._forward_hooks[key]
                found = True
    disable = getattr(model, "disable_input_require_grads", None)
    if disable is not None:
        disable()
    return found


def warn_of_frozen(flags: Mapping[str, bool]) -> None:
    """Say which parameters stay as they are, as the caller has frozen them."""
    frozen = [name for name, flag in flags.items() if not flag]
    if frozen and distributed.rank() == 0:
        warnings.warn(
            f"{len(frozen)} of {len(flags)} parameters are frozen (requires_grad = False, first"
            f" {frozen[0]}) and stay as they are; to train them, set requires_grad before attach",
            stacklevel=4,
        )


def warn_of_rounding(strategy: Strategy, lr: float, steps_per_layer: int) -> None:
    """Warn about the cost of `inactive_master: discard`.

    A visit moves a weight by up to lr per step, and bf16 rounds it afterwards.

    Raises:
        UserError: the weights are stored in fp32, so there is nothing to discard.
    """
    if not strategy.stores_16_bit:
        raise UserError(
            "inactive_master: discard has no effect where weights are stored in fp32; drop it, or"
            " store them in bf16"
        )
    shards = [shard.flatten() for shard in strategy.masters() if shard.numel()]
    size = float(torch.cat(shards).abs().median()) if shards else 0.0
    if distributed.rank() == 0 and size > 0:
        reach = steps_per_layer * lr
        half_ulp = 2.0 ** (math.floor(math.log2(size)) - 8)
        warnings.warn(
            "inactive_master: discard rounds a layer to bf16 at the end of its visit, and what"
            f" moved by less than its half ulp is lost: steps_per_layer x lr = {reach:.1e} is"
            f" {reach / half_ulp:.2g} times that at a typical weight ({half_ulp:.1e} at"
            f" {size:.1g}); stay well above 1, or park the masters (inactive_master: host)",
            stacklevel=4,
        )
