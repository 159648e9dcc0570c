"""Models that no strategy can train, and hidden costs to warn about before training starts."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    CheckpointWrapper,
)
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DataParallel, DistributedDataParallel

from lwo_dist import distributed
from lwo_dist.config import LWOConfig
from lwo_dist.errors import UserError
from lwo_dist.layers import Visit, find_stacks
from lwo_dist.names import clean_name

from .base import Strategy

__all__ = [
    "CheckpointingWatch",
    "is_compiled",
    "refuse_compiled",
    "refuse_head_rows",
    "refuse_stateless",
    "refuse_stateless_in_16_bit",
    "refuse_update_in_backward",
    "refuse_wrapped",
    "warn_of_frozen",
    "warn_of_rounding",
]


def refuse_wrapped(model: nn.Module) -> None:
    """Refuse models that no strategy can train.

    Raises:
        UserError: a DDP, DataParallel or FSDP1 wrapper, parameters on the meta device, or
            checkpointing that re-enters autograd.
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
        refuse_compiled(model)  # its wrapper hides the root
        raise UserError(
            "fully_shard was called on submodules but not on the root; call it on the root"
            " module too"
        )
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise UserError(
                f"{name} is on the meta device, without values; call to_empty and load the weights"
                " before attach"
            )
    _refuse_reentrant(model, _noticeable(model))


def refuse_compiled(model: nn.Module) -> None:
    """Refuse a model whose stack of layers is compiled in one piece: that is a graph per visit.

    Raises:
        UserError: `torch.compile` was called on the model, or on a part with all of its layers.
    """
    if not any(is_compiled(module) for module in model.modules()):
        return
    stacks = {stack.modules: stack.path for stack in find_stacks(model)}
    for name, module in model.named_modules():
        name = clean_name(name)
        inside = [stacks[part] for part in module.modules() if part in stacks]
        if is_compiled(module) and inside:
            raise UserError(
                f"torch.compile was called on {name or 'the model'} as a whole: each visit would"
                " need a graph of its own, and dynamo stops at its recompile_limit; compile each"
                f" layer instead: for layer in model.{clean_name(inside[0])}: layer.compile()"
            )


def is_compiled(module: nn.Module) -> bool:
    """By `module.compile()`, or the wrapper that `torch.compile(module)` returns."""
    return module._compiled_call_impl is not None or "_orig_mod" in module._modules


