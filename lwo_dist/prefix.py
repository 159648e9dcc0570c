"""The prefix is not run again for a batch whose hidden states are known.

With `batches: cycle` the layers of a cycle are trained on the same batches, in ascending order. A
border is the input of a layer, for one micro-batch. The visit of layer l keeps the border of layer
l; in the next visit layer l has its new weights, and each forward pass starts at that border: the
layers below it are passed over, layer l is run without gradient, and its output is the border of
layer l + 1, which replaces the one of layer l. So a pass runs one layer of the prefix, not all.

Nothing here decides what is correct by the schedule: a border is used only if no layer below it has
changed since, for exactly the inputs that it was computed from.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .borders import BorderStore, spill_folder
from .config import LWOConfig
from .errors import UserError, first_line
from .handles import remove
from .layers import Visit, find_stacks, first_depths
from .strategies import Strategy

__all__ = ["PrefixReuse", "starting_layers"]

_RANDOM = re.compile(r"drop|jitter", re.IGNORECASE)


class PrefixReuse:
    """Watches the forward passes of `module` until `end`, or until it is no longer referenced.

    Only training passes, with the module in training mode and gradients enabled, use or keep
    borders.

    Attributes:
        reused: training passes that started at a stored border.
        computed: training passes that ran the whole model.

    Raises:
        UserError: the model has two stacks of layers, uses a layer twice, or draws random numbers
            in training. The first training pass tells the rest, before anything is trained: whether
            a layer hands on more than one tensor of hidden states, for example.
    """

    def __init__(
        self, module: nn.Module, config: LWOConfig, visits: Sequence[Visit], strategy: Strategy
    ):
        self._module = module
        self._strategy = strategy
        self._layers = _only_stack(module)
        self._borders = _borders_of(module, visits)
        self._keeps = _kept(self._borders, len(self._layers))
        _refuse_randomness(module)
        strategy.refuse_passing_over(list(self._layers))
        self._store = BorderStore(
            int(config.prefix_host_gb * 1e9), int(config.prefix_disk_gb * 1e9), spill_folder
        )
        # By the form of what a pass is given, what each layer returns.
        self._tried: dict[tuple[Any, ...], dict[int, int | None]] = {}
        self._is_trying = False
        self._keep_at = 0
        self._expected = False  # passes of this visit should find borders
        self._has_found = False
        self._warned = False
        self._pass: _Pass | None = None
        self.reused = 0
        self.computed = 0
        reuse = weakref.ref(self)

        def before(_: nn.Module, args: Any, kwargs: Any) -> None:
            live = reuse()
            if live is not None:
                live._before_forward(args, kwargs)

        def after(_: nn.Module, __: Any, output: Any) -> None:
            live = reuse()
            if live is not None:
                live._after_forward(failed=output is None)

        handles = [
            module.register_forward_pre_hook(before, prepend=True, with_kwargs=True),
            module.register_forward_hook(after, always_call=True),
        ]
        self._end = weakref.finalize(self, remove, handles)

    def begin_visit(self, visit: int, *, first_of_cycle: bool) -> None:
        """Call before the layers of a visit change.

        Raises:
            UserError: the model now draws random numbers in training.
        """
        _refuse_randomness(self._module)
        self._warn_if_none_was_found()
        border = self._borders[visit]
        if first_of_cycle:
            self._store.clear()
        self._store.drop_above(border)
        self._keep_at = self._keeps[visit]
        self._expected = len(self._store) > 0
        self._has_found = False

    def forget(self) -> None:
        """Drop all borders: weights have changed in another way than by training."""
        self._store.clear()
        self._expected = False

    def end(self) -> None:
        self._store.clear()
        self._end()

    # ---- a forward pass

    def _before_forward(self, args: Any, kwargs: Any) -> None:
        if self._is_trying or not (self._module.training and torch.is_grad_enabled()):
            return
        form = _form(args, kwargs)
        key = _key(args, kwargs)
        border = self._store.get(key) if key is not None else None
        was_tried = form in self._tried
        start = border.index if border is not None else 0
        self._has_found = self._has_found or border is not None
        # Ranks that gather weights from each other must run the same layers.
        all_tried, all_start_here = self._strategy.agree(was_tried, start)
        if not (was_tried and all_tried):
            self._tried[form] = self._try(args, kwargs)
        if border is None or not all_start_here:
            start, border = 0, None
        keep_at = self._keep_at if key is not None and start < self._keep_at else 0

        def keep(hidden: Tensor) -> None:
            assert key is not None
            if not hidden.requires_grad:
                self._store.put(key, keep_at, hidden.detach())

        hidden = border.take() if border is not None else None
        self._pass = _Pass(self._layers, self._tried[form], start, hidden, keep_at, keep)
        self._strategy.pass_over(list(self._layers)[:start])
        self._pass.begin()

    def _after_forward(self, *, failed: bool) -> None:
        done = self._pass
        if self._is_trying or done is None:
            return
        self._pass = None
        done.end()
        if failed:
            return
        if done.is_abandoned:
            self._strategy.pass_over([])
        elif done.passed != done.start:
            raise RuntimeError(
                f"the model ran {done.passed} of the {done.start} layers that lwo.batches: cycle"
                " passes over; its forward pass has changed since the first one"
            )
        if done.start and not done.is_abandoned:
            self.reused += 1
        else:
            self.computed += 1

    def _warn_if_none_was_found(self) -> None:
        if self._expected and not self._has_found and not self._warned:
            self._warned = True
            warnings.warn(
                "lwo.batches: cycle: no batch of the last visit was one of the visit before, so"
                " the prefix was computed for each; give every layer of a cycle the same batches,"
                " with the same arguments: batch number lwo.batch_index for the next step",
                stacklevel=4,
            )

    # ---- before anything trains

    def _try(self, args: Any, kwargs: Any) -> dict[int, int | None]:
        """Compare two whole forward passes, and one that starts at the last layer, bit by bit.

        Returns:
            By layer, what `_Trial.others` is.

        Raises:
            UserError: they differ, or the last one fails.
        """
        last = len(self._layers) - 1
        if last < 1:
            return {}
        whole = _Trial(self._layers)
        device = next(self._module.parameters()).device
        devices = [device] if device.type == "cuda" else []
        self._is_trying = True
        try:
            # Each pass draws other random numbers, if any.
            with torch.no_grad(), torch.random.fork_rng(devices=devices):
                with whole:
                    expected = _tensors(self._module(*args, **kwargs))
                repeated = _tensors(self._module(*args, **kwargs))
                is_random = not _are_equal(repeated, expected)
                del repeated
                again = _Pass(self._layers, whole.others, last, whole.hidden, 0, _ignore)
                again.begin()
                try:
                    found = _tensors(self._module(*args, **kwargs))
                except (LookupError, TypeError, AttributeError, ValueError) as error:
                    why = f"without them it fails ({first_line(error)})"
                    raise _cannot(self._module, why) from error
                finally:
                    again.end()
        finally:
            self._is_trying = False
        self._strategy.flush()  # as after any pass without backward
        why = ""
        if is_random:
            why = "two passes over one batch differ, as they draw random numbers"
        elif again.passed < last or not _are_equal(expected, found):
            why = (
                "without them it computes something else, as they hand on more than their hidden"
                " states"
            )
        [all_found_the_same] = self._strategy.agree(len(why))
        if why or not all_found_the_same:
            raise _cannot(self._module, why or "another rank has found out why")
        return whole.others


class _Pass:
    """The layers of one forward pass that starts at layer `start`, whose input is `hidden`.

    Between `begin` and `end` the layers below `start` return `hidden` at once: neither their code
    nor their hooks, which gather weights, are called. The modules stay where they are.

    Args:
        others: how many items each layer returns beside the hidden states, see `_Trial`; None
            takes their place, and the trial has shown that nothing reads them.
        keep_at: index of a layer, above `start`, whose input is given to `keep`; 0: of none.
    """

    def __init__(
        self,
        layers: nn.ModuleList,
        others: Mapping[int, int | None],
        start: int,
        hidden: Tensor | None,
        keep_at: int,
        keep: Callable[[Tensor], None],
    ):
        self.start = start
        self.passed = 0
        self.is_abandoned = False
        self._below = list(layers)[:start]
        self._others = others
        self._hidden = hidden
        self._under = layers[keep_at - 1] if keep_at else None
        self._keep = keep
        self._own_calls: list[Any] = []
        self._handle: Any = None

    def begin(self) -> None:
        # What `nn.Module.__call__` calls instead of the module's hooks and forward. It is there for
        # torch.compile, and is a layer's own call where it is set.
        self._own_calls = [layer._compiled_call_impl for layer in self._below]
        for index, layer in enumerate(self._below):
            layer._compiled_call_impl = self._shortcut(index, layer)
        if self._under is not None:
            self._handle = self._under.register_forward_hook(self._look)

    def end(self) -> None:
        for layer, call in zip(self._below, self._own_calls, strict=True):
            layer._compiled_call_impl = call
        self._below = []
        self._own_calls = []
        if self._handle is not None:
            self._handle.remove()

    def _shortcut(self, index: int, layer: nn.Module) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if any(tensor.requires_grad for tensor in _tensors((args, kwargs))):
                return self._abandon(index, layer, args, kwargs)
            self.passed += 1
            others = self._others[index]
            return self._hidden if others is None else (self._hidden, *[None] * others)

        return call

    def _abandon(self, index: int, layer: nn.Module, args: Any, kwargs: Any) -> Any:
        """Something that is trained is used below: this pass has to run every layer."""
        if index > 0:
            raise RuntimeError(
                f"layer {index} has an input that requires a gradient, and the layers below do not;"
                " lwo.batches: cycle passes over all of them: set lwo.batches: fresh"
            )
        for below, call in zip(self._below, self._own_calls, strict=True):
            below._compiled_call_impl = call
        self._below = []
        self._own_calls = []
        self.is_abandoned = True
        return nn.Module.__call__(layer, *args, **kwargs)

    def _look(self, _: nn.Module, __: Any, output: Any) -> None:
        self._keep(output if isinstance(output, Tensor) else output[0])


class _Trial:
    """Follows a whole forward pass, and refuses layers that cannot be passed over.

    Attributes:
        others: by layer, None if it returns the hidden states, or how many items its tuple has
            beside them.
        hidden: a copy of the last layer's input.
    """

    def __init__(self, layers: nn.ModuleList):
        self._layers = list(layers)
        self.others: dict[int, int | None] = {}

    def __enter__(self) -> None:
        self._handles = [
            layer.register_forward_hook(self._look(index))
            for index, layer in enumerate(self._layers[:-1])
        ]

    def _look(self, index: int) -> Callable[..., None]:
        name = f"layer {index}, a {type(self._layers[index]).__name__},"

        def look(_: nn.Module, __: Any, output: Any) -> None:
            if index in self.others:
                raise UserError(f"{name} is run twice in a forward pass; {_REMEDY}")
            in_tuple = isinstance(output, tuple) and len(output) > 0
            hidden = output[0] if in_tuple else output
            if not isinstance(hidden, Tensor):
                kind = type(output).__name__
                raise UserError(f"{name} returns a {kind}, not its hidden states; {_REMEDY}")
            self.others[index] = len(output) - 1 if in_tuple else None
            self.hidden = hidden.detach()
            if index == len(self._layers) - 2:
                self.hidden = self.hidden.clone()

        return look

    def __exit__(self, *error: Any) -> None:
        remove(self._handles)
        if error[0] is None and len(self.others) < len(self._layers) - 1:
            missing = next(i for i in range(len(self._layers)) if i not in self.others)
            raise UserError(f"layer {missing} is not run in a forward pass; {_REMEDY}")


_REMEDY = "lwo.batches: cycle cannot pass over it: set lwo.batches: fresh"


def _cannot(module: nn.Module, why: str) -> UserError:
    return UserError(
        f"lwo.batches: cycle cannot pass over the lower layers of {type(module).__name__}: {why};"
        " set lwo.batches: fresh"
    )


def _ignore(_: Tensor) -> None:
    pass


# ---- what the visits leave as it is


def starting_layers(module: nn.Module, visits: Sequence[Visit]) -> list[int]:
    """For each visit of a cycle the index of the layer at which its forward passes start; 0: they
    run the whole model. This is so where the store holds the borders of all batches.
    """
    borders = _borders_of(module, visits)
    kept = _kept(borders, len(_only_stack(module)))
    starts: list[int] = []
    stored = 0
    for border, keep_at in zip(borders, kept, strict=True):
        starts.append(stored if stored <= border else 0)
        stored = max(keep_at, starts[-1])
    return starts


def _borders_of(module: nn.Module, visits: Sequence[Visit]) -> list[int]:
    """For each visit, the highest layer whose input it does not change."""
    depths = first_depths(module)
    lowest = [min(depths[name] for name in visit.parameter_names) for visit in visits]
    return [max(0, depth - 1) for depth in lowest]


def _kept(borders: Sequence[int], num_layers: int) -> list[int]:
    """For each visit, the layer whose input is worth keeping, as the next visit will use it."""
    following = [*borders[1:], 0]
    return [
        border if 0 < border < num_layers and after >= border else 0
        for border, after in zip(borders, following, strict=True)
    ]


def _only_stack(module: nn.Module) -> nn.ModuleList:
    """The stack of the layers; refuse a model of two, or with a layer in two places."""
    stacks = find_stacks(module)
    if len(stacks) > 1:
        paths = " and ".join(stack.path for stack in stacks)
        raise _cannot(module, f"it has {len(stacks)} stacks, {paths}")
    layers = stacks[0].modules
    if len({id(layer) for layer in layers}) < len(layers):
        raise _cannot(module, f"{stacks[0].path} has a layer in two places")
    return layers


def _refuse_randomness(module: nn.Module) -> None:
    """Refuse dropout and the like: the stored hidden states would not be those of a new pass."""
    for name, part in module.named_modules():
        found = {"p": part.p} if isinstance(part, nn.modules.dropout._DropoutNd) else {}
        for key, value in vars(part).items():
            if _RANDOM.search(key) and isinstance(value, float):
                found[key] = value
        for key, value in found.items():
            if value > 0:
                raise UserError(
                    f"{f'{name}.{key}'.lstrip('.')} = {value:g} is random in training, and"
                    " lwo.batches: cycle uses the hidden states of a batch again; set it to 0 in"
                    " the model's config, or set lwo.batches: fresh"
                )


# ---- which batch it is


def _key(args: Any, kwargs: Any) -> bytes | None:
    """A digest of everything that a forward pass is given; None if it cannot be told.

    Reads tensors from the device, which waits for them.
    """
    digest = hashlib.blake2b(repr(_autocast(args, kwargs)).encode(), digest_size=16)
    for path, leaf in _leaves((args, kwargs)):
        digest.update(path.encode())
        if isinstance(leaf, Tensor):
            if isinstance(leaf, DTensor) or leaf.requires_grad:
                return None
            held = leaf.detach().to("cpu").contiguous()
            digest.update(f"{tuple(held.shape)} {held.dtype}".encode())
            digest.update(ctypes.string_at(held.data_ptr(), held.nbytes))
        elif leaf is None or isinstance(leaf, bool | int | float | str):
            digest.update(repr(leaf).encode())
        else:
            return None
    return digest.digest()


def _form(args: Any, kwargs: Any) -> tuple[Any, ...]:
    """What a forward pass is given, but for the values of numbers and tensors."""
    form: list[Any] = [_autocast(args, kwargs)]
    for path, leaf in _leaves((args, kwargs)):
        if isinstance(leaf, Tensor):
            form.append((path, leaf.dtype, leaf.dim()))
        elif leaf is None or isinstance(leaf, bool | str):
            form.append((path, leaf))
        else:
            form.append((path, type(leaf)))
    return tuple(form)


def _autocast(*given: Any) -> tuple[Any, ...]:
    kinds = {leaf.device.type for leaf in _tensors(given)}
    return tuple(
        (kind, torch.get_autocast_dtype(kind))
        for kind in sorted(kinds)
        if torch.is_autocast_enabled(kind)
    )


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{path}/{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{path}/{index}")
    else:
        yield path, value


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for _, leaf in _leaves(value) if isinstance(leaf, Tensor)]


def _are_equal(expected: Sequence[Tensor], found: Sequence[Tensor]) -> bool:
    """Whether all bits but those of a NaN are equal."""
    return len(expected) == len(found) and all(
        a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
        for a, b in zip(expected, found, strict=True)
    )
