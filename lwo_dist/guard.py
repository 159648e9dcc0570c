"""While a hook is attached, nothing else trains its model.

What would do so without a word is an error at once: a backward pass that the hook did not start, a
step of an optimizer that holds the model's parameters, a forward pass inside DDP. So is, at the
next step, what changes the gradients or `requires_grad` behind the hook's back.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .handles import remove
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
        # No weak references: torch.utils.swap_tensors, which FSDP2's `to` uses, refuses those.
        self._named = named_parameters(module)
        self._parameters = {id(parameter): parameter for parameter in self._named.values()}
        self._allowed: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._ours = False
        self._trained: dict[str, nn.Parameter] = {}
        self._trained_ids: set[int] = set()
        self._gradients: dict[str, tuple[Tensor | None, int]] = {}
        self._reached = False
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
        self._end = weakref.finalize(self, remove, handles)

    def watch(self, names: Sequence[str]) -> None:
        """Watch the gradients of these parameters, which are trainable, and of no others."""
        remove(self._visit)
        self._trained = {name: self._named[name] for name in names}
        self._trained_ids = {id(parameter) for parameter in self._trained.values()}
        self._gradients = {}
        self._reached = False
        guard = weakref.ref(self)

        def after_gradient(_: Tensor) -> None:
            live = guard()
            if live is None:
                return
            if not live._ours:
                raise RuntimeError(
                    "a backward pass outside of lwo.backward() reached the parameters that are"
                    f" trained; {_REMEDY}"
                )
            live._reached = True

        every = max(1, len(names) // _WATCHED)
        self._visit = [
            self._named[name].register_post_accumulate_grad_hook(after_gradient)
            for name in names[::every]
        ]

    def drop_gradients(self) -> None:
        """Drop gradients from before a visit, which would be added to those of its first step."""
        for parameter in self._parameters.values():
            parameter.grad = None

    def note_gradients(self) -> None:
        """Remember the gradients that the last micro-batch of a step left."""
        self._gradients = {
            name: (parameter.grad, parameter.grad._version if parameter.grad is not None else 0)
            for name, parameter in self._trained.items()
        }

    def refuse_interference(self) -> None:
        """Refuse to update with other gradients than `lwo.backward` computed, or other flags.

        Raises:
            RuntimeError: with the parameter, what happened to it, and the remedy.
        """
        for name, (gradient, version) in self._gradients.items():
            now = self._trained[name].grad
            if now is not gradient:
                raise RuntimeError(
                    f"the gradient of {name} was dropped or replaced between lwo.backward() and"
                    " lwo.step(), which sets it to None itself; leave out zero_grad"
                )
            if now is not None and now._version != version:
                raise RuntimeError(
                    f"the gradient of {name} was changed in place between lwo.backward() and"
                    " lwo.step(); it may be this rank's alone. lwo.step(max_grad_norm=...) clips"
                )
        self._gradients = {}
        for key, parameter in self._parameters.items():
            if parameter.requires_grad != (key in self._trained_ids):
                name = next(n for n, p in self._named.items() if p is parameter)
                raise RuntimeError(
                    f"{name}.requires_grad was set to {parameter.requires_grad} after attach, which"
                    " sets it for each visit; freeze parameters before attach, or detach first"
                )

    def warn_if_unreached(self, layer: str) -> None:
        """Warn if backward has not come to `layer` since the last call."""
        if not self._reached:
            warnings.warn(
                f"the loss did not reach {layer}, which this step should train; compute it with"
                " lwo.model, after the last lwo.step()",
                stacklevel=3,
            )
        self._reached = False

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
        remove(self._visit)
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
