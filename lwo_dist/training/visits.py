"""What each visit of a layer brought and cost: the points `visit/*`, one set at the last step of a
visit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

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


class _Sums:
    """Of one visit, on the device: nothing is read before the visit is reported.

    Attributes:
        shared: [4] float64, equal on all ranks, over the steps that were not skipped: count, sum
            of x, sum of x^2, sum of gradient norms; x = step in the visit.
        own: [3] float64, this rank's share, over the same steps: sum of y, sum of x y, with
            y = loss; then the square of the change of the masters, NaN if it is not known.
    """

    def __init__(self, device: torch.device):
        self.shared = torch.zeros(4, dtype=torch.float64, device=device)
        self.own = torch.tensor([0.0, 0.0, math.nan], dtype=torch.float64, device=device)

    def add(self, x: int, loss: Tensor, report: StepReport) -> None:
        assert report.grad_norm is not None and report.skipped is not None
        counts = report.skipped.to(self.shared.device) == 0
        norm = report.grad_norm.to(self.shared)
        one = torch.ones_like(norm)
        self.shared += torch.where(counts, torch.stack([one, one * x, one * x * x, norm]), 0.0)
        y = loss.to(self.own)
        self.own[:2] += torch.where(counts, torch.stack([y, y * x]), 0.0)


@dataclass(frozen=True)
class _Over:
    """A visit that is over and not reported yet."""

    step: int
    layer: str
    seconds: float
    sums: _Sums


class Visits:
    """Follows every optimizer step, on every rank: `begin_step`, the hook's `before_switch`,
    `after_step`.

    A run of one layer (full fine-tuning) has no visits. After a restart in mid-visit the rest of it
    is measured, but for the change of its weights. Host memory: a copy of the active layer's
    masters, this rank's shards.
    """

    def __init__(self, lwo: LWO, device: torch.device, clock: Callable[[], float]):
        self._lwo = lwo
        self._device = device
        self._clock = clock
        self._has_visits = len(lwo.layers) > 1
        self._masters_before: list[Tensor] = []
        self._step_in_visit = 0
        self._sums = _Sums(device)
        self._over: list[_Over] = []
        self._started = clock()

    @property
    def masters_before(self) -> list[Tensor]:
        """This rank's masters as the present visit found them, on the host; [] if not known."""
        return self._masters_before

    def begin_step(self) -> None:
        """Call before the forward pass."""
        self._step_in_visit = self._lwo.step_in_visit
        if self._has_visits and self._step_in_visit == 0:
            self._masters_before = [shard.to("cpu", copy=True) for shard in self._lwo.masters()]

    def before_switch(self) -> None:
        """The last update of a visit is done, and its layer is still the active one."""
        if not self._masters_before:
            return
        square = torch.zeros((), dtype=torch.float64, device=self._device)
        for before, after in zip(self._masters_before, self._lwo.masters(), strict=True):
            square += (after - before.to(after.device)).norm().to(square).square()
        self._sums.own[2] = square
        self._masters_before = []

    def after_step(self, loss: Tensor, report: StepReport) -> None:
        """Call after the hook's step.

        Args:
            loss: this rank's share of the step's loss, 0-dim, on the device.
        """
        self._sums.add(self._step_in_visit, loss, report)
        if self._lwo.step_in_visit != 0 or not self._has_visits:
            return
        now = self._clock()
        seconds = now - self._started
        self._over.append(_Over(self._lwo.step_count, report.layer, seconds, self._sums))
        self._sums = _Sums(self._device)
        self._started = now

    def pause(self, seconds: float) -> None:
        """Take an evaluation or a save out of the current visit's time."""
        self._started += seconds

    def take(self) -> list[Visit]:
        """The visits that have ended since the last call, equal on all ranks but for the seconds,
        which are its own. A collective if there is one, else nothing.
        """
        if not self._over:
            return []
        own = distributed.all_reduce(torch.stack([visit.sums.own for visit in self._over]))
        shared = torch.stack([visit.sums.shared for visit in self._over])
        visits = [
            self._visit(over, *sums)
            for over, *sums in zip(self._over, own.tolist(), shared.tolist(), strict=True)
        ]
        self._over = []
        return visits

    def _visit(self, over: _Over, own: list[float], shared: list[float]) -> Visit:
        y, xy, change_square = own
        n, x, xx, norm = shared
        metrics = {
            "visit/layer": float([layer.name for layer in self._lwo.layers].index(over.layer)),
            "visit/loss_drop": _fall(n, x, xx, y, xy),
            "visit/grad_norm": norm / n if n else math.nan,
            "visit/change_norm": math.sqrt(change_square),
            "visit/seconds": over.seconds,
        }
        known = {name: value for name, value in metrics.items() if not math.isnan(value)}
        return Visit(over.step, over.layer, known)


def _fall(n: float, x: float, xx: float, y: float, xy: float) -> float:
    """How far the straight line of least squares through the losses falls from the first step to
    the last.

    Every step counts, so that it says more than a difference of two noisy losses. NaN below two
    steps.
    """
    spread = n * xx - x * x
    return -(n * xy - x * y) / spread * (n - 1) if spread > 0 else math.nan
