"""What a rank holds between and within steps, by the shapes of a model's parameters: exactly.

Tests hold it against what `LWO.memory()` says at run time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from lwo_dist.layers import Layer
from lwo_dist.memory import padded_numel
from lwo_dist.orthogonal import bytes_at_once
from lwo_dist.strategies.fsdp.matrices import bytes_per_rank_at_once

__all__ = [
    "LARGE",
    "PERSISTENT",
    "Held",
    "Shapes",
    "Storage",
    "flat_numel",
    "held_bytes",
    "shard_numel",
]

Shapes = Mapping[str, Sequence[int]]
"""Parameter name -> shape; a tied parameter once."""

_ALIGN = 4  # elements, as `replicate` aligns the parameters of a flat layer
LARGE = 2**20
"""Elements of the smallest gradient that `replicate` moves into the flat buffer in backward."""
PERSISTENT = 100_000
"""Elements of the largest parameter that ZeRO-3 leaves whole after an update
(`stage3_param_persistence_threshold`)."""
_ZERO_ALIGN = 2  # elements of each rank's part, as ZeRO aligns a flat group


@dataclass(frozen=True)
class Storage:
    """How a strategy stores what it holds.

    Args:
        kind: the strategy's name.
        stage: of ZeRO; 0 for other strategies.
        weight_bytes: of a stored weight, 4 or 2; masters are always fp32.
        keeps_moments, parks_masters: what is parked on the host for layers that are not active.
        accumulates: a step has several micro-batches.
        updates_in_backward: layers without optimizer state are updated in the backward pass.
        offloads: ZeRO's optimizer state is on the host.
        gloo: collectives are gloo's, whose reduce-scatter sums a copy.
    """

    kind: str
    world_size: int
    stage: int = 0
    weight_bytes: int = 4
    keeps_moments: bool = False
    parks_masters: bool = False
    accumulates: bool = False
    updates_in_backward: bool = False
    offloads: bool = False
    gloo: bool = False


@dataclass(frozen=True)
class Held:
    """Bytes of a rank in a visit, after its first step; the keys of `LWO.memory()`."""

    parameter_bytes: int
    gradient_bytes: int
    optimizer_state_bytes: int
    park_bytes: int = 0
    master_bytes: int = 0
    """Of `optimizer_state_bytes`, ZeRO's fp32 copies of the weights."""
    stateless_bytes: int = 0
    """Of `gradient_bytes`, those of layers without optimizer state; whole under `replicate`."""
    orthogonalise_bytes: int = 0
    """Not held: temporary memory of the update of layers without optimizer state."""
    prefetched_bytes: int = 0
    """Parks of the next visit, on the device during the last step of this one; at most."""

    @property
    def device_bytes(self) -> int:
        """All of it that is on the device."""
        return self.parameter_bytes + self.gradient_bytes + self.optimizer_state_bytes


def flat_numel(shapes: Shapes, layer: Layer, world_size: int) -> int:
    """Elements of a layer's flat buffer under `replicate`."""
    numel = sum(padded_numel(math.prod(shapes[name]), _ALIGN) for name in layer.parameter_names)
    return padded_numel(numel, world_size)


def shard_numel(shape: Sequence[int], world_size: int) -> int:
    """Elements of a rank's shard under FSDP2, which splits rows and pads their number."""
    rows = shape[0] if shape else 1
    return math.prod(shape[1:]) * padded_numel(rows, world_size) // world_size


