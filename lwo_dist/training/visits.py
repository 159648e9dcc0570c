"""What each visit of a layer brought and cost: the points `visit/*`, one set at the last step of a
visit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lwo_dist import distributed
from lwo_dist.hook import LWO, StepReport

__all__ = ["Visit", "Visits"]


@dataclass(frozen=True)
class Visit:
    """One visit that is over."""

    step: int
    """Optimizer steps of the run when it was over."""
    layer: str
    metrics: dict[str, float]
    """`visit/...`; what could not be measured is left out."""


@dataclass
class _Sums:
    """Over the visit's steps that were not skipped, on the device: nothing is read before the visit
    is reported.
    """

    device: torch.device
    shared: Tensor = field(init=False)
    """[4] float64, equal on all ranks: count, sum of x, sum of x^2, sum of gradient norms; x = step
    in the visit.
    """
    losses: Tensor = field(init=False)
    """[2] float64, this rank's share: sum of y, sum of x y; y = loss."""

    def __post_init__(self) -> None:
        self.shared = torch.zeros(4, dtype=torch.float64, device=self.device)
        self.losses = torch.zeros(2, dtype=torch.float64, device=self.device)

    def add(self, x: int, loss: Tensor, report: StepReport) -> None:
        assert report.grad_norm is not None and report.skipped is not None
        counts = report.skipped.to(self.device) == 0
        norm = report.grad_norm.to(self.device, torch.float64)
        one = torch.ones_like(norm)
        self.shared += torch.where(counts, torch.stack([one, one * x, one * x * x, norm]), 0.0)
        y = loss.to(torch.float64)
        self.losses += torch.where(counts, torch.stack([y, y * x]), 0.0)


class Visits:
    """Fed with every optimizer step, on every rank; `take` is a collective if a visit is over, else
    nothing.

    A run of one layer (full fine-tuning) has no visits. After a restart in mid-visit the rest of it
    is measured.
    """

    def __init__(self, lwo: LWO, device: torch.device):
        self._lwo, self._device = lwo, device
        self._sums = _Sums(device)
        self._over: list[tuple[int, str, float, Tensor | None, _Sums]] = []
        self._started = time.perf_counter()

    def add(self, step: int, loss: Tensor, report: StepReport) -> None:
        """`step`: optimizer steps before this one; `loss`: this rank's share of its loss, 0-dim, on
        the device.
        """
        schedule = self._lwo.schedule
        place = schedule.position(step)[1]
        self._sums.add(place, loss, report)
        if place + 1 < schedule.steps_per_layer or len(self._lwo.layers) == 1:
            return
        now = time.perf_counter()
        self._over.append((step + 1, report.layer, now - self._started, None, self._sums))
        self._sums, self._started = _Sums(self._device), now

    def pause(self, seconds: float) -> None:
        """Take an evaluation or a save out of the current visit's time."""
        self._started += seconds

    def take(self) -> Iterator[Visit]:
        """The visits that have ended since the last call, equal on all ranks but for the seconds,
        which are its own.
        """
        over, self._over = self._over, []
        if not over:
            return
        losses = distributed.all_reduce(torch.stack([sums.losses for *_, sums in over])).tolist()
        shared = torch.stack([sums.shared for *_, sums in over]).tolist()
        names = [layer.name for layer in self._lwo.layers]
        for (step, layer, seconds, change, _), (y, xy), (n, x, xx, norm) in zip(
            over, losses, shared, strict=True
        ):
            metrics = {
                "visit/layer": float(names.index(layer)),
                "visit/loss_drop": _fall(n, x, xx, y, xy),
                "visit/grad_norm": norm / n if n else math.nan,
                "visit/change_norm": float(change) if change is not None else math.nan,
                "visit/seconds": seconds,
            }
            yield Visit(
                step,
                layer,
                {name: value for name, value in metrics.items() if not math.isnan(value)},
            )


def _fall(n: float, x: float, xx: float, y: float, xy: float) -> float:
    """How far the straight line of least squares through the losses falls from the first step to
    the last.

    Every step counts, so that it says more than a difference of two noisy losses. NaN below two
    steps.
    """
    spread = n * xx - x * x
    return -(n * xy - x * y) / spread * (n - 1) if spread > 0 else math.nan
