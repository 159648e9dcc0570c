"""A share of the suffix's backward pass: `lwo.suffix_backward`, by the rule of DropBP.

A sublayer is what a transformer layer adds to its residual: its attention, its MLP. In a step in
which one is dropped, its output is detached: the forward pass is the same, and the gradient takes
the residual path only. That saves its backward pass, and the gradients below are approximations.

Source: Woo et al., "DropBP: Accelerating Fine-Tuning of Large Language Models by Dropping Backward
Propagation", NeurIPS 2024. What differs: sensitivities are changes of the gradients' norms where
the gradients reach the trained parts, not of the parameters' gradients, which sharding divides; and
the rates solve the paper's greedy allotment for infinitely small increments, so that they meet the
budget exactly.
"""

from __future__ import annotations

import math
import random
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import distributed
from .errors import UserError
from .handles import remove
from .layers import Visit
from .sublayers import (
    Sublayer,
    find_sublayers,
    hidden_of,
    input_of,
    look,
    refusal,
    with_hidden,
)

__all__ = ["SuffixBackward", "allot", "droppable"]

_LARGEST_RATE = 0.9
"""So that every sublayer passes its gradient at times, as in DropBP."""
_NOTHING = 1e-12
"""A cost below this share of the largest counts as that."""


def droppable(sublayers: Sequence[Sublayer], visit: Visit, *, drops_trained: bool) -> list[int]:
    """Indices of the sublayers that may be dropped in this visit.

    Above the active layer, those without trained parameters; with `drops_trained`, all.
    """
    trained = set(visit.parameter_names)
    return [
        i
        for i, sublayer in enumerate(sublayers)
        if drops_trained
        or (sublayer.depth > visit.depth and trained.isdisjoint(sublayer.parameter_names))
    ]


def allot(costs: Sequence[float], flops: Sequence[float], share: float) -> list[float]:
    """Drop rates: the less it changes the gradients to drop a sublayer, the more often it is.

    DropBP raises, in small increments, the rate whose cost x rate is smallest, until the budget is
    met. For infinitely small increments, rate = min(largest, level / cost), with the level at which
    sum(flops x rate) = (1 - share) x sum(flops): the expected share of the FLOPs is `share`
    exactly.

    Args:
        costs: squared changes of the gradients' norms, at least 0; all 0: not known.
        flops: what each costs in backward, above 0.
        share: of the FLOPs that is computed, in (0, 1].

    Returns:
        Probabilities, at most 0.9, or 1 - share where that is larger.
    """
    if not any(costs):
        return [1.0 - share] * len(costs)
    largest = max(_LARGEST_RATE, 1.0 - share)
    to_drop = (1.0 - share) * sum(flops)
    least = _NOTHING * max(costs)
    costs = [max(cost, least) for cost in costs]
    rates = [largest] * len(costs)
    # From the cheapest on: those whose rate would be too large have the largest, the others share.
    waiting = sorted(range(len(costs)), key=lambda i: costs[i])
    while waiting:
        level = to_drop / sum(flops[i] / costs[i] for i in waiting)
        if level <= largest * costs[waiting[0]]:
            for i in waiting:
                rates[i] = level / costs[i]
            break
        to_drop -= largest * flops[waiting.pop(0)]
    return rates


