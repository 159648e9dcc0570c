"""Which parameters are trained together: a model's layers, found by structure rather than name.

A decoder's stack of transformer layers is its largest `nn.ModuleList`. An encoder-decoder has two,
which run one after the other and are one chain: the encoder's layers, then the decoder's.
Everything outside the stacks belongs to `embed` or `head`. Layers that share a parameter (tied
embeddings, repeated layers, blocks shared between layers) form one layer.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

from torch import nn

from .errors import UserError
from .names import clean_name, named_parameters, named_tensors

__all__ = [
    "Layer",
    "Stack",
    "Visit",
    "check_layers",
    "check_visits",
    "find_layers",
    "find_stacks",
    "first_depths",
    "forget_flags",
    "keep_flags",
    "last_depths",
    "own_flags",
    "parameter_depths",
    "rest_names",
    "separate_layers",
    "without_frozen",
]


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # it is part of file names


@dataclass(frozen=True)
class Layer:
    """Parameters that are trained together."""

    name: str
    parameter_names: tuple[str, ...]
    """As in `model.named_parameters()`, without the parts of wrappers such as `_orig_mod`: a tied
    parameter appears once, under its first name.
    """
    depth: int = 0
    """Where backward may stop: 0 for the embedding, i + 1 for transformer layer i of the chain,
    one more than its last layer for the head. 0 is always correct and gives the longest backward.
    """

    @property
    def is_outside(self) -> bool:
        """It is the embedding, the head, or both (tied), as `find_layers` names them."""
        return self.name in ("embed", "head", "embed_head")


@dataclass(frozen=True)
class Visit:
    """What is trained between two switches: the active layer, and possibly others alongside it."""

    active: Layer
    also: tuple[Layer, ...] = ()
    stateless: tuple[Layer, ...] = ()
    """Updated by their orthogonalised gradients alone, without optimizer state."""

    @property
    def layers(self) -> tuple[Layer, ...]:
        """All layers that the visit updates, the active one first."""
        return (*self.stateful, *self.stateless)

    @property
    def stateful(self) -> tuple[Layer, ...]:
        """Those with optimizer state."""
        return (self.active, *self.also)

    def also_in(self, following: Visit | None) -> tuple[Layer, ...]:
        """The layers of `also` that are in the next visit's too."""
        return tuple(layer for layer in self.also if following and layer in following.also)

    @property
    def parameter_names(self) -> tuple[str, ...]:
        return tuple(name for layer in self.layers for name in layer.parameter_names)

    @property
    def depth(self) -> int:
        """Where backward may stop."""
        return min(layer.depth for layer in self.layers)


@dataclass(frozen=True)
class Stack:
    """Transformer layers that run one after another."""

    name: str
    """Prefix of its layers' names: "layer", or of several stacks the name of the module that holds
    them, such as "encoder"."""
    path: str
    """Of `modules` in the model."""
    modules: nn.ModuleList
    first: int
    """Depth of its first layer."""

    @property
    def depths(self) -> range:
        return range(self.first, self.first + len(self.modules))


def find_layers(
    model: nn.Module,
    *,
    train_embeddings: bool = True,
    train_head: bool = True,
    layers_per_group: int = 1,
) -> list[Layer]:
    """The trained layers of `model` in the order of the forward pass; everything else is `rest`.

    Raises:
        UserError: no stack of layers, an encoder-decoder with one, or only half of a tied embedding
            and head.
    """
    stacks = find_stacks(model)
    depths = parameter_depths(model)
    top = _top(stacks)
    chunks = [chunk for stack in stacks for chunk in _chunks(stack.depths, layers_per_group)]
    groups = _merge_tied(model, stacks, [[0], *chunks, [top]])
    layers = []
    for group in groups:
        if not _is_trained(group, top, train_embeddings, train_head):
            continue
        names = tuple(name for name, depth in depths.items() if depth in group)
        if names:
            layers.append(Layer(_name(group, stacks), names, min(group)))
    return layers


