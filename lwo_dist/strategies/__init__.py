"""How a layer lives on the ranks: the strategy that fits what the user has."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DataParallel, DistributedDataParallel

from lwo_dist.config import UserError
from lwo_dist.layers import Layer

from .base import Strategy, Update
from .fsdp import FullyShard
from .replicate import Replicate

__all__ = ["Strategy", "Update", "choose_strategy", "refuse_wrapped"]


def choose_strategy(model: nn.Module, layers: Sequence[Layer], accumulation: int) -> Strategy:
    """`fsdp` for a `fully_shard`ed model, `replicate` for a plain one."""
    kind = FullyShard if isinstance(model, FSDPModule) else Replicate
    return kind(model, layers, accumulation)


def refuse_wrapped(model: nn.Module) -> None:
    """Refuse what no strategy can drive.

    Raises:
        UserError: a DDP, DataParallel, FSDP1 or DeepSpeed wrapper, or checkpointing that re-enters autograd.
    """
    if isinstance(model, DistributedDataParallel | DataParallel):
        raise UserError(
            f"the model is wrapped in {type(model).__name__}, whose reducer is built for a fixed set of trainable "
            "parameters; pass the bare module (model.module): the replicate strategy reduces gradients itself"
        )
    if any(isinstance(m, FullyShardedDataParallel) for m in model.modules()):
        raise UserError("the model is wrapped in FSDP1 (FullyShardedDataParallel); wrap it with FSDP2's fully_shard")
    if type(model).__name__ == "DeepSpeedEngine":
        raise UserError("DeepSpeed engines are not supported yet; pass the bare module, plain or fully_shard'ed")
    if any(isinstance(m, FSDPModule) for m in model.modules()) and not isinstance(model, FSDPModule):
        raise UserError("fully_shard was called on submodules but not on the root; call it on the root module too")
    for name, module in model.named_modules():
        checkpoint = getattr(module, "_gradient_checkpointing_func", None)
        if getattr(module, "gradient_checkpointing", False) and getattr(checkpoint, "keywords", {}).get(
            "use_reentrant"
        ):
            raise UserError(
                f"activation checkpointing of {name} is reentrant, which loses the active layer's gradients; call "
                'gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})'
            )
