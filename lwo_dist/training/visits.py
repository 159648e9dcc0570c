"""What each visit of a layer gained and cost: the metrics `visit/*`, one set per visit."""

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
    """A finished visit."""

    step: int
    """Optimizer steps of the run at its end."""
    layer: str
    metrics: dict[str, float]
    """`visit/...`; values that could not be measured are missing."""


class _Sums:
    """Sums of one visit on the device; nothing is read before the visit is reported.

    Attributes:
        shared: [4] float64, equal on all ranks, over the steps that were not skipped: count, sum
            of x, sum of x^2, sum of gradient norms; x = step in the visit.
        own: [3] float64, this rank's share, over the same steps: sum of y, sum of x y, with
            y = loss; then the squared change of the masters, NaN if unknown.
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


def _on_host(tensor: Tensor) -> Tensor:
    """A copy that the device makes in its own order: only what it does later may read it."""
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=torch.cuda.is_available())
    return copy.copy_(tensor, non_blocking=True)


@dataclass(frozen=True)
class _Over:
    """A finished visit that has not been reported yet."""

    step: int
    layer: str
    seconds: float
    sums: _Sums


class Visits:
    """Follows every optimizer step on every rank: `begin_step`, the hook's `before_switch`,
    `after_step`.

    A run with one layer (full fine-tuning) has no visits. After a restart within a visit the rest
    of it is measured, except for the change of its weights. Host memory: a copy of this rank's
    master shards of the active layer.
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
        """This rank's masters at the start of the current visit, on the host; [] if unknown."""
        return self._masters_before

    def begin_step(self) -> None:
        """Call before the forward pass."""
        self._step_in_visit = self._lwo.step_in_visit
        if self._has_visits and self._step_in_visit == 0:
            self._masters_before = [_on_host(shard) for shard in self._lwo.masters()]

    def before_switch(self) -> None:
        """Call after the last update of a visit, while its layer is still active."""
        if not self._masters_before:
            return
        square = torch.zeros((), dtype=torch.float64, device=self._device)
        for before, after in zip(self._masters_before, self._lwo.masters(), strict=True):
            square += (
                (after - before.to(after.device, non_blocking=True)).norm().to(square).square()
            )
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
        """Exclude an evaluation or a save from the current visit's time."""
        self._started += seconds

    def take(self) -> list[Visit]:
        """The visits that have ended since the last call; a collective if there are any.

        Equal on all ranks except for the seconds, which are this rank's.
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
    """Decrease of the least-squares line through the losses from the first step to the last.

    Uses every step, so it is less noisy than the difference of two losses. NaN with fewer than two
    steps.
    """
    spread = n * xx - x * x
    return -(n * xy - x * y) / spread * (n - 1) if spread > 0 else math.nan
