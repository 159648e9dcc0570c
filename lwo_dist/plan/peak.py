"""The peak of a step: what is held, what the model's own operations need, and what the strategy
gathers and reduces, moment by moment.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from lwo_dist.memory import padded_numel

from .held import LARGE, PERSISTENT, Held, Storage, shard_numel
from .rehearsal import ROOT, Moment

__all__ = ["Instant", "Unit", "peak_of"]

# Elements: DeepSpeed's stage3_max_live_parameters and stage3_prefetch_bucket_size.
_MAX_LIVE = 10**9
_PREFETCHED = 5 * 10**7


@dataclass(frozen=True)
class Unit:
    """What is gathered and reduced at once: a transformer layer, or all that is in none."""

    shapes: tuple[tuple[int, ...], ...]
    trained: tuple[tuple[int, ...], ...]
    in_backward: bool
    """Whether backward passes through it."""

    def gathered(self, world_size: int, element_bytes: int) -> int:
        return element_bytes * world_size * sum(shard_numel(s, world_size) for s in self.shapes)

    def reduced(self, world_size: int) -> int:
        """Bytes of its gradients in fp32, padded."""
        return 4 * world_size * sum(shard_numel(s, world_size) for s in self.trained)


@dataclass(frozen=True)
class Instant:
    """A rank's device memory at one moment, in bytes by part."""

    when: str
    weights: int
    gradients: int
    optimizer_state: int
    gathered: int
    """Whole weights for the computation, and the buffers that they arrive in."""
    buffers: int
    """Of collectives over gradients."""
    activations: int
    """Activations, logits, temporaries, and gradients not yet reduced."""

    @property
    def total(self) -> int:
        return sum(value for value in vars(self).values() if isinstance(value, int))


def peak_of(
    held: Held,
    moments: Sequence[Moment],
    units: Mapping[int, Unit],
    storage: Storage,
    compute_bytes: int,
) -> Instant:
    """The instant of a step at which a rank needs most, in the last step of a visit: what is
    prefetched counts as optimizer state.
    """
    follow = {"replicate": _replicate, "fsdp": _fsdp, "deepspeed": _deepspeed}[storage.kind]
    instants = list(follow(held, moments, units, storage, compute_bytes))
    most = max(instants, key=lambda instant: instant.total)
    return replace(most, optimizer_state=most.optimizer_state + held.prefetched_bytes)


_Follow = Callable[[Held, Sequence[Moment], Mapping[int, Unit], Storage, int], Iterator[Instant]]


