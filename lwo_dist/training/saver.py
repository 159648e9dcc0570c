"""Decides when a checkpoint is due and what it contains, and reports its outcome."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lwo_dist import distributed
from lwo_dist.callback import Callback
from lwo_dist.checkpoint.store import LayerStore, Outcome
from lwo_dist.config import Config
from lwo_dist.errors import UserError
from lwo_dist.hook import LWO

from .results import Results

__all__ = ["Saver"]


class Saver:
    """Saves at the end of a visit or every few steps; every rank has one.

    Args:
        about: checkpoint entries besides position, weights and results: `run`, the run it belongs
            to, and `data`, its examples.
        callbacks: on rank 0 only; empty elsewhere.
        on_commit: called on every rank, at the same place in the loop, for each committed
            checkpoint.
        checkpoint: the folder that training resumes from; None for a new run.
        clock: seconds, as `time.perf_counter`.
    """

    def __init__(
        self,
        config: Config,
        lwo: LWO,
        results: Results,
        store: LayerStore,
        *,
        about: Mapping[str, Mapping[str, Any]],
        callbacks: Sequence[Callback] = (),
        on_commit: Callable[[int, Path], None] = lambda step, folder: None,
        checkpoint: Path | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._settings = config.checkpoint
        self._lwo = lwo
        self._results = results
        self._store = store
        self._about = about
        self._callbacks = callbacks
        self._on_commit = on_commit
        self._clock = clock
        self._saved_at = clock()
        self._metrics: dict[str, float] = {}
        self.saved_step = lwo.step_count
        self.committed = checkpoint

    @property
    def is_written(self) -> bool:
        """Whether this rank knows that the pending save is done; no collective."""
        return self._store.poll()

    def is_due(self, step: int) -> bool:
        """Whether to save after `step` steps, equal on all ranks; a collective at a visit's end."""
        if self._settings.steps:
            return step % self._settings.steps == 0
        _, step_in_visit = self._lwo.schedule.position(step)
        if step_in_visit != 0:
            return False
        # Clocks differ between ranks: use rank 0's.
        waited = self._clock() - self._saved_at >= 60 * self._settings.minutes
        return distributed.broadcast_object(waited)

    def save(self) -> None:
        """Start a checkpoint of this step; return once it is copied to the host. A collective.

        Waits for the previous save if it is still pending.
        """
        started = self._clock()
        step = self._lwo.step_count
        self.settle()
        state = {
            **self._about,
            "data": {**self._about["data"], "next_step": step},
            "results": self._results.state_dict(),
        }
        self._store.save(self._lwo, state, best_step=self._results.best_step)
        self.saved_step = step
        self._saved_at = self._clock()
        self._results.blocked_seconds += self._saved_at - started

    def settle(self) -> Outcome | None:
        """Wait for the pending save and report its outcome on every rank. A collective."""
        outcome = self._store.wait()
        if outcome is None:
            return None
        if outcome.error:
            _warn_of_failure(outcome)
            return outcome
        self.committed = outcome.folder
        self._on_commit(outcome.step, outcome.folder)
        for callback in self._callbacks:
            callback.on_checkpoint(outcome.step, outcome.folder)
        self._metrics = {
            "checkpoint/bytes": float(outcome.bytes_written),
            "checkpoint/seconds": outcome.seconds,
        }
        return outcome

    def settle_last(self) -> None:
        """`settle` for the last save, whose failure no later checkpoint makes up for.

        Raises:
            UserError: the checkpoint could not be written.
        """
        outcome = self.settle()
        if outcome is not None and outcome.error:
            raise UserError(
                f"the last checkpoint could not be written ({outcome.error}); make room, and give"
                " the command again"
            )

    def take_metrics(self) -> dict[str, float]:
        """`checkpoint/...`, once per save, and the total time that saves have blocked the loop."""
        metrics = {
            **self._metrics,
            "time/checkpoint_blocked_seconds": self._results.blocked_seconds,
        }
        self._metrics = {}
        return metrics


def _warn_of_failure(outcome: Outcome) -> None:
    if distributed.rank() == 0:
        print(
            f"warning: the checkpoint of step {outcome.step} could not be written"
            f" ({outcome.error}); training goes on, and the next one holds what this one lacks",
            flush=True,
        )
