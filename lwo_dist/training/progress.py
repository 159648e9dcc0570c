"""Prints a plain line now and then, which suits job logs better than a progress bar."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lwo_dist.callback import Callback, RunInfo
from lwo_dist.tasks.scores import ScoreSheet
from lwo_dist.units import human_bytes, human_seconds

__all__ = ["Progress"]

_LINES = 30


class Progress(Callback):
    """Prints on rank 0; every line is complete and flushed immediately.

    Whatever the length of the run, about `_LINES` of the logged points become lines: the first two,
    then one whenever the steps have doubled, then one every thirtieth of the run. They name the
    newest save.
    """

    def on_run_start(self, info: RunInfo) -> None:
        self._info = info
        self._next_line = 0
        self._saved: list[int] = []
        self._sheet = ScoreSheet.read(info.task_record, ())
        self._say(
            f"{info.config.run_name}: {info.config.method} with {info.config.strategy} on"
            f" {info.world_size} {info.device} worker(s), {info.trained_parameters:,} of"
            f" {info.parameters:,} parameters in {len(info.layers)}"
            f" layer{'s' if len(info.layers) > 1 else ''},"
            f" {_sequences(info.data)},"
            f" {info.held_out_examples:,} held-out {self._sheet.example[1]}"
            + (f", from step {info.start_step}" if info.start_step else "")
        )

    def on_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        total = self._info.config.train.steps
        if step < self._next_line and step != total:
            return
        done = step - self._info.start_step
        self._next_line = step + min(done, math.ceil((total - self._info.start_step) / _LINES))
        # The most recent pace predicts the remaining time better than the first one.
        left = (total - step) * metrics["time/step_seconds"]
        layer = self._info.layers[int(metrics["lwo/active_layer"])]
        skipped = (
            f"  skipped {metrics['train/skipped_steps']:.0f}"
            if metrics["train/skipped_steps"]
            else ""
        )
        saved = f"  saved step {self._saved[-1]}" if self._saved else ""
        self._saved.clear()
        self._say(
            f"step {step}/{total}  loss {metrics['train/loss']:.4f}  lr"
            f" {metrics['train/learning_rate']:.2e}  {metrics['train/tokens_per_second']:,.0f}"
            f" tokens/s  layer {layer}  peak {human_bytes(metrics['memory/peak_bytes'])}  left"
            f" {human_seconds(left)}{skipped}{saved}"
        )

    def on_evaluation(self, step: int, scores: Mapping[str, float]) -> None:
        values = [
            f"{score.label} {score.show(scores[score.key])} {score.unit}".rstrip()
            for score in self._sheet.scores
        ]
        count = f"({scores[self._sheet.count_key]:.0f} held-out {self._sheet.example[1]})"
        self._say(f"evaluation at step {step}: {'  '.join([*values, count])}")

    def on_checkpoint(self, step: int, folder: Path) -> None:
        self._saved.append(step)

    def on_run_failed(self, error: BaseException) -> None:
        if not isinstance(error, KeyboardInterrupt):  # the command says how that ended
            self._say(f"the run failed: {type(error).__name__}")

    def _say(self, line: str) -> None:
        print(line, flush=True)


def _sequences(data: Mapping[str, Any]) -> str:
    if "packed_rows" not in data:
        return f"{data['windows']:,} training sequences"
    packed, unpacked = (
        data[name] / (data[name] + data["tokens"])
        for name in ("padding_tokens", "padding_tokens_unpacked")
    )
    return (
        f"{data['windows']:,} training examples packed in {data['packed_rows']:,} sequences"
        f" ({packed:.0%} padding, unpacked {unpacked:.0%})"
    )
