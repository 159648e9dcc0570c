"""The events of a run. Progress lines, MLflow and Ray's gauges are subclasses of `Callback`.

A callback runs on rank 0 only, takes part in no collective, and receives plain Python values.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .run_info import RunInfo

__all__ = ["Callback", "RunInfo"]


class Callback:
    """Override the events you need; by default each does nothing.

    >>> class Print(Callback):
    ...     def on_switch(self, step: int, layer: str) -> None:
    ...         print(f"step {step}: {layer}")
    """

    def on_run_start(self, info: RunInfo) -> None:
        """Model, data and hook are ready; no step has been made yet."""

    def on_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Every `train.logging_steps` optimizer steps, by name: `train/loss`,
        `lwo/active_layer`, ...
        """

    def on_switch(self, step: int, layer: str) -> None:
        """After `step` optimizer steps, `layer` became active."""

    def on_visit(self, step: int, layer: str, metrics: Mapping[str, float]) -> None:
        """The visit of `layer` ended after `step` steps; the metrics are named `visit/...`.

        Reported together with the metrics of a later step.
        """

    def on_evaluation(self, step: int, scores: Mapping[str, float]) -> None:
        """`eval/<name>` for every score of the task, and the number of held-out examples."""

    def on_checkpoint(self, step: int, folder: Path) -> None:
        """A checkpoint was committed."""

    def on_run_end(self, summary: Mapping[str, Any]) -> None:
        """The run has finished; `summary` is the content of summary.json."""

    def on_run_stopped(self, reason: str) -> None:
        """The run was asked to stop and has saved a checkpoint; it can be resumed."""

    def on_run_failed(self, error: BaseException) -> None:
        """An exception ended the run; it is re-raised afterwards."""
