"""When each layer is active, and at which learning rate: pure functions of the step.

A step is an optimizer step, counted from 0. Nothing here holds state or draws from a global
generator, so all ranks agree without communicating and a resume needs only the step.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache

from .config import LWOConfig
from .errors import UserError

__all__ = ["LayerSchedule", "learning_rate", "make_schedule"]


@dataclass(frozen=True)
class LayerSchedule:
    """Which of `num_layers` layers is active at a step; a visit lasts `steps_per_layer` steps."""

    num_layers: int
    steps_per_layer: int
    order: str = "ascending"
    seed: int = 0
    weights: tuple[float, ...] = ()
    """`order: weighted` only: the relative frequency of each layer."""
    repeats_batches: bool = False
    """`batches: cycle`."""

    def active_layer(self, step: int) -> int:
        visit, _ = self.position(step)
        cycle, position = divmod(visit, self.num_layers)
        return self._order_of(cycle)[position]

    def position(self, step: int) -> tuple[int, int]:
        """(index of the visit, step within the visit)."""
        return divmod(step, self.steps_per_layer)

    def batch(self, step: int) -> int:
        """The index of the batch that `step` trains on: `step` itself, or, if all layers of a cycle
        are trained on the same batches, one of `steps_per_layer` new ones for each cycle.
        """
        if not self.repeats_batches:
            return step
        return self.cycle(step) * self.steps_per_layer + self.position(step)[1]

    def num_batches(self, steps: int) -> int:
        """How many different batches a run of `steps` steps trains on."""
        if not self.repeats_batches:
            return steps
        cycles, rest = divmod(steps, self.steps_per_cycle)
        return cycles * self.steps_per_layer + min(rest, self.steps_per_layer)

    def cycle(self, step: int) -> int:
        return step // self.steps_per_cycle

    @property
    def steps_per_cycle(self) -> int:
        return self.steps_per_layer * self.num_layers

    def last_active(self, layers: Collection[int], step: int) -> int:
        """Steps done when one of `layers` was last active in the first `step` steps; 0: never."""
        if not layers:
            return 0
        for visit in range((step - 1) // self.steps_per_layer, -1, -1):
            if self.active_layer(visit * self.steps_per_layer) in layers:
                return min(step, (visit + 1) * self.steps_per_layer)
        return 0

    def never_active(self, steps: int) -> list[int]:
        """Layers that a run of `steps` steps never reaches."""
        visits = -(-steps // self.steps_per_layer)
        active = {self.active_layer(visit * self.steps_per_layer) for visit in range(visits)}
        return [layer for layer in range(self.num_layers) if layer not in active]

    def _order_of(self, cycle: int) -> Sequence[int]:
        return _cycle_order(self.num_layers, self.order, self.seed, self.weights, cycle)


@lru_cache(maxsize=256)
def _cycle_order(
    num_layers: int, order: str, seed: int, weights: tuple[float, ...], cycle: int
) -> tuple[int, ...]:
    layers = list(range(num_layers))
    if order == "descending":
        layers.reverse()
    elif order == "random":
        random.Random(f"{seed}/{cycle}").shuffle(layers)
    elif order == "weighted":
        layers = random.Random(f"{seed}/{cycle}").choices(layers, weights, k=num_layers)
    return tuple(layers)


def make_schedule(config: LWOConfig, layer_names: Sequence[str]) -> LayerSchedule:
    """The schedule that `config` defines over the named layers.

    Raises:
        UserError: `layer_weights` names an unknown layer.
    """
    for name in config.layer_weights:
        if name not in layer_names:
            raise UserError(
                f"lwo.layer_weights names {name!r}; the trained layers are {', '.join(layer_names)}"
            )
    weights = (
        tuple(config.layer_weights.get(name, 1.0) for name in layer_names)
        if config.layer_weights
        else ()
    )
    return LayerSchedule(
        len(layer_names),
        config.steps_per_layer,
        config.order,
        config.seed,
        weights,
        repeats_batches=config.batches == "cycle",
    )


def learning_rate(config: LWOConfig, schedule: LayerSchedule, step: int) -> float:
    """The learning rate of `step`: warm-up and decay over the run, cycle or visit, times the ramp.

    Neither the first nor the last step of a span has rate 0: a warm-up of n steps starts at lr/n,
    and a decay over N steps ends at its value for step N-1 of N. A ramp of n steps multiplies by
    1/n, 2/n, ... 1 at the start of each visit, because Adam's first step after a reset moves every
    weight by the full rate.
    """
    _, step_in_visit = schedule.position(step)
    length: int | None
    if config.lr_schedule_over == "visit":
        offset = step_in_visit
        length = config.steps_per_layer
    elif config.lr_schedule_over == "cycle":
        offset = step % schedule.steps_per_cycle
        length = schedule.steps_per_cycle
    else:
        offset = step
        length = config.max_steps
    rate = config.peak_lr * _shape(config, offset, length)
    if config.visit_ramp_steps:
        rate *= min(1.0, (step_in_visit + 1) / config.visit_ramp_steps)
    return rate


def _shape(config: LWOConfig, offset: int, length: int | None) -> float:
    kind = config.lr_scheduler_type
    if kind == "auto":
        kind = "constant" if length is None else "linear"
    if offset < config.warmup_steps:
        return (offset + 1) / config.warmup_steps
    if kind == "constant":
        return 1.0
    if length is None:
        raise UserError(
            f"lr_scheduler_type: {kind} over the run needs its length; set max_steps, or"
            " lr_schedule_over: cycle or visit"
        )
    done = min(1.0, (offset - config.warmup_steps) / max(1, length - config.warmup_steps))
    return 1.0 - done if kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