class SuffixBackward:
    """Drops sublayers of the suffix in each step, equally on all ranks and in every micro-batch.

    A step's choice is a function of the seed, the step and the sensitivities. These are measured
    once, in the first step in which the lowest visit is active and nothing is dropped; until then
    the rates are uniform. With a share of 1.0 nothing is registered and nothing is done.

    Args:
        module: the module with the parameters.
        visits: of one cycle.
        share: of the FLOPs of the suffix's backward pass that is computed, in expectation.
        drops_trained: sublayers with trained parameters too.

    Raises:
        UserError: a model whose structure says that it cannot be done; `before_backward` refuses
            what only a forward pass can tell.
    """

    def __init__(
        self,
        module: nn.Module,
        visits: Sequence[Visit],
        share: float,
        seed: int,
        *,
        drops_trained: bool = False,
    ):
        self._share = share
        self._seed = seed
        self._drops_trained = drops_trained
        self._lowest = min(visit.depth for visit in visits)
        self._sublayers = find_sublayers(module) if share < 1.0 else []
        self._dropped: Collection[int] = ()
        self._suffix: list[int] = []
        self._is_measuring = False
        self._is_accepted = False
        self._has_looked = False
        self._reason: str | None = "the loss comes from no forward pass of lwo.model"
        self._flops: list[float] = []  # of this rank's first forward pass
        self._taps: list[tuple[int, Tensor]] = []
        self._rows: list[float] | None = None  # squared norms, in the backward pass that measures
        self._measured: dict[str, Any] | None = None
        handles: list[Any] = []
        self.end: Callable[[], Any] = weakref.finalize(self, remove, handles)
        """Take the hooks out."""
        if self._sublayers:
            handles += self._register(module)

    # ---- a step

    def choose(self, step: int, visit: Visit) -> None:
        """Choose what is dropped in `step`."""
        if not self._sublayers:
            return
        self._suffix = droppable(self._sublayers, visit, drops_trained=self._drops_trained)
        self._is_measuring = self._measured is None and visit.depth == self._lowest
        self._dropped = () if self._is_measuring else self._draw(step, visit)

    def _draw(self, step: int, visit: Visit) -> set[int]:
        rates = self.rates(visit)
        numbers = random.Random(f"{self._seed}/suffix/{step}")
        draws = [numbers.random() for _ in self._sublayers]
        dropped = {i for i in self._suffix if draws[i] < rates[i]}
        if self._drops_trained and len(dropped) == len(self._suffix):
            # Adapters have a gradient only where a sublayer passes one.
            dropped.remove(min(dropped, key=lambda i: rates[i]))
        return dropped

    def rates(self, visit: Visit) -> dict[int, float]:
        """Index of a sublayer -> the probability that a step of this visit drops it."""
        suffix = droppable(self._sublayers, visit, drops_trained=self._drops_trained)
        if self._measured is None:
            return dict.fromkeys(suffix, 1.0 - self._share)
        trained = set(visit.parameter_names)
        reached = [
            j
            for j, sublayer in enumerate(self._sublayers)
            if not trained.isdisjoint(sublayer.parameter_names)
        ]
        if visit.depth == 0:
            reached.append(len(self._sublayers))  # the input of the first layer
        changes = self._measured["changes"]
        costs = [sum(changes[i][j] for j in reached) for i in suffix]
        flops = [self._measured["flops"][i] for i in suffix]
        return dict(zip(suffix, allot(costs, flops, self._share), strict=True))

    def before_backward(self) -> None:
        """Call it before each backward pass, on all ranks.

        Raises:
            UserError: on all ranks, before the first one, if the model is not suited.
        """
        if not self._sublayers:
            return
        if not self._is_accepted:
            reason = distributed.first_reason(self._reason)
            if reason is not None:
                raise refusal(reason)
            self._is_accepted = True
        self._rows = [] if self._is_measuring else None  # in the first micro-batch of the step
        self._is_measuring = False

    def after_backward(self, device: torch.device) -> None:
        """Call it after each backward pass, on all ranks."""
        if self._rows is None:
            return
        size = len(self._sublayers) + 1
        own = self._rows or [0.0] * (size * (1 + len(self._suffix)))
        self._rows = None
        sums = [
            sum(v)
            for v in zip(*distributed.gather_floats([*self._flops, *own], device), strict=True)
        ]
        if not all(map(math.isfinite, sums)):
            return  # the next step of the lowest visit tries again
        flops = sums[: len(self._sublayers)]
        norms = [math.sqrt(square) for square in sums[len(self._sublayers) :]]
        whole = norms[:size]
        changes = [[0.0] * size for _ in self._sublayers]
        for number, i in enumerate(self._suffix, 1):
            without = norms[number * size :][:size]
            changes[i] = [(a - b) ** 2 for a, b in zip(whole, without, strict=True)]
        self._measured = {"flops": flops, "changes": changes}

    # ---- sensitivities

    def _measure(self, top: Tensor, gradient: Tensor) -> None:
        """One backward pass for each sublayer, which drops that one, and one that drops none.

        They start where the backward pass of the step is now: at the output of the last layer. The
        strategy sees no pass of its own, and no parameter a gradient. The norms are taken at the
        output of each sublayer and at the input of the first layer.
        """
        taps, self._taps = self._taps, []
        if self._rows is None or not taps:
            return  # not in `lwo.backward`, or in one of the passes below
        lowest = min(self._depth_of(place) for place, _ in taps)
        inputs = [tensor for place, tensor in taps if self._depth_of(place) == lowest]
        for dropped in [None, *self._suffix]:
            squares = torch.zeros(
                len(self._sublayers) + 1, dtype=torch.float64, device=gradient.device
            )
            hooks = [
                tensor.register_hook(partial(_record, squares, place, place == dropped))
                for place, tensor in taps
            ]
            try:
                torch.autograd.grad(top, inputs, gradient, retain_graph=True, allow_unused=True)
            finally:
                remove(hooks)
            self._rows += squares.tolist()

    def _depth_of(self, place: int) -> int:
        return self._sublayers[place].depth if place < len(self._sublayers) else 0

    # ---- state

    def state(self) -> dict[str, Any] | None:
        """What was measured, for JSON; None before that.

        `flops`: of each sublayer; `changes[i][j]`: the squared change of the gradient's norm at the
        output of sublayer j, or at the input of the first layer, when sublayer i is dropped.
        """
        return self._measured

    def load(self, state: Mapping[str, Any] | None) -> None:
        """Restore `state`. Call `choose` next.

        Raises:
            UserError: it belongs to another model.
        """
        if not self._sublayers:
            return
        if state is not None:
            size = len(self._sublayers)
            if len(state["flops"]) != size or {len(row) for row in state["changes"]} != {size + 1}:
                raise UserError(
                    f"the state has sensitivities of {len(state['flops'])} sublayers, and the model"
                    f" has {size}; resume with the model that it was saved with"
                )
        self._measured = dict(state) if state is not None else None

    # ---- hooks

    def _register(self, module: nn.Module) -> Iterator[Any]:
        live = weakref.ref(self)

        def before_model(model: nn.Module, args: Any, kwargs: Any) -> None:
            own = live()
            if own is not None and torch.is_grad_enabled():
                own._before_model(model, args, kwargs)

        def after_sublayer(i: int) -> Callable[..., Any]:
            def hook(_: nn.Module, __: Any, output: Any) -> Any:
                own = live()
                return None if own is None else own._after_sublayer(i, output)

            return hook

        def before_first(_: nn.Module, args: Any, kwargs: Any) -> None:
            own = live()
            if own is not None and own._is_measuring:
                own._tap(len(own._sublayers), input_of(args, kwargs))

        def after_last(_: nn.Module, __: Any, output: Any) -> None:
            own = live()
            top = hidden_of(output)
            if own is not None and own._is_measuring and top.requires_grad:
                top.register_hook(partial(own._measure, top))

        yield module.register_forward_pre_hook(before_model, with_kwargs=True, prepend=True)
        first = self._sublayers[0].layer
        yield first.register_forward_pre_hook(before_first, with_kwargs=True)
        # Before FSDP2's, which gathers the layer's weights for the pass that goes on.
        yield self._sublayers[-1].layer.register_forward_hook(after_last, prepend=True)
        for i, sublayer in enumerate(self._sublayers):
            yield sublayer.module.register_forward_hook(after_sublayer(i))

    def _before_model(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        if not self._has_looked:
            found = look(model, self._sublayers, args, kwargs)
            self._reason = found.reason
            self._flops = found.flops
            self._has_looked = True
        self._taps = []

    def _after_sublayer(self, i: int, output: Any) -> Any:
        if i in self._dropped:
            return with_hidden(output, hidden_of(output).detach())
        if self._is_measuring:
            self._tap(i, hidden_of(output))
        return None

    def _tap(self, place: int, tensor: Tensor | None) -> None:
        if tensor is not None and tensor.requires_grad:
            self._taps.append((place, tensor))


def _record(squares: Tensor, place: int, is_dropped: bool, gradient: Tensor) -> Tensor | None:
    """Add the squared norm of a gradient, or stop it."""
    if is_dropped:
        return torch.zeros_like(gradient)
    squares[place] += torch.linalg.vector_norm(gradient, dtype=torch.float64).square()
    return None
