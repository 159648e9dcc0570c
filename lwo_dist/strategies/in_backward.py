"""Updates layers without optimizer state during the backward pass (`stateless_update: backward`).

A matrix is updated as soon as it has its gradient, which is then dropped.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from lwo_dist.errors import UserError
from lwo_dist.handles import remove
from lwo_dist.orthogonal import update_without_state

__all__ = ["UpdateInBackward", "refuse_several_processes"]


def refuse_several_processes(count: int) -> None:
    """Raise UserError if there may be more than one process, for `stateless_update: backward`."""
    if count > 1:
        raise UserError(
            "stateless_update: backward works with one process only, and this run may have"
            f" {count}: gradients would have to be summed in the middle of the backward pass; set"
            " stateless_update: step, or strategy: fsdp, which divides gradients among the ranks"
        )


class UpdateInBackward:
    """Hooks on parameters, until `end` or until nothing refers to this object.

    Args:
        weights: the parameters without state; vectors are left as they are.
        others: those with state, whose gradients are only checked.

    Attributes:
        non_finite: 0-dim; NaN if the loss or a gradient of the last pass was not finite. After the
            first such gradient, nothing more is updated.
    """

    def __init__(
        self, weights: Sequence[nn.Parameter], others: Sequence[nn.Parameter], weight_decay: float
    ):
        self._matrices = [weight for weight in weights if weight.dim() >= 2]
        self._weight_decay = weight_decay
        self._running = False
        self._failed = False
        self._updated: set[int] = set()
        self._lr = 0.0
        self.non_finite = torch.zeros(())
        own = weakref.ref(self)
        handles = [
            parameter.register_post_accumulate_grad_hook(partial(_call, own, what))
            for what, parameters in (
                (UpdateInBackward._use_up, weights),
                (UpdateInBackward._check, others),
            )
            for parameter in parameters
        ]
        self.end = weakref.finalize(self, remove, handles)

    @contextmanager
    def running(self, loss: Tensor, lr: float) -> Iterator[None]:
        """The backward pass of `loss` runs inside, with the rate `lr`.

        Raises:
            RuntimeError: the last pass failed, and had updated some layers.
        """
        if self._failed:
            raise RuntimeError(
                "a backward pass failed after it had updated some layers (lwo.stateless_update:"
                " backward), and cannot be repeated; load a checkpoint and attach again"
            )
        self.non_finite = 0.0 * loss.detach()
        self._lr = lr
        self._updated = set()
        self._running = True
        try:
            yield
        except BaseException:
            self._failed = bool(self._updated)
            raise
        finally:
            self._running = False
        self._decay_unreached()

    def _use_up(self, weight: nn.Parameter) -> None:
        if not self._running:
            raise RuntimeError(
                "a backward pass outside of lwo.backward() reached parameters that it would have"
                " updated; call lwo.backward(loss) and lwo.step() instead, or lwo.detach() before"
                " something else trains the model"
            )
        self._check(weight)
        gradient, weight.grad = weight.grad, None
        assert gradient is not None
        if weight.dim() >= 2:
            self._update(weight, gradient)

    def _check(self, parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        self.non_finite = self.non_finite + 0.0 * parameter.grad.norm()

    def _update(self, weight: nn.Parameter, gradient: Tensor) -> None:
        self._updated.add(id(weight))
        skipped = (~self.non_finite.isfinite()).to(torch.float32)
        update_without_state([weight.detach()], [gradient], self._lr, self._weight_decay, skipped)

    def _decay_unreached(self) -> None:
        """Decay matrices without a gradient, such as those of an expert that got no tokens."""
        if self._weight_decay:
            for weight in self._matrices:
                if id(weight) not in self._updated:
                    self._update(weight, torch.zeros_like(weight))


def _call(
    own: weakref.ref[UpdateInBackward],
    what: Callable[[UpdateInBackward, nn.Parameter], None],
    parameter: nn.Parameter,
) -> None:
    live = own()
    if live is not None:
        what(live, parameter)
