"""Measures training alongside the loop: time, tokens, loss, memory, visits.

`begin_step` and `after_step` never wait for the device; `read`, called every logging step, does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from lwo_dist import distributed
from lwo_dist.hook import LWO, StepReport
from lwo_dist.memory import peak_bytes

from .results import Results
from .system_metrics import SystemMetrics
from .visits import Visit, Visits

__all__ = ["Meter", "Reading"]

_MAX_RANKS = 64  # that report points of their own; MLflow draws a chart for each


@dataclass(frozen=True)
class Reading:
    """What was measured since the previous reading."""

    metrics: dict[str, float]
    """By the names in the spool, which tracking/README.md lists. Memory and switch times are the
    maximum over ranks; other times are this rank's.
    """
    visits: list[Visit]
    """Visits that have ended, as `visit/...`."""
    step_seconds: float
    """That of the slowest rank; equal on all ranks."""
    save_is_written: bool
    """Whether any rank reported it; equal on all ranks."""


class Meter:
    """Every rank has one and reports every step to it. It registers itself as `lwo.before_switch`.

    Args:
        results: the totals over restarts, to which the meter adds time and tokens.
        system: the load of every node.
        device: where the losses are.
        clock: seconds, as `time.perf_counter`.
    """

    def __init__(
        self,
        lwo: LWO,
        results: Results,
        system: SystemMetrics,
        device: torch.device,
        *,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._lwo = lwo
        self._results = results
        self._system = system
        self._device = device
        self._clock = clock
        self._visits = Visits(lwo, device, clock)
        self._report: StepReport | None = None
        self._memory_before_switch: dict[str, int] = {}
        lwo.before_switch = self._before_switch
        self.restart()

    def restart(self) -> None:
        """Start a new reading."""
        self._started = self._clock()
        self._first_step = self._lwo.step_count
        self._first_switch_seconds = self._lwo.switch_seconds
        self._tokens = 0
        self._counted = (0.0, 0)
        self._loss = torch.zeros((), device=self._device)

    @property
    def steps(self) -> int:
        """Optimizer steps since the last `restart`."""
        return self._lwo.step_count - self._first_step

    def begin_step(self) -> None:
        """Call before the forward pass."""
        self._visits.begin_step()

    def after_step(self, loss: Tensor, tokens: int, report: StepReport) -> None:
        """Call after the hook's step.

        Args:
            loss: this rank's share of the step's loss, 0-dim, on the device.
            tokens: the number in the whole global batch.
        """
        self._loss += loss
        self._tokens += tokens
        self._report = report
        self._visits.after_step(loss, report)

    @contextmanager
    def off_the_clock(self) -> Iterator[None]:
        """Exclude evaluations and saves from the training time; the results then hold that of all
        steps so far. Waits for the device.
        """
        self._count()
        started = self._clock()
        try:
            yield
        finally:
            seconds = self._clock() - started
            self._started += seconds
            self._visits.pause(seconds)

    def read(self, *, save_is_written: bool = False) -> Reading:
        """Measure the steps since the last `restart`, at least one. A collective.

        Args:
            save_is_written: whether this rank knows that a save is done; all ranks learn of it.
        """
        assert self._report is not None and self._report.grad_norm is not None
        report = self._report
        loss = float(self._loss)
        elapsed = self._count()
        own = {
            "loss": loss,
            "elapsed": elapsed,
            "save_is_written": float(save_is_written),
            "time/switch_seconds": self._lwo.switch_seconds - self._first_switch_seconds,
            "memory/peak_bytes": float(peak_bytes(self._device)),
            **{f"memory/{name}": float(size) for name, size in self._memory().items()},
        }
        rows = distributed.gather_floats([*own.values(), *self._system.read()], self._device)
        own_rows = [row[: len(own)] for row in rows]
        system_rows = [row[len(own) :] for row in rows]
        ranks = dict(zip(own, zip(*own_rows, strict=True), strict=True))
        metrics = {
            "train/loss": sum(ranks["loss"]) / self.steps,
            "train/learning_rate": report.lr,
            "train/grad_norm": float(self._report.grad_norm),
            "train/tokens_per_second": self._tokens / elapsed,
            "train/tokens": float(self._results.tokens),
            "train/elapsed_seconds": self._results.training_seconds,
            "train/skipped_steps": float(self._lwo.skipped_steps),
            "lwo/active_layer": float(self._index_of(report.layer)),
            "lwo/cycle": float(self._lwo.schedule.cycle(self._lwo.step_count - 1)),
            "comm/bytes_per_step": float(report.bytes_sent),
            "time/step_seconds": elapsed / self.steps,
            **{name: max(values) for name, values in ranks.items() if "/" in name},
            **_peak_of_each_rank(ranks["memory/peak_bytes"]),
            **self._system.metrics(system_rows),
        }
        return Reading(
            metrics=metrics,
            visits=self._visits.take(),
            step_seconds=max(ranks["elapsed"]) / self.steps,
            save_is_written=any(ranks["save_is_written"]),
        )

    def _count(self) -> float:
        """Add what is new to the results' totals. Returns: the seconds since the last `restart`."""
        if self.steps == 0:
            return 0.0
        float(self._loss)  # waits for the device, so that the time covers all its work
        elapsed = self._clock() - self._started
        seconds, tokens = self._counted
        self._results.add_time(elapsed - seconds, self._tokens - tokens)
        self._counted = (elapsed, self._tokens)
        return elapsed

    def _before_switch(self) -> None:
        self._visits.before_switch()
        self._memory_before_switch = self._lwo.memory()

    def _memory(self) -> dict[str, int]:
        """Memory of this rank while a layer trains.

        Right after a switch the new layer has no moments yet: then the values of the previous
            layer.
        Excludes the host copy of the masters that a visit's change is measured against and, on a
        GPU, the next layer's parks, which are on the device in the last step of a visit.
        """
        now = self._lwo.memory()
        if self._memory_before_switch and self._lwo.step_in_visit == 0:
            return {**self._memory_before_switch, "park_bytes": now["park_bytes"]}
        return now

    def _index_of(self, layer: str) -> int:
        return [layer.name for layer in self._lwo.layers].index(layer)


def _peak_of_each_rank(peaks: Sequence[float]) -> dict[str, float]:
    return {f"memory/ranks/peak_bytes_{rank}": peak for rank, peak in enumerate(peaks[:_MAX_RANKS])}
