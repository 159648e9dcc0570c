"""A whole spool in memory, from which pictures, tables and the page are made."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from lwo_dist.memory import full_fine_tuning_bytes
from lwo_dist.run_info import LORA_RANK
from lwo_dist.spool import Record, points_of

__all__ = ["Band", "History", "Series", "Visit", "layer_bands"]

Series = Sequence[tuple[float, float]]
"""(x, y) in order of x; x is a step, or hours."""
Band = tuple[float, float, str]
"""From step, to step, the layer that was active between them."""


PARKS = "parks, in host memory"
MEMORY_PARTS = {
    "memory/parameter_bytes": "weights",
    "memory/gradient_bytes": "gradients",
    "memory/optimizer_state_bytes": "optimizer state",
    "memory/park_bytes": PARKS,
}


@dataclass(frozen=True)
class Visit:
    step: int
    layer: str
    metrics: Mapping[str, float]
    """`loss_drop`, `grad_norm`, `change_norm`, `seconds`, as far as they were measured."""


@dataclass
class History:
    """One run over all its attempts."""

    run: dict[str, Any] = field(default_factory=dict)
    """The fields of the newest start: run_name, layers, layer_sizes, parameters, tags, ..."""
    points: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    """Metric -> (step, value)."""
    restarts: list[int] = field(default_factory=list)
    """The step that each attempt but the first went on from."""
    status: str = "RUNNING"
    started_ms: int | None = None
    _switches: list[tuple[float, str]] = field(default_factory=list)

    @classmethod
    def read(cls, records: Iterable[Record]) -> History:
        history = cls()
        for record in records:
            if record.kind == "run":
                if history.run:
                    history.restarts.append(record.fields.get("start_step", 0))
                history.run = dict(record.fields)
                history.status = "RUNNING"
                history.started_ms = history.started_ms or record.time_ms
            elif record.kind == "switch":
                history._switches.append((record.fields["step"], record.fields["layer"]))
            elif record.kind == "end":
                history.status = record.fields["status"]
            for point in points_of(record):
                history.points.setdefault(point.name, []).append((point.step, point.value))
        return history

    @property
    def layers(self) -> list[str]:
        return list(self.run.get("layers", ()))

    def newest(self, name: str) -> float | None:
        series = self.points.get(name)
        return series[-1][1] if series else None

    def bands(self) -> list[Band]:
        """The active layer over the steps, up to the last loss."""
        losses = [*self.points.get("train/loss", ()), *self.points.get("eval/loss", ())]
        if not losses:
            return []
        switches = list(self._switches)
        layers = self.layers
        # Before the first switch the active layer is known from the points alone.
        first = min((step for step, _ in switches), default=math.inf)
        early = [value for step, value in self.points.get("lwo/active_layer", ()) if step <= first]
        if early and 0 <= early[0] < len(layers) and first > 0:
            switches.append((0, layers[int(early[0])]))
        return layer_bands(switches, max(step for step, _ in losses))

    def hours(self, name: str) -> list[tuple[float, float]] | None:
        """A metric over the hours of training; None if a point has no time, or a restart set the
        clock back.
        """
        clock = dict(self.points.get("train/elapsed_seconds", ()))
        series = self.points.get(name, [])
        if any(step not in clock for step, _ in series) or any(
            a > b for a, b in pairwise(clock.values())
        ):
            return None
        return [(clock[step] / 3600, value) for step, value in series]

    def full_fine_tuning(self) -> float | None:
        """Bytes that full fine-tuning would need at least; None for a run that is one, or that
        lacks the points.
        """
        sizes = self.run.get("layer_sizes") or ()
        total = self.run.get("model_size")
        if len(sizes) < 2 or not total:
            return None
        names = ("memory/gradient_bytes", "memory/optimizer_state_bytes", "lwo/active_layer")
        gradient, state, active = (dict(self.points.get(name, ())) for name in names)
        # Every step gives a lower bound; the highest of them is one too.
        return max(
            (
                full_fine_tuning_bytes(
                    peak, gradient[step], state[step], sizes[int(active[step])], total
                )
                for step, peak in self.points.get("memory/peak_bytes", ())
                if step in gradient and step in state and step in active
            ),
            default=None,
        )

    def memory_parts(self) -> dict[str, dict[str, float]]:
        """Method -> part -> bytes of the fullest worker: this run as measured, others as computed.

        The others take this run's weights, and its gradients and optimizer state for each parameter
        that they train. Nothing is known of their activations. {} without the points.
        """
        if not self.points.get("memory/parameter_bytes"):
            return {}
        own = {
            part: max(y for _, y in self.points[name])
            for name, part in MEMORY_PARTS.items()
            if self.points.get(name)
        }
        if (peak := self.points.get("memory/peak_bytes")) and self.run.get("device") != "CPU":
            on_device = sum(size for part, size in own.items() if part != PARKS)
            own["activations and the rest"] = max(0.0, max(y for _, y in peak) - on_device)
        parts = {"this run (measured)": own}
        sizes = self.run.get("layer_sizes") or ()
        total = self.run.get("model_size")
        if len(sizes) < 2 or not total:
            return parts
        names = ("memory/gradient_bytes", "memory/optimizer_state_bytes")
        active = dict(self.points.get("lwo/active_layer", ()))
        per_parameter = [
            max(
                (y / sizes[int(active[x])] for x, y in self.points.get(name, ()) if x in active),
                default=0.0,
            )
            for name in names
        ]
        weights = own[MEMORY_PARTS["memory/parameter_bytes"]]
        lora = self.run.get("lora_size") or 0
        for method, trained, added in (
            (f"LoRA, rank {LORA_RANK} (computed)", lora, lora),
            ("full fine-tuning (computed)", total, 0),
        ):
            if trained:
                parts[method] = {
                    "weights": weights * (total + added) / total,
                    "gradients": per_parameter[0] * trained,
                    "optimizer state": per_parameter[1] * trained,
                }
        return parts

    def visits(self) -> list[Visit]:
        """The visits that were reported, in order."""
        by_step: dict[float, dict[str, float]] = {}
        for name, series in self.points.items():
            if name.startswith("visit/"):
                for step, value in series:
                    by_step.setdefault(step, {})[name.removeprefix("visit/")] = value
        layers = self.layers
        return [
            Visit(int(step), layers[int(metrics["layer"])], metrics)
            for step, metrics in sorted(by_step.items())
            if metrics.get("layer", -1) in range(len(layers))
        ]


def layer_bands(switches: Sequence[tuple[float, str]], last_step: float) -> list[Band]:
    """Turn `(after step, layer)` switches into bands up to `last_step`; adjacent bands of one layer
    are merged.
    """
    bands: list[Band] = []
    for (start, layer), (end, _) in pairwise([*sorted(switches), (last_step, "")]):
        if end <= start:
            continue
        if bands and bands[-1][2] == layer and bands[-1][1] == start:
            bands[-1] = (bands[-1][0], end, layer)
        else:
            bands.append((start, end, layer))
    return bands