def find_stacks(model: nn.Module) -> list[Stack]:
    """The model's stacks of transformer layers, in the order of the forward pass.

    The first found is the `nn.ModuleList` with most parameters. The experts of a mixture and the
    heads of an attention are lists too, but they are inside it and smaller. An encoder-decoder has
    another list at the same place of another module: `encoder.layers` and `decoder.layers`.

    Raises:
        UserError: there is none, or one alone in an encoder-decoder.
    """
    sizes = {
        name: sum(
            getattr(p, "ds_numel", p.numel()) for p in module.parameters()
        )  # ZeRO-3 leaves tensors of 0 elements
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
    }
    # Among equal sizes the first is the outermost: named_modules yields parents before children.
    largest = max(sizes, key=lambda name: sizes[name], default=None)
    if largest is None or sizes[largest] == 0:
        raise UserError(
            f"{type(model).__name__} has no stack of layers (an nn.ModuleList with parameters); "
            "use method: full, or a decoder model such as Qwen2 or Llama"
        )
    # None: not a Hugging Face model.
    has_two = getattr(getattr(model, "config", None), "is_encoder_decoder", None)
    paths = [largest]
    if has_two is not False:
        paths = [name for name in sizes if sizes[name] and _place(name) == _place(largest)]
    if has_two and len(paths) == 1:
        raise UserError(
            f"{type(model).__name__} is an encoder-decoder, but only {largest} was found of its"
            " layers; layer-wise optimisation needs two lists at the same place, such as"
            " encoder.layers and decoder.layers: use method: full"
        )
    stacks = []
    first = 1
    for path in paths:
        modules = model.get_submodule(path)
        assert isinstance(modules, nn.ModuleList)
        name = path.split(".")[-2].strip("_") if len(paths) > 1 else "layer"
        stacks.append(Stack(name, path, modules, first))
        first += len(modules)
    return stacks


