"""The head of a language model, apart from the rest of its forward pass.

The model's forward pass runs as ever, but for its head (`get_output_embeddings`), and nobody needs
to know what the model does around it:

    hidden = ...                         the model; what it does before its head
    logits = stand-in                    in place of the head, which is not computed yet
    logits = tanh(logits / 30) * 30      the model; what it does after its head is recorded
    use(Head(hidden, ...))               once, still inside the forward pass: what computes logits
                                         of some positions, with what was recorded

So gathering (FSDP2, ZeRO-3) happens as for the model's own logits, once in each pass. A model that
does not fit into this, such as one that mixes positions after its head, gives its whole logits,
with a warning that says why.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import get_device_states, set_device_states

from . import distributed
from .errors import UserError

__all__ = ["CHUNK_ELEMENTS", "Head", "at_least_fp32", "with_head"]

CHUNK_ELEMENTS = 2**26
"""Logits of a chunk: 256 MiB in fp32."""

_Found = TypeVar("_Found")


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True)
class Head:
    """The last part of a forward pass: from what the head is given to the logits."""

    hidden: Tensor
    """[sequences, tokens, ...], what the head is given."""
    compute: Callable[[Tensor], Tensor]
    """[1, rows, ...] of it -> [1, rows, vocabulary]."""
    trained: tuple[Tensor, ...]
    vocabulary: int
    in_one_piece: bool
    """Parts of it have hooks, which may gather weights: the same number of calls on every rank."""
    output: Any
    """The model's, without its logits."""

    @property
    def chunk_size(self) -> int:
        return max(1, CHUNK_ELEMENTS // self.vocabulary)

    def rows(self, positions: Tensor) -> Tensor:
        return self.hidden.flatten(0, 1)[positions.to(self.hidden.device)]

    def logits(self, rows: Tensor) -> Tensor:
        """[rows, vocabulary], in fp32 or fp64."""
        logits = self.compute(rows[None])[0]
        return logits.to(at_least_fp32(logits.dtype))


_FIT: WeakSet[nn.Module] = WeakSet()
"""Models of which `_check` was done."""
_WITH_WHOLE_LOGITS: WeakSet[nn.Module] = WeakSet()
"""Models that do not fit; this was said."""


def with_head(
    model: nn.Module,
    inputs: Mapping[str, Any],
    shape: torch.Size,
    use: Callable[[Head], _Found],
) -> _Found:
    """`use` of the model's head, called inside of the model's forward pass.

    Args:
        shape: [sequences, tokens] of the positions.
    """
    owner, reason = _owner(model)
    if reason:
        _say_once(model, reason)
        return use(_identity(model(**inputs), shape))
    plain = owner.forward

    def forward(*args: Any, **kwargs: Any) -> _Found:
        if owner not in _WITH_WHOLE_LOGITS:
            random_state = torch.get_rng_state(), get_device_states(*tree_leaves((args, kwargs)))
            try:
                return _with_stand_in(owner, plain, args, kwargs, shape, use)
            except _MisfitError as reason:
                _say_once(owner, str(reason))
            torch.set_rng_state(random_state[0])
            set_device_states(*random_state[1])
        return use(_identity(plain(*args, **kwargs), shape))

    with _replaced(owner, forward):
        found: _Found = model(**inputs)
    return found


def _owner(model: nn.Module) -> tuple[nn.Module, str]:
    """The module with the head, inside of wrappers (peft's, DeepSpeed's), or why there is none."""
    for module in model.modules():
        if module._compiled_call_impl is not None or "_orig_mod" in module._modules:
            return module, "it is compiled as a whole"
        if hasattr(type(module), "get_output_embeddings"):  # a wrapper only passes on the name
            return module, ""
    return model, "it has no get_output_embeddings"


_APART = "what it does after its head is not done for each position apart"


class _MisfitError(Exception):
    """Why the head cannot be computed apart from the rest of the forward pass."""


def _with_stand_in(
    owner: nn.Module,
    plain: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    shape: torch.Size,
    use: Callable[[Head], _Found],
) -> _Found:
    head: Any = owner.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(getattr(head, "out_features", None), int):
        raise _MisfitError(f"its head is a {type(head).__name__}, not a linear layer")
    stand_in = _StandIn(head)
    with _in_place_of(head, owner, stand_in), stand_in.after_head:
        try:
            output = plain(*args, **kwargs)
        except Exception as error:
            if stand_in.calls == 0:  # not yet at the head: an error like any other
                raise
            raise _MisfitError(f"its forward pass needs the logits: {error}") from error
    if stand_in.calls != 1:
        raise _MisfitError(f"its forward pass calls the head {stand_in.calls} times")
    if stand_in.hidden.shape[:-1] != shape:
        found, expected = tuple(stand_in.hidden.shape[:-1]), tuple(shape)
        raise _MisfitError(f"its head is given {found} positions of {expected}")
    finish = stand_in.record.again(getattr(output, "logits", None))
    if owner not in _FIT:
        with stand_in.autocast:
            _check(finish, stand_in.values, output.logits)
        _FIT.add(owner)
    output["logits"] = None
    forward = head.forward

    def inside(hidden: Tensor) -> _Found:
        parts = [module for module in head.modules() if module is not head]
        return use(
            Head(
                hidden=hidden,
                compute=lambda rows: finish(forward(rows)),
                trained=tuple(p for p in head.parameters() if p.requires_grad),
                vocabulary=head.out_features,
                in_one_piece=any(part._forward_pre_hooks for part in parts),
                output=output,
            )
        )

    with _replaced(head, inside), stand_in.autocast:
        found_of_head: _Found = head(stand_in.hidden)
    return found_of_head


def _identity(output: Any, shape: torch.Size) -> Head:
    """The head of a model whose logits are all there."""
    logits = output.logits
    if logits.shape[:-1] != shape:
        raise UserError(
            f"the model gives logits of {tuple(logits.shape[:-1])} positions, and the labels are of"
            f" {tuple(shape)}; it must give logits for every position"
        )
    return Head(
        hidden=logits,
        compute=lambda rows: rows,
        trained=(),
        vocabulary=logits.shape[-1],
        in_one_piece=False,
        output=output,
    )


class _StandIn(nn.Module):
    """Takes the head's place in a forward pass; keeps what the head was to be given."""

    def __init__(self, head: nn.Module):
        super().__init__()
        self.__dict__["_head"] = head  # not as a submodule
        self.calls = 0
        self.after_head = ExitStack()

    def forward(self, hidden: Tensor) -> Tensor:
        self.calls += 1
        self.hidden = hidden
        self.autocast = _autocast_now(hidden.device.type)
        values = torch.linspace(-9, 9, 2 * self.out_features, dtype=hidden.dtype)
        self.values = values.to(hidden.device).view(1, 2, -1)
        self.record = _Record(self.values.clone())
        if self.calls == 1:
            self.after_head.enter_context(self.record)
        return self.record.begin

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_head"], name)


class _Record(TorchFunctionMode):
    """Remembers what is done with `begin`, and with what is made of it."""

    def __init__(self, begin: Tensor):
        super().__init__()
        self.begin = begin
        self._made = {id(begin): begin}
        self._steps: list[tuple[Callable[..., Any], Any, Any, Any]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(id(given) in self._made for given in _tensors((args, kwargs))):
            made = _tensors(result)
            if made or result is None:  # None: of an assignment to a part of it
                self._steps.append((func, args, kwargs or {}, result))
                self._made |= {id(tensor): tensor for tensor in made}
        return result

    def again(self, end: Any) -> Callable[[Tensor], Tensor]:
        """A function that does with its argument what was done from `begin` to `end`."""
        shape = self.begin.shape[:2]
        if id(end) not in self._made or end.dim() != 3 or end.shape[:2] != shape:
            raise _MisfitError(_APART)
        others = [
            other
            for _, args, kwargs, _ in self._steps
            for other in _tensors((args, kwargs))
            if id(other) not in self._made
        ]
        if any(other.requires_grad for other in others):
            raise _MisfitError("it trains parameters after its head")

        def do(logits: Tensor) -> Tensor:
            real: dict[int, Any] = {id(self.begin): logits}
            for function, args, kwargs, result in self._steps:
                args, kwargs = tree_map_only(
                    Tensor, lambda x: real[id(x)] if id(x) in self._made else x, (args, kwargs)
                )
                made = function(*args, **kwargs)
                real.update(zip(map(id, _tensors(result)), _tensors(made), strict=True))
            found: Tensor = real[id(end)]
            return found

        return do


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _check(finish: Callable[[Tensor], Tensor], values: Tensor, found: Tensor) -> None:
    """Whether `finish` makes of three positions what the model has made of two, the first twice."""

    def three(two: Tensor) -> Tensor:
        return torch.cat([two, two[:, :1]], dim=1)

    expected = three(found)
    try:
        again = finish(three(values))
    except Exception as error:
        raise _MisfitError(f"{_APART}: {error}") from error
    if again.shape != expected.shape:
        raise _MisfitError(_APART)
    without_values = again.is_meta or isinstance(again, FakeTensor)
    if not (without_values or torch.allclose(again, expected, rtol=1e-3)):
        raise _MisfitError(_APART)


@contextmanager
def _in_place_of(module: nn.Module, owner: nn.Module, other: nn.Module) -> Iterator[None]:
    """`other` where `module` is first found in `owner`; the hooks of `module` do not run."""
    parent, name = next(
        (parent, name)
        for parent in owner.modules()
        for name, child in parent._modules.items()
        if child is module
    )
    parent._modules[name] = other
    try:
        yield
    finally:
        parent._modules[name] = module


@contextmanager
def _replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """`module.forward` is `forward`; its hooks run."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def _autocast_now(device_type: str) -> AbstractContextManager[Any]:
    if not torch.amp.is_autocast_available(device_type):
        return nullcontext()
    return torch.autocast(
        device_type,
        torch.get_autocast_dtype(device_type),
        torch.is_autocast_enabled(device_type),
    )


def _say_once(model: nn.Module, reason: str) -> None:
    if model not in _WITH_WHOLE_LOGITS and distributed.rank() == 0:
        warnings.warn(
            f"the loss of {type(model).__name__} is computed from the logits of the whole batch,"
            f" which takes more memory: {reason}",
            stacklevel=2,
        )
    _WITH_WHOLE_LOGITS.add(model)
