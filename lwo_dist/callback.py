"""The events of a run. The trainer knows only this class; progress lines and MLflow are subclasses.

A callback runs on rank 0 only, never joins a collective, and gets plain Python values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config import Config

__all__ = ["Callback", "RunInfo"]


@dataclass(frozen=True)
class RunInfo:
    """What is known of a run before its first step."""

    config: Config
    """The resolved configuration."""
    folder: Path
    """The run's folder, <storage>/<run_name>."""
    world_size: int
    layers: tuple[str, ...]
    """Names of the trained layers, in model order; `lwo/active_layer` is an index into it."""
    parameters: Mapping[str, Any]
    """Facts to log beside the config: parameter counts, device, library versions."""
    start_step: int
    """0, or the step that a resumed run goes on from."""
    layer_sizes: tuple[int, ...] = ()
    """Parameters of each layer."""
    hosts: tuple[str, ...] = ()
    """The hosts of all ranks, each once."""


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
        """`eval/<name>` of every score that the task names, and the number of held-out examples."""

    def on_checkpoint(self, step: int, folder: Path) -> None:
        """A checkpoint was committed."""

    def on_run_end(self, summary: Mapping[str, Any]) -> None:
        """The run ended well; `summary` is what summary.json holds."""

    def on_run_stopped(self, reason: str) -> None:
        """The run was asked to stop and has saved what it had; it may go on later."""

    def on_run_failed(self, error: BaseException) -> None:
        """The run ended by an exception, which is raised again afterwards."""