def separate_layers(model: nn.Module) -> list[nn.Module]:
    """The transformer layers that share no parameter with each other or with the rest of the model.

    Only these can be sharded one by one: the others are left to a module that holds all uses.
    """
    stacks = find_stacks(model)
    users: dict[int, set[int]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        users.setdefault(id(parameter), set()).add(_depth_in(stacks, name) or 0)
    return [
        module
        for stack in stacks
        for module in stack.modules
        if all(len(users[id(parameter)]) == 1 for parameter in module.parameters())
    ]


def parameter_depths(model: nn.Module) -> dict[str, int]:
    """Parameter name -> depth: 0 below the stack, i + 1 in its layer i, len(stack) + 1 above it.

    Outside the stack, embeddings and modules registered before the stack count as below it; the
    output embedding and modules registered after the stack count as above it, unless the model's
    code uses them first. A norm that a model registers too early (OPT) ends up in the wrong one of
    these two layers, which lengthens backward but does not change results.

    With several stacks only the output embedding counts as above them: what is registered after
    the decoder's layers may come before them (BART's embedding norms) or after (T5's final norm),
    and backward would stop too early for the first kind.
    """
    depths = _depths_of_names(model)
    return {name: depths[name] for name in named_parameters(model)}


def first_depths(model: nn.Module) -> dict[str, int]:
    """Parameter name -> the depth of its first use, under any of its names."""
    depths = _depths_of_names(model)
    first: dict[int, int] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        depth = depths[clean_name(name)]
        first[id(parameter)] = min(depth, first.get(id(parameter), depth))
    return {name: first[id(parameter)] for name, parameter in named_parameters(model).items()}


def last_depths(model: nn.Module) -> dict[str, int]:
    """Parameter name -> the depth of its last use: the head's, for a matrix tied to it.

    With several stacks, what is outside of them may be used last above them.
    """
    depths = _depths_of_names(model)
    stacks = find_stacks(model)
    last: dict[int, int] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        outside = len(stacks) > 1 and _depth_in(stacks, name) is None
        depth = _top(stacks) if outside else depths[clean_name(name)]
        last[id(parameter)] = max(depth, last.get(id(parameter), 0))
    head = _output_embedding(model)
    for parameter in head.parameters() if head is not None else ():
        last[id(parameter)] = _top(stacks)
    return {name: last[id(parameter)] for name, parameter in named_parameters(model).items()}


def _depths_of_names(model: nn.Module) -> dict[str, int]:
    """The depth of every name of a parameter; one that is shared or tied has several."""
    stacks = find_stacks(model)
    top = _top(stacks)
    head = _output_embedding(model)
    head_parameters = {id(p) for p in head.parameters()} if head is not None else set()
    early = _used_early(model, stacks[0]) if len(stacks) == 1 else set()
    depths = {}
    behind = False
    for name, module in model.named_modules(remove_duplicate=False):
        behind = behind or (len(stacks) == 1 and module is stacks[0].modules)
        for parameter_name, parameter in module.named_parameters(prefix=name, recurse=False):
            inside = _depth_in(stacks, parameter_name)
            above = id(parameter) in head_parameters or (behind and module not in early)
            if inside is not None:
                depth = inside
            elif above and not isinstance(module, nn.Embedding):
                depth = top
            else:
                depth = 0
            depths[clean_name(parameter_name)] = depth
    return depths


def _used_early(model: nn.Module, stack: Stack) -> set[nn.Module]:
    """Modules used before the end of the stack, wherever they are registered.

    They are those that the code of a `forward` names before the stack (the norm of BART's
    embeddings), and lists as long as the stack, which are parts of its layers (XLM).
    """
    early: set[nn.Module] = set()
    holder = model
    for part in stack.path.split("."):
        names = _names_in_code(type(holder), "forward", set())
        for name, child in holder.named_children():
            first = name in names and part in names and names.index(name) < names.index(part)
            beside = isinstance(child, nn.ModuleList) and len(child) == len(stack.modules)
            if first or (beside and child is not stack.modules):
                early.update(child.modules())
        holder = holder.get_submodule(part)
    return early


def _names_in_code(kind: type, method: str, seen: set[str]) -> list[str]:
    """The names that the code of a method uses, and of the methods that it names, in order."""
    code = getattr(inspect.unwrap(getattr(kind, method)), "__code__", None)
    seen.add(method)
    names = []
    for name in code.co_names if code is not None else ():
        names.append(name)
        if name not in seen and inspect.isfunction(getattr(kind, name, None)):
            names += _names_in_code(kind, name, seen)
    return names


def check_layers(model: nn.Module, layers: Sequence[Layer]) -> list[Layer]:
    """Return `layers`, with clean names, if they fit `model`.

    Raises:
        UserError: no layers, an empty layer, a duplicate name, or a parameter that the model does
            not have or that is in two layers.
    """
    names = set(named_parameters(model))
    layers = [
        replace(layer, parameter_names=tuple(clean_name(name) for name in layer.parameter_names))
        for layer in layers
    ]
    owner: dict[str, str] = {}
    for layer in layers:
        if not _NAME.fullmatch(layer.name) or layer.name == "rest":
            raise UserError(
                f"a layer is named {layer.name!r}; use letters, digits, '.', '_' and '-', and not "
                "'rest', which is what no layer holds"
            )
        if layer.name in {other.name for other in layers if other is not layer}:
            raise UserError(f"two layers are named {layer.name!r}; give each a name of its own")
        if not layer.parameter_names:
            raise UserError(f"layer {layer.name!r} has no parameters; leave it out")
        for name in layer.parameter_names:
            if name not in names:
                raise UserError(
                    f"layer {layer.name!r} names {name!r}, which is no parameter of "
                    f"{type(model).__name__}; use the names of model.named_parameters()"
                )
            if name in owner:
                raise UserError(
                    f"{name!r} is in the layers {owner[name]!r} and {layer.name!r}; "
                    "each parameter belongs to one layer"
                )
            owner[name] = layer.name
    if not layers:
        raise UserError("there are no layers to train; give at least one")
    return layers


_FLAGS: WeakKeyDictionary[nn.Module, dict[str, bool]] = WeakKeyDictionary()


def own_flags(model: nn.Module) -> dict[str, bool]:
    """Parameter name -> `requires_grad` as the caller set it, before `keep_flags`."""
    flags = {name: p.requires_grad for name, p in named_parameters(model).items()}
    kept = _FLAGS.get(model, {})
    return {name: kept.get(name, flag) for name, flag in flags.items()}


def keep_flags(model: nn.Module, flags: Mapping[str, bool]) -> None:
    """Remember the caller's flags: from now on what is not active is frozen too."""
    _FLAGS[model] = dict(flags)


def forget_flags(model: nn.Module) -> None:
    """The model has the caller's flags again."""
    _FLAGS.pop(model, None)


def without_frozen(layers: Sequence[Layer], flags: Mapping[str, bool]) -> list[Layer]:
    """The layers without the parameters that the caller has frozen; a layer of none is left out.

    Args:
        flags: parameter name -> whether it may be trained.

    Raises:
        UserError: nothing is left.
    """
    found = []
    for layer in layers:
        names = tuple(name for name in layer.parameter_names if flags[name])
        if names:
            found.append(replace(layer, parameter_names=names))
    if layers and not found:
        raise UserError(
            "every parameter of the layers to train is frozen (requires_grad = False); call"
            " requires_grad_(True) on those to train"
        )
    return found


def check_visits(layers: Sequence[Layer], visits: Sequence[Visit]) -> list[Visit]:
    """Return `visits` if they are of these layers.

    Raises:
        UserError: no visit, one of a layer that is not among `layers`, or one that names a layer
            twice.
    """
    for visit in visits:
        names = [layer.name for layer in visit.layers]
        strangers = [layer.name for layer in visit.layers if layer not in layers]
        if strangers:
            raise UserError(
                f"the visit of {visit.active.name!r} names the layer {strangers[0]!r}, which the "
                "method does not give; a method's visits are of its own layers"
            )
        if len(set(names)) < len(names):
            raise UserError(
                f"the visit of {visit.active.name!r} names a layer twice ({', '.join(names)}); "
                "name each once"
            )
    if not visits:
        raise UserError("there are no visits; a method gives at least one")
    return list(visits)


def rest_names(model: nn.Module, layers: Iterable[Layer]) -> list[str]:
    """Names of the parameters and persistent buffers that are in no trained layer.

    Additional names of a tied parameter that is trained are not included.
    """
    trained = {name for layer in layers for name in layer.parameter_names}
    trained_ids = {id(p) for name, p in named_parameters(model).items() if name in trained}
    return [
        name
        for name, tensor in named_tensors(model).items()
        if name not in trained and id(tensor) not in trained_ids
    ]


def _output_embedding(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    return get() if get is not None else None


def _chunks(items: range, size: int) -> list[list[int]]:
    return [list(items[i : i + size]) for i in range(0, len(items), size)]


def _place(path: str) -> tuple[str, str] | str:
    """What lists at the same place of different modules have in common: the path around the
    module's own name."""
    holder, _, last = path.rpartition(".")
    return (holder.rpartition(".")[0], last) if holder else path


def _depth_in(stacks: Sequence[Stack], name: str) -> int | None:
    """Depth of the layer that a parameter is in; None outside of the stacks."""
    for stack in stacks:
        if name.startswith(f"{stack.path}."):
            return stack.first + int(name[len(stack.path) + 1 :].split(".")[0])
    return None


def _top(stacks: Sequence[Stack]) -> int:
    """Depth of the head."""
    return stacks[-1].depths.stop


def _merge_tied(
    model: nn.Module, stacks: Sequence[Stack], groups: list[list[int]]
) -> list[list[int]]:
    """Merge groups that share a parameter, ordered by their lowest depth."""
    depths = parameter_depths(model)
    first_name = {id(p): name for name, p in model.named_parameters()}
    owner = {depth: i for i, group in enumerate(groups) for depth in group}
    joined = list(range(len(groups)))
    top = _top(stacks)
    head = _output_embedding(model)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        depth = _depth_in(stacks, name)
        if depth is None:
            if (
                head is None
                or all(parameter is not p for p in head.parameters())
                or name == first_name[id(parameter)]
            ):
                continue
            depth = top
        a = joined[owner[depth]]
        b = joined[owner[depths[clean_name(first_name[id(parameter)])]]]
        joined = [min(a, b) if group in (a, b) else group for group in joined]
    merged: dict[int, list[int]] = {}
    for group, target in zip(groups, joined, strict=True):
        merged.setdefault(target, []).extend(group)
    return list(merged.values())


def _is_trained(group: list[int], top: int, train_embeddings: bool, train_head: bool) -> bool:
    if 0 in group and top in group and train_embeddings != train_head:
        raise UserError(
            f"train_embeddings: {train_embeddings} and train_head: {train_head}, but this model's"
            " embedding and head are one tied matrix; set both alike"
        )
    return (0 not in group or train_embeddings) and (top not in group or train_head)


def _name(group: list[int], stacks: Sequence[Stack]) -> str:
    names = ["embed"] if 0 in group else []
    for stack in stacks:
        width = len(str(len(stack.modules) - 1))
        inner = [f"{d - stack.first:0{width}}" for d in group if d in stack.depths]
        if inner:
            names.append(f"{stack.name}_{'-'.join(dict.fromkeys((inner[0], inner[-1])))}")
    return "_".join(names + (["head"] if _top(stacks) in group else []))
