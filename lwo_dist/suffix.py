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
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from . import distributed
from .errors import UserError
from .layers import Visit, find_stacks
from .names import clean_name

__all__ = ["Sublayer", "SuffixBackward", "allot", "detached", "droppable", "find_sublayers"]

_LARGEST_RATE = 0.9
"""So that every sublayer passes its gradient at times, as in DropBP."""
_NOTHING = 1e-12
"""A cost below this share of the largest counts as that."""
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")
_TOLERANCE = 0.01
"""Of the residual's gradient, relative: bf16 rounds."""


@dataclass(frozen=True)
class Sublayer:
    """A part of a transformer layer whose output is added to the residual."""

    name: str
    module: nn.Module
    layer: nn.Module
    depth: int
    """Of its layer, as in `layers.Layer`."""
    place: int
    """Its index among the sublayers of its layer."""
    parameter_names: frozenset[str]


def find_sublayers(model: nn.Module) -> list[Sublayer]:
    """The children of each transformer layer that hold matrices, in the order of the model.

    Raises:
        UserError: an encoder-decoder, whose decoder gives the encoder a gradient by its sublayers
            only; a layer without such a child; a model without a stack of layers.
    """
    stacks = find_stacks(model)
    if len(stacks) > 1:
        raise _refusal(f"{type(model).__name__} is an encoder-decoder")
    first_name = {id(p): clean_name(name) for name, p in model.named_parameters()}
    found = []
    for index, layer in enumerate(stacks[0].modules):
        for wrapper in _WRAPPERS:
            layer = layer._modules.get(wrapper) or layer
        children = [
            (name, child)
            for name, child in layer.named_children()
            if any(_dimensions(parameter) > 1 for parameter in child.parameters())
        ]
        path = f"{clean_name(stacks[0].path)}.{index}"
        if not children:
            raise _refusal(f"{path} ({type(layer).__name__}) has no modules with matrices in it")
        found += [
            Sublayer(
                f"{path}.{name}",
                child,
                layer,
                stacks[0].first + index,
                place,
                frozenset(first_name[id(parameter)] for parameter in child.parameters()),
            )
            for place, (name, child) in enumerate(children)
        ]
    return found


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


@contextmanager
def detached(sublayers: Sequence[Sublayer]) -> Iterator[None]:
    """Forward passes inside drop all of these sublayers."""

    def detach(_: nn.Module, __: Any, output: Any) -> Any:
        return _with_hidden(output, _hidden_of(output).detach())

    handles = [sublayer.module.register_forward_hook(detach) for sublayer in sublayers]
    try:
        yield
    finally:
        _remove(handles)


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
        self.end: Callable[[], Any] = weakref.finalize(self, _remove, handles)
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
                raise _refusal(reason)
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
                _remove(hooks)
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
                own._tap(len(own._sublayers), _input_of(args, kwargs))

        def after_last(_: nn.Module, __: Any, output: Any) -> None:
            own = live()
            top = _hidden_of(output)
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
            self._reason, self._flops = _look(model, self._sublayers, args, kwargs)
            self._has_looked = True
        self._taps = []

    def _after_sublayer(self, i: int, output: Any) -> Any:
        if i in self._dropped:
            return _with_hidden(output, _hidden_of(output).detach())
        if self._is_measuring:
            self._tap(i, _hidden_of(output))
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