def _replicate(
    held: Held,
    moments: Sequence[Moment],
    units: Mapping[int, Unit],
    storage: Storage,
    compute_bytes: int,
) -> Iterator[Instant]:
    """The flat gradients have memory from the first large one to the update, this rank's shard of
    them in the update only. Small gradients are moved there after the backward.
    """
    size = storage.world_size
    sharded = held.gradient_bytes - held.stateless_bytes
    flat = held.stateless_bytes + (sharded * size // (size + 1) if size > 1 else sharded)
    numels = {
        number: [math.prod(shape) for shape in unit.trained] for number, unit in units.items()
    }
    small = {
        number: 4 * sum(numel for numel in found if numel < LARGE)
        for number, found in numels.items()
    }
    passed = set(units) if storage.accumulates else set()
    for moment in moments:
        # The root's come last: the embedding's, or all that a visit of the head has.
        if moment.phase == "backward" and (moment.unit != ROOT or moment is moments[-1]):
            passed.add(moment.unit)
        there = any(numel >= LARGE for number in passed for numel in numels[number])
        yield Instant(
            moment.phase,
            held.parameter_bytes,
            flat if there else 0,
            held.optimizer_state_bytes,
            0,
            sum(small[number] for number in passed),
            moment.live_bytes,
        )
    copied = flat - held.stateless_bytes if storage.gloo and size > 1 else 0
    whole = {number: 4 * sum(found) for number, found in numels.items()}
    moved = {number for number, found in numels.items() if any(n >= LARGE for n in found)}
    # The others move one after the other.
    last = max((whole[number] for number in numels.keys() - moved), default=0)
    for gradients, buffers in (
        (sum(whole[number] for number in moved) + last, sum(small.values())),
        (held.gradient_bytes, copied),
        (held.stateless_bytes, held.orthogonalise_bytes),  # the others have been released
    ):
        yield Instant(
            "update", held.parameter_bytes, gradients, held.optimizer_state_bytes, 0, buffers, 0
        )


def _fsdp(
    held: Held,
    moments: Sequence[Moment],
    units: Mapping[int, Unit],
    storage: Storage,
    compute_bytes: int,
) -> Iterator[Instant]:
    """FSDP2 as it gathers: into a flat buffer, and from there into the parameters.

    In forward the flat buffer lives until the next one has come. In backward the next unit's is
    filled while a unit computes. The root's weights stay from its forward on, and the last layer's
    from its forward to its backward. Gradients are copied
    into a buffer in fp32, which lives until the next unit is reduced. Inside an accumulation they
    stay whole, in fp32.
    """
    size = storage.world_size
    whole = {number: unit.gathered(size, compute_bytes) for number, unit in units.items()}
    flat = whole if size > 1 else dict.fromkeys(whole, 0)
    last_flat = flat[ROOT]
    last = _highest(units)
    stays = 0
    pending = reduced = 0
    summed = {
        number: 4 * sum(math.prod(shape) for shape in unit.trained) if storage.accumulates else 0
        for number, unit in units.items()
    }
    for moment in moments:
        unit = moment.unit
        if unit == last and moment.phase == "backward":
            stays = 0  # counted as its own
        gathered, buffers, weights = whole[ROOT] + stays, 0, held.parameter_bytes
        if unit == last and moment.phase == "forward" and units[last].in_backward:
            stays = whole[last]
        if moment.phase == "forward":
            if unit != ROOT:
                gathered += whole[unit] + flat[unit]
                last_flat = flat[unit]
            else:
                gathered += last_flat
        elif moment.phase == "loss":
            pass  # only weights that stay are still there
        elif moment.phase == "backward":
            below = unit - 1 if unit != ROOT else ROOT
            ahead = flat[below] if below >= 0 and units[below].in_backward else 0
            gathered += whole[unit] if unit != ROOT else 0
            gathered += ahead
            buffers = pending
        else:
            buffers = units[unit].reduced(size)
            pending = buffers
            reduced += buffers // size
            summed[unit], buffers = 0, buffers + summed[unit]
            below = unit - 1
            gathered += flat[below] if below >= 0 and units[below].in_backward else 0
        yield Instant(
            moment.phase,
            weights,
            reduced,
            held.optimizer_state_bytes,
            gathered,
            buffers + sum(summed.values()),
            moment.live_bytes,
        )
    buffers = max(pending, held.orthogonalise_bytes)
    yield Instant(
        "update", held.parameter_bytes, reduced, held.optimizer_state_bytes, 0, buffers, 0
    )


def _deepspeed(
    held: Held,
    moments: Sequence[Moment],
    units: Mapping[int, Unit],
    storage: Storage,
    compute_bytes: int,
) -> Iterator[Instant]:
    """Stages 1 and 2: whole weights; whole gradients until the backward ends, when they are copied
    into a bucket in fp32, and that once more for the sum; stage 1 also makes a rank's part.

    Stage 3 gathers weights into a flat buffer, copies them out, and lets go of neither before the
    last module of the buffer has run.
    """
    size = storage.world_size
    state = 0 if storage.offloads else held.optimizer_state_bytes
    trained = sum(math.prod(shape) for unit in units.values() for shape in unit.trained)
    part = padded_numel(trained, size) // size
    bucket = 4 * trained
    everything = sum(math.prod(s) for unit in units.values() for s in unit.shapes)
    stage_3 = storage.stage == 3
    weights = held.parameter_bytes
    gathered = 0
    if stage_3:
        numels = [math.prod(shape) for unit in units.values() for shape in unit.trained]
        kept = sum(numel for numel in numels if numel <= PERSISTENT)
        arriving = min(everything - kept, _PREFETCHED)
        weights -= storage.weight_bytes * kept  # they count as gathered
        gathered = compute_bytes * (min(everything, _MAX_LIVE) + arriving)
    whole = 0  # gradients of units whose backward is over
    for moment in moments:
        copies = 1 if stage_3 or moment.phase in ("backward", "reduce") else 0
        own = 4 * part if stage_3 else whole
        if moment.phase == "reduce" and not stage_3:
            numels = [math.prod(shape) for shape in units[moment.unit].trained]
            whole += compute_bytes * sum(numels)
            own += 4 * part if storage.stage == 1 else 0
            copies = 2
        yield Instant(
            moment.phase,
            weights,
            own,
            state,
            gathered,
            copies * bucket,
            moment.live_bytes,
        )
    yield Instant("update", weights, bucket + 4 * part, state, gathered, 4 * part, 0)


def _highest(units: Mapping[int, Unit]) -> int:
    return max(units)
