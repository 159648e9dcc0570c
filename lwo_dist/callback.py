"""The events of a run. The trainer knows only this class; progress lines and MLflow are subclasses.

A callback runs on rank 0 only, never joins a collective, and gets plain Python values.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .run_info import RunInfo

__all__ = ["Callback", "RunInfo"]


class Callback:
    """Override what you need; every event is a no-op."""

    def on_run_start(self, info: RunInfo) -> None:
        """Model, data and hook are ready."""

    def on_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Every `train.logging_steps` optimizer steps: DESIGN's names (`train/loss`,
        `lwo/active_layer`, ...).
        """

    def on_switch(self, step: int, layer: str) -> None:
        """After `step` optimizer steps, `layer` became active."""

    def on_visit(self, step: int, layer: str, metrics: Mapping[str, float]) -> None:
        """With the metrics: the visit of `layer` that was over after `step` steps; names
        `visit/...`.
        """

    def on_evaluation(self, step: int, scores: Mapping[str, float]) -> None:
        """`eval/loss`, `eval/exact_match`, `eval/edit_similarity`, `eval/bleu`, `eval/lines`."""

    def on_checkpoint(self, step: int, folder: Path) -> None:
        """A checkpoint was committed."""

    def on_run_end(self, summary: Mapping[str, Any]) -> None:
        """The run ended well; `summary` is what summary.json holds."""

    def on_run_stopped(self, reason: str) -> None:
        """The run was asked to stop and has saved what it had; it may go on later."""

    def on_run_failed(self, error: BaseException) -> None:
        """The run ended by an exception, which is raised again afterwards."""