def held_bytes(
    shapes: Shapes,
    layers: Sequence[Layer],
    active: Sequence[Layer],
    storage: Storage,
    stateless: Sequence[Layer] = (),
    following: Iterable[Sequence[Layer]] = (),
) -> Held:
    """What a rank holds in the visit of `active`, once every layer has been visited.

    Args:
        stateless: layers that the visit updates too, without optimizer state; not under ZeRO.
        following: the layers with optimizer state of each visit that may come next, where its parks
            are prefetched: on a GPU.
    """
    make = {"replicate": _replicate, "fsdp": _fsdp, "deepspeed": _deepspeed}[storage.kind]

    def parked(layers: Iterable[Layer]) -> int:
        masters = storage.parks_masters and storage.weight_bytes < 4
        others = (layer for layer in layers if layer not in active)
        numel = sum(_shard_of_layer(shapes, layer, storage) for layer in others)
        return (8 * storage.keeps_moments + 2 * masters) * numel

    held = replace(
        make(shapes, layers, active, storage),
        park_bytes=parked(layers),
        prefetched_bytes=max(map(parked, following), default=0),
    )
    if storage.updates_in_backward:
        return held
    size = storage.world_size
    of_layers = [[shapes[name] for name in layer.parameter_names] for layer in stateless]
    of_all = [shape for found in of_layers for shape in found]
    if storage.kind == "replicate":
        gradients = sum(flat_numel(shapes, layer, size) for layer in stateless)
        of_owners = [[s for found in of_layers[i::size] for s in found] for i in range(size)]
        needed = max(map(bytes_at_once, of_owners))
    else:
        gradients = sum(shard_numel(shape, size) for shape in of_all)
        needed = bytes_per_rank_at_once(of_all, size)
    return replace(
        held,
        gradient_bytes=held.gradient_bytes + 4 * gradients,
        stateless_bytes=4 * gradients,
        orthogonalise_bytes=needed,
    )


def _shard_of_layer(shapes: Shapes, layer: Layer, storage: Storage) -> int:
    """Elements of a rank's part of a layer: of its weights, and of each of its moments."""
    size = storage.world_size
    if storage.kind == "replicate":
        return flat_numel(shapes, layer, size) // size
    if storage.kind == "fsdp":
        return sum(shard_numel(shapes[name], size) for name in layer.parameter_names)
    numels = [math.prod(shapes[name]) for name in layer.parameter_names]
    if storage.stage == 3:
        return sum(padded_numel(numel, size) // size for numel in numels)
    return padded_numel(sum(numels), _ZERO_ALIGN * size) // size


def _replicate(
    shapes: Shapes,
    layers: Sequence[Layer],
    active: Sequence[Layer],
    storage: Storage,
) -> Held:
    size = storage.world_size
    trained = {name for layer in layers for name in layer.parameter_names}
    rest = sum(math.prod(shape) for name, shape in shapes.items() if name not in trained)
    flat = {layer.name: flat_numel(shapes, layer, size) for layer in layers}
    numel = sum(flat[layer.name] for layer in active)
    return Held(
        parameter_bytes=4 * (rest + sum(flat.values())),
        gradient_bytes=4 * numel + (4 * numel // size if size > 1 else 0),
        optimizer_state_bytes=8 * numel // size,
    )


def _fsdp(
    shapes: Shapes,
    layers: Sequence[Layer],
    active: Sequence[Layer],
    storage: Storage,
) -> Held:
    def numel(names: Iterable[str]) -> int:
        return sum(shard_numel(shapes[name], storage.world_size) for name in names)

    trained = numel(name for layer in active for name in layer.parameter_names)
    return Held(
        parameter_bytes=storage.weight_bytes * numel(shapes) + (4 - storage.weight_bytes) * trained,
        gradient_bytes=4 * trained,
        optimizer_state_bytes=8 * trained,
    )


def _deepspeed(
    shapes: Shapes,
    layers: Sequence[Layer],
    active: Sequence[Layer],
    storage: Storage,
) -> Held:
    size = storage.world_size
    own = sum(_shard_of_layer(shapes, layer, storage) for layer in active)
    numels = [math.prod(shapes[name]) for layer in active for name in layer.parameter_names]
    whole = sum(numels)
    persistent = sum(numel for numel in numels if numel <= PERSISTENT)
    everything = sum(math.prod(shape) for shape in shapes.values())
    weights = storage.weight_bytes * everything
    gradients = {1: 4 * whole, 2: 4 * own}.get(storage.stage, 0)
    if storage.stage == 3:
        shards = sum(padded_numel(math.prod(shape), size) // size for shape in shapes.values())
        weights = storage.weight_bytes * (shards + persistent)
        gradients = 4 * own + 4 * whole
    else:
        weights += storage.weight_bytes * (size * own - whole)  # the flat group's padding
    return Held(
        parameter_bytes=weights,
        gradient_bytes=gradients,
        optimizer_state_bytes=12 * own,
        master_bytes=4 * own,
    )
