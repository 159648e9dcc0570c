"""The sublayers of a model's transformer layers, and whether their outputs are only added.

A sublayer is what a transformer layer adds to its residual: its attention, its MLP. They are found
by structure, and what a layer does with their outputs by running the model once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .errors import UserError
from .handles import remove
from .layers import find_stacks
from .names import clean_name

__all__ = [
    "Look",
    "Sublayer",
    "attention_flops",
    "detached",
    "find_sublayers",
    "hidden_of",
    "input_of",
    "look",
    "refusal",
    "with_hidden",
]

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
        raise refusal(f"{type(model).__name__} is an encoder-decoder")
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
            raise refusal(f"{path} ({type(layer).__name__}) has no modules with matrices in it")
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


@contextmanager
def detached(sublayers: Sequence[Sublayer]) -> Iterator[None]:
    """Forward passes inside drop all of these sublayers."""

    def detach(_: nn.Module, __: Any, output: Any) -> Any:
        return with_hidden(output, hidden_of(output).detach())

    handles = [sublayer.module.register_forward_hook(detach) for sublayer in sublayers]
    try:
        yield
    finally:
        remove(handles)


@dataclass(frozen=True)
class Look:
    """What `look` has found."""

    reason: str | None
    """Why sublayers cannot be dropped; None: they can."""
    flops: list[float]
    """Of each sublayer's backward pass through frozen matrices."""


def look(model: nn.Module, sublayers: Sequence[Sublayer], args: Any, kwargs: Any) -> Look:
    """Run the model once more, to see what its layers do with the outputs of their sublayers.

    With all of them detached, the gradient of a layer's output by its input must be the identity,
    up to a scale, and each sublayer's output must reach the layer's output by itself.

    FLOPs of a backward pass through frozen matrices are those of the forward pass, of attention
    twice those, or 2.5 times where the kernel computes its scores again.
    """
    if any(m._compiled_call_impl is not None or "_orig_mod" in m._modules for m in model.modules()):
        return Look("layers are compiled, which would be compiled again for each choice", [])
    reasons: list[str] = []
    inputs: dict[nn.Module, Tensor] = {}
    outputs: dict[nn.Module, dict[str, Tensor]] = {}
    flops = [0.0] * len(sublayers)
    counter = FlopCounterMode(display=False, custom_mapping=_ATTENTION)
    started: dict[int, dict[Any, int]] = {}

    def before_layer(layer: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        hidden = input_of(args, kwargs)
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
            hidden = hidden_of(output)
            if not isinstance(hidden, Tensor):
                reasons.append(f"{sublayers[i].name} returns a {type(output).__name__}")
                return None
            leaf = _fresh(hidden)
            outputs.get(sublayers[i].layer, {})[sublayers[i].name] = leaf
            return with_hidden(output, leaf)

        return hook

    def after_layer(layer: nn.Module, _: Any, output: Any) -> Any:
        hidden = hidden_of(output)
        if layer in inputs and isinstance(hidden, Tensor):
            reason = _unsuited(inputs.pop(layer), outputs.pop(layer), hidden)
            if reason is not None:
                reasons.append(f"in {_path(layer, sublayers)} {reason}")
            output = with_hidden(output, hidden.detach())
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
        remove(handles)
    silent = [s.name for i, s in enumerate(sublayers) if not flops[i]]
    if silent and not reasons:
        reasons.append(f"{silent[0]} multiplies no matrices in the forward pass")
    return Look(reasons[0] if reasons else None, flops)


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


def attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Of the forward pass, by the shapes [sequences, heads, tokens, width]: two matrix products
    over all pairs of tokens, also masked ones, for each of the query's heads.
    """
    sequences, heads, rows, width = query
    flops: int = 2 * sequences * heads * rows * key[2] * (width + value[3])
    return flops


_ATTENTION = {
    getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}"): attention_flops
    for kernel in (
        "cudnn_attention",
        "efficient_attention",
        "flash_attention",
        "flash_attention_for_cpu",
    )
}
"""torch knows no formula for the CPU's kernel, and torch 2.11 none for grouped queries."""


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


def refusal(reason: str) -> UserError:
    return UserError(
        f"lwo.suffix_backward: {reason}, so that its gradients cannot take the residual path alone;"
        " set it to 1.0"
    )


def _dimensions(parameter: Any) -> int:
    return len(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3 leaves empty tensors


def hidden_of(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def with_hidden(output: Any, hidden: Tensor) -> Any:
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def input_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    found = args[0] if args else kwargs.get("hidden_states")
    return found if isinstance(found, Tensor) and found.is_floating_point() else None


def _with_input(args: Any, kwargs: Any, hidden: Tensor) -> tuple[Any, Any]:
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})
