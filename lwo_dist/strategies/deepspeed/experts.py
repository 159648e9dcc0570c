"""Mixtures of experts under ZeRO-3, which must fetch a block of experts whole.

ZeRO-3 gathers a module's weights when it is called, all ranks together. Which experts are called,
and how often, depends on a rank's tokens: the ranks then gather different things, and hang or
abort. DeepSpeed's remedy is to gather a block with all that it holds, as a "leaf module".
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from deepspeed.utils import set_z3_leaf_module, z3_leaf_module
from torch import nn

from lwo_dist.errors import UserError

__all__ = ["fetch_experts_whole", "refuse_loose_experts"]

# What the experts of transformers >= 5 take beside the hidden states. That a module holds stacked
# matrices says too little: Zamba's Mamba does, and a leaf module whose input needs no gradient is
# reduced too early.
_ROUTING = {"top_k_index", "top_k_weights"}


def fetch_experts_whole(model: nn.Module) -> None:
    """Make each block of experts a leaf module; only before `deepspeed.initialize`."""
    for _, experts in _experts(model):
        set_z3_leaf_module(experts, True)


def refuse_loose_experts(model: nn.Module) -> None:
    """Refuse the model of a ZeRO-3 engine that gathers some experts one by one.

    Raises:
        UserError: with the block's name and the remedy.
    """
    leaves = {part for m in model.modules() if z3_leaf_module(m) for part in m.modules()}
    for name, experts in _experts(model):
        if experts not in leaves:
            raise UserError(
                f"ZeRO-3 would fetch parts of {name} as this rank's tokens choose experts, and the"
                " ranks would wait for each other; call lwo_dist.prepare(model, config) before"
                " deepspeed.initialize"
            )


def _experts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if set(inspect.signature(module.forward).parameters) >= _ROUTING:
            yield name, module