class CheckpointingWatch:
    """Activation checkpointing may be switched on at any time: look before each forward pass.

    The pass raises UserError if checkpointing has become reentrant. `enable_input_require_grads`,
    which would make backward run through the whole frozen prefix, is undone: transformers calls it
    along with checkpointing, though only the reentrant form needs it.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._undone = _end_backward_at_active_layer(model, _noticeable(model))
        self._hook = model.register_forward_pre_hook(self._look, prepend=True)

    def end(self) -> None:
        """Give the model back as its owner would have it."""
        self._hook.remove()
        enable: Any = getattr(self._model, "enable_input_require_grads", None)
        if self._undone and enable is not None:
            enable()

    def _look(self, model: nn.Module, _: Any) -> None:
        if not torch.is_grad_enabled():
            return  # such as for each token of an answer
        modules = _noticeable(model)
        _refuse_reentrant(model, modules)
        self._undone = _end_backward_at_active_layer(model, modules) or self._undone


def _refuse_reentrant(model: nn.Module, modules: Sequence[nn.Module]) -> None:
    if not any(_remedy(module) for module in modules):
        return
    for name, module in model.named_modules():
        if remedy := _remedy(module):
            raise UserError(
                f"activation checkpointing of {name} is reentrant, which loses the active layer's"
                f" gradients; {remedy}"
            )


def _remedy(module: nn.Module) -> str | None:
    """What to do instead, if the module is checkpointed in the reentrant way."""
    if isinstance(module, CheckpointWrapper):
        if module.checkpoint_impl is CheckpointImpl.REENTRANT or _re_enters(module.checkpoint_fn):
            return "use checkpoint_wrapper(module, checkpoint_impl=CheckpointImpl.NO_REENTRANT)"
        return None
    # As transformers sets it: `getattr` on a module without the attribute is slow.
    if module.__dict__.get("gradient_checkpointing") and _re_enters(
        getattr(module, "_gradient_checkpointing_func", None)
    ):
        return (
            'call gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant":'
            " False})"
        )
    return None


def _re_enters(checkpoint: Any) -> bool:
    return isinstance(checkpoint, partial) and bool(checkpoint.keywords.get("use_reentrant"))


def _end_backward_at_active_layer(model: nn.Module, modules: Sequence[nn.Module]) -> bool:
    """Undo `enable_input_require_grads`; returns whether there was anything to undo.

    Called twice it loses track of its first hooks, so they are looked up on the modules themselves.
    """
    found = False
    for module in modules:
        for key, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__name__", "").startswith("make_inputs_require_grad"):
                del module._forward_hooks[key]
                found = True
    disable = getattr(model, "disable_input_require_grads", None)
    if found and disable is not None:
        disable()
    return found


def _noticeable(model: nn.Module) -> list[nn.Module]:
    """The modules that have a forward hook, or may be checkpointed.

    In one loop without calls: a model with adapters has thousands of modules, and
    `model.modules()`, which makes a name for each, would take milliseconds of every forward pass.
    """
    found = []
    waiting: list[nn.Module | None] = [model]
    while waiting:
        module = waiting.pop()
        if module is None:
            continue
        own = module.__dict__
        if module._forward_hooks or "gradient_checkpointing" in own or "checkpoint_impl" in own:
            found.append(module)
        if module._modules:
            waiting += module._modules.values()
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


def refuse_stateless(strategy: str, updates_whole_layers: bool, visits: Sequence[Visit]) -> None:
    """Refuse layers without optimizer state where no rank can have a matrix's whole gradient.

    Raises:
        UserError: with the remedy.
    """
    named = next((visit.stateless[0].name for visit in visits if visit.stateless), None)
    if named is not None and not updates_whole_layers:
        raise UserError(
            f"{named} is to be updated without optimizer state (lwo.stateless), but under strategy:"
            f" {strategy} no rank has the whole gradient of a matrix; set strategy: fsdp or"
            " replicate, or lwo.stateless: none"
        )


def refuse_update_in_backward(
    strategy: str, updates_in_backward: bool, config: LWOConfig, visits: Sequence[Visit]
) -> None:
    """Refuse `lwo.stateless_update: backward` where it cannot be honoured or changes nothing.

    Raises:
        UserError: with the remedy.
    """
    if config.stateless_update == "step":
        return
    if not any(visit.stateless for visit in visits):
        raise UserError(
            f"stateless_update: backward has no effect with stateless: {config.stateless}; set"
            " stateless: suffix or all, or drop it"
        )
    if not updates_in_backward:
        raise UserError(
            f"stateless_update: backward cannot be used with strategy: {strategy}; set strategy:"
            " replicate, or stateless_update: step"
        )


def refuse_head_rows(strategy: str, masks_rows: bool, config: LWOConfig) -> None:
    """Refuse `lwo.head_rows: batch` where nobody can change a gradient before its update.

    Raises:
        UserError: with the remedy.
    """
    if config.head_rows == "batch" and not masks_rows:
        raise UserError(
            f"head_rows: batch cannot be used with strategy: {strategy}; set strategy: fsdp or"
            " replicate, or head_rows: all"
        )


def refuse_stateless_in_16_bit(strategy: Strategy, visits: Sequence[Visit]) -> None:
    """Refuse layers without optimizer state whose updates would be rounded away.

    Raises:
        UserError: with the remedy.
    """
    named = next((visit.stateless[0].name for visit in visits if visit.stateless), None)
    if named is not None and strategy.stores_16_bit:
        raise UserError(
            f"{named} is to be updated without optimizer state (lwo.stateless), but its weights are"
            " stored in 16 bits; load the model with dtype=torch.float32, or set lwo.stateless:"
            " none"
        )
