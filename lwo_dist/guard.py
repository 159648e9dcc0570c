"""While a hook is attached, nothing else trains its model.

What would do so without a word is an error at once: a backward pass that the hook did not start, a
step of an optimizer that holds the model's parameters, a forward pass inside DDP.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .names import named_parameters

__all__ = ["Guard"]

_REMEDY = (
    "call lwo.backward(loss) and lwo.step() instead, or lwo.detach() before something else trains"
    " the model"
)
_WATCHED = 8  # parameters of a visit: each costs a call from autograd in every backward pass


class Guard:
    """Watches the parameters of `module` until `end`, or until it is no longer referenced."""

    def __init__(self, module: nn.Module):
        self._module = module
        # No weak references: torch.utils.swap_tensors, which FSDP2's `to` uses, refuses those.
        self._parameters = {id(parameter): parameter for parameter in module.parameters()}
        self._allowed: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._ours = False
        self._visit: list[Any] = []
        guard = weakref.ref(self)

        def before_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            live = guard()
            if live is not None:
                live._refuse_optimizer(optimizer)

        handles = [
            module.register_forward_pre_hook(_refuse_ddp),
            register_optimizer_step_pre_hook(before_step),
        ]
        self._end = weakref.finalize(self, _remove, handles)

    def watch(self, names: Sequence[str]) -> None:
        """Watch the gradients of these parameters, which are trainable, and of no others."""
        _remove(self._visit)
        parameters = named_parameters(self._module) if names else {}
        guard = weakref.ref(self)

        def after_gradient(_: Tensor) -> None:
            live = guard()
            if live is not None and not live._ours:
                raise RuntimeError(
                    "a backward pass outside of lwo.backward() reached the parameters that are"
                    f" trained; {_REMEDY}"
                )

        every = max(1, len(names) // _WATCHED)
        self._visit = [
            parameters[name].register_post_accumulate_grad_hook(after_gradient)
            for name in names[::every]
        ]

    def allow(self, optimizer: torch.optim.Optimizer) -> None:
        """Let this optimizer hold parameters of the model and be stepped."""
        self._allowed.add(optimizer)

    @contextmanager
    def ours(self) -> Iterator[None]:
        """What happens inside is the hook's own doing."""
        self._ours = True
        try:
            yield
        finally:
            self._ours = False

    def end(self) -> None:
        _remove(self._visit)
        self._end()

    def _refuse_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        if self._ours or optimizer in self._allowed:
            return
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) in self._parameters:
                    raise RuntimeError(
                        f"an optimizer ({type(optimizer).__name__}) that holds parameters of the"
                        f" model was stepped while lwo_dist trains it; {_REMEDY}"
                    )


def _refuse_ddp(module: nn.Module, _: Any) -> None:
    # What runs its forward pass now, in torch 2.11 to 2.13.
    active: nn.Module | None = getattr(DistributedDataParallel, "_active_ddp_module", None)
    if active is not None and any(inner is module for inner in active.modules()):
        raise RuntimeError(
            "the model was wrapped in DistributedDataParallel after attach; call lwo.model for the"
            " forward pass: the strategy reduces gradients itself"
        )


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()