def _look(
    model: nn.Module, sublayers: Sequence[Sublayer], args: Any, kwargs: Any
) -> tuple[str | None, list[float]]:
    """Run the model once more, to see what its layers do with the outputs of their sublayers.

    With all of them detached, the gradient of a layer's output by its input must be the identity,
    up to a scale, and each sublayer's output must reach the layer's output by itself.

    Returns:
        Why not; and the FLOPs of each sublayer's backward pass through frozen matrices: once those
        of its forward pass, and of attention twice, or 2.5 times where the kernel computes its
        scores again.
    """
    if any(m._compiled_call_impl is not None or "_orig_mod" in m._modules for m in model.modules()):
        return "layers are compiled, which would be compiled again for each choice", []
    reasons: list[str] = []
    inputs: dict[nn.Module, Tensor] = {}
    outputs: dict[nn.Module, dict[str, Tensor]] = {}
    flops = [0.0] * len(sublayers)
    counter = FlopCounterMode(display=False, custom_mapping=_ON_CPU)
    started: dict[int, dict[Any, int]] = {}

    def before_layer(layer: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        hidden = _input_of(args, kwargs)
        torch.set_grad_enabled(True)
        if hidden is None:
            reasons.append(f"{_path(layer, sublayers)} does not get the hidden states first")
            return args, kwargs
        inputs[layer] = _fresh(hidden)
        outputs[layer] = {}
        return _with_input(args, kwargs, inputs[layer])

    def before_sublayer(i: int) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any) -> None:
            torch.set_grad_enabled(False)
            started[i] = _counts(counter)

        return hook

    def after_sublayer(i: int) -> Callable[..., Any]:
        def hook(_: nn.Module, __: Any, output: Any) -> Any:
            torch.set_grad_enabled(True)
            flops[i] += _backward_flops(_counts(counter), started.pop(i))
            hidden = _hidden_of(output)
            if not isinstance(hidden, Tensor):
                reasons.append(f"{sublayers[i].name} returns a {type(output).__name__}")
                return None
            leaf = _fresh(hidden)
            outputs.get(sublayers[i].layer, {})[sublayers[i].name] = leaf
            return _with_hidden(output, leaf)

        return hook

    def after_layer(layer: nn.Module, _: Any, output: Any) -> Any:
        hidden = _hidden_of(output)
        if layer in inputs and isinstance(hidden, Tensor):
            reason = _unsuited(inputs.pop(layer), outputs.pop(layer), hidden)
            if reason is not None:
                reasons.append(f"in {_path(layer, sublayers)} {reason}")
            output = _with_hidden(output, hidden.detach())
        torch.set_grad_enabled(False)
        return output

    handles: list[Any] = []
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        for i, sublayer in enumerate(sublayers):
            handles.append(sublayer.module.register_forward_pre_hook(before_sublayer(i)))
            handles.append(sublayer.module.register_forward_hook(after_sublayer(i)))
        for layer in dict.fromkeys(sublayer.layer for sublayer in sublayers):
            handles.append(layer.register_forward_pre_hook(before_layer, with_kwargs=True))
            # Before the strategy's own hooks, which would see a backward pass.
            handles.append(layer.register_forward_hook(after_layer, prepend=True))
        with torch.random.fork_rng(devices), torch.no_grad(), counter:
            model(*args, **kwargs)
    finally:
        _remove(handles)
    silent = [s.name for i, s in enumerate(sublayers) if not flops[i]]
    if silent and not reasons:
        reasons.append(f"{silent[0]} multiplies no matrices in the forward pass")
    return (reasons[0] if reasons else None), flops


def _unsuited(entry: Tensor, added: Mapping[str, Tensor], output: Tensor) -> str | None:
    """Why a layer is not its residual plus what its sublayers give; None if it is."""
    direction = torch.randn_like(output)
    gradients: Sequence[Tensor | None] = [None] * (1 + len(added))
    if output.requires_grad:
        gradients = torch.autograd.grad(
            output, [entry, *added.values()], direction, allow_unused=True
        )
    residual, *others = gradients
    for name, gradient in zip(added, others, strict=True):
        if gradient is None:
            return f"the output of {name.rpartition('.')[2]} is not added to the residual"
    if residual is None:
        return "the residual does not pass by the sublayers"
    expected = direction.double()
    scale = (residual.double() * expected).sum() / expected.square().sum()
    if not (residual.double() - scale * expected).norm() < _TOLERANCE * residual.double().norm():
        return "the residual does not reach the output unchanged"
    return None


def _fresh(hidden: Tensor) -> Tensor:
    """The start of a graph. Not a leaf: FlopCounterMode's hooks refuse to differentiate by one."""
    return hidden.detach().requires_grad_().view_as(hidden)


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    flops: int = sdpa_flop_count(query, key, value)
    return flops


_ON_CPU = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}
"""What FlopCounterMode does not know."""


def _counts(counter: FlopCounterMode) -> dict[Any, int]:
    return dict(counter.get_flop_counts().get("Global", {}))


def _backward_flops(now: Mapping[Any, int], before: Mapping[Any, int]) -> float:
    total = 0.0
    for operation, flops in now.items():
        name = str(operation)
        factor = 2.5 if "attention" in name else 2.0 if name.endswith("bmm") else 1.0
        total += factor * (flops - before.get(operation, 0))
    return total


def _path(layer: nn.Module, sublayers: Sequence[Sublayer]) -> str:
    return next(s.name.rpartition(".")[0] for s in sublayers if s.layer is layer)


def _refusal(reason: str) -> UserError:
    return UserError(
        f"lwo.suffix_backward: {reason}, so that its gradients cannot take the residual path alone;"
        " set it to 1.0"
    )


def _dimensions(parameter: Any) -> int:
    return len(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3 leaves empty tensors


def _hidden_of(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def _with_hidden(output: Any, hidden: Tensor) -> Any:
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def _input_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    found = args[0] if args else kwargs.get("hidden_states")
    return found if isinstance(found, Tensor) and found.is_floating_point() else None


def _with_input(args: Any, kwargs: Any, hidden: Tensor) -> tuple[Any, Any]:
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()
