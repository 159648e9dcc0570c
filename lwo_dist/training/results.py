"""A run's results so far: kept across restarts in state.json, finally written to summary.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lwo_dist.files import write_whole
from lwo_dist.redaction import redact_values
from lwo_dist.tasks.base import Task
from lwo_dist.tasks.comparison import changes, gains, score_rows
from lwo_dist.tasks.scores import ScoreSheet
from lwo_dist.units import human_bytes, human_seconds

from .evaluate import Evaluation

__all__ = ["Results", "format_summary"]

_LABEL_WIDTH = 24


class Results:
    """Collects metrics and evaluations; equal on every rank. Rank 0 writes the evaluations to disk.

    Args:
        folder: the run's folder.
        metric: the name of the score of `task` that selects the best checkpoint.
        with_samples: also write source lines and completions.
    """

    def __init__(
        self, folder: Path, task: Task, metric: str, *, writes: bool, with_samples: bool = True
    ):
        self.folder = folder
        self.task = task
        self.metric = metric
        self._writes = writes
        self._with_samples = with_samples
        self.evaluations: dict[int, dict[str, float]] = {}
        self.costs: dict[int, dict[str, float]] = {}
        """Step of each evaluation -> `training_seconds` and `tokens` up to it."""
        self.training_seconds = 0.0
        self.blocked_seconds = 0.0
        """Time that saves blocked the loop; not in `training_seconds`."""
        self.tokens = 0
        self.losses: list[float] = []
        self.peaks: dict[str, float] = {}

    def add_time(self, seconds: float, tokens: int) -> None:
        self.training_seconds += seconds
        self.tokens += tokens

    def add_metrics(self, metrics: Mapping[str, float]) -> None:
        self.losses.append(metrics["train/loss"])
        for name in ("memory/peak_bytes", "memory/optimizer_state_bytes"):
            self.peaks[name] = max(self.peaks.get(name, 0.0), metrics[name])
        # The volume differs between layers: take the mean over the logged readings.
        sent, count = self.peaks.get("comm/sum", 0.0), self.peaks.get("comm/count", 0.0)
        self.peaks |= {"comm/sum": sent + metrics["comm/bytes_per_step"], "comm/count": count + 1}

    def add_evaluation(self, step: int, evaluation: Evaluation) -> None:
        self.evaluations[step] = dict(evaluation.scores)
        self.costs[step] = {"training_seconds": self.training_seconds, "tokens": self.tokens}
        if not self._writes:
            return
        lines = {name: column.round(6).tolist() for name, column in evaluation.columns.items()}
        samples = [redact_values(vars(sample)) for sample in evaluation.samples]
        if not self._with_samples:
            samples = []
        record = {
            "scores": evaluation.scores,
            "cost": self.costs[step],
            "lines": lines,
            "tokens": evaluation.tokens.tolist(),
            "bytes": evaluation.bytes.tolist(),
            "samples": samples,
        }
        self._write(step, record)

    def take_evaluation(self, step: int, record: Mapping[str, Any]) -> None:
        """Add an evaluation that another run has written."""
        self.evaluations[step] = dict(record["scores"])
        self.costs[step] = dict(record["cost"])
        if self._writes:
            self._write(step, record)

    @property
    def best_step(self) -> int:
        """The trained step with the best score; 0 before the first evaluation of a trained step."""
        return self.task.score_named(self.metric).best_step(self.evaluations)

    @property
    def stalled(self) -> int:
        """Evaluations since that of the best step."""
        return sum(step > self.best_step for step in self.evaluations)

    def gains(self) -> dict[str, dict[str, float]]:
        """The gain of the best checkpoint over the base model, as in `tasks.comparison.gains`."""
        return gains(self.task.sheet, self._read(0), self._read(self.best_step))

    def changed(self) -> dict[str, dict[str, int]]:
        """Score -> how many examples became right (`gained`) and wrong (`lost`)."""
        found = changes(self.task.sheet, self._read(0), self._read(self.best_step))
        return {
            name: {change: len(indices) for change, indices in by_change.items()}
            for name, by_change in found.items()
        }

    @property
    def curve(self) -> list[dict[str, float]]:
        """By step, for each evaluation: `step`, `training_seconds` and `tokens` up to it, and its
        scores, `eval/<name>`. Evaluations and saves are not in the time.

        Lacks the evaluations of a run that an older version, which kept no costs, began.
        """
        return [
            {"step": step, **self.costs[step], **self.evaluations[step]}
            for step in sorted(self.costs)
        ]

    def summary(self) -> dict[str, Any]:
        """The measured part of summary.json.

        `after` holds the scores of the best checkpoint, which is exported; `scores` and `example`
        say how to display them.
        """
        stretch = max(1, len(self.losses) // 10)
        return {
            "tokens": self.tokens,
            "training_seconds": self.training_seconds,
            "tokens_per_second": self.tokens / self.training_seconds,
            "checkpoint_blocked_seconds": self.blocked_seconds,
            "peak_memory_bytes": int(self.peaks["memory/peak_bytes"]),
            "optimizer_state_bytes": int(self.peaks["memory/optimizer_state_bytes"]),
            "comm_bytes_per_step": self.peaks["comm/sum"] / self.peaks["comm/count"],
            "loss_first": sum(self.losses[:stretch]) / stretch,
            "loss_last": sum(self.losses[-stretch:]) / stretch,
            "eval": {
                "before": self.evaluations[0],
                "after": self.evaluations[self.best_step],
                "best_step": self.best_step,
                "gain_95": self.gains(),
                "changed": self.changed(),
                "curve": self.curve,
                **self.task.sheet.record(),
            },
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "evaluations": {str(step): scores for step, scores in self.evaluations.items()},
            "costs": {str(step): cost for step, cost in self.costs.items()},
            "training_seconds": self.training_seconds,
            "blocked_seconds": self.blocked_seconds,
            "tokens": self.tokens,
            "losses": self.losses,
            "peaks": self.peaks,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.evaluations = {int(step): scores for step, scores in state_dict["evaluations"].items()}
        self.costs = {int(step): cost for step, cost in state_dict.get("costs", {}).items()}
        self.training_seconds = state_dict["training_seconds"]
        self.tokens = state_dict["tokens"]
        self.blocked_seconds = state_dict["blocked_seconds"]
        self.losses = list(state_dict["losses"])
        self.peaks = dict(state_dict["peaks"])

    def _write(self, step: int, record: Mapping[str, Any]) -> None:
        path = self._path(step)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(record).encode())

    def _read(self, step: int) -> dict[str, Any]:
        record: dict[str, Any] = json.loads(self._path(step).read_text())
        return record

    def _path(self, step: int) -> Path:
        return self.folder / "evaluations" / f"step_{step:06d}.json"


def format_summary(summary: dict[str, Any]) -> str:
    """The summary as text: scores before and after, cost, and the path of the model."""
    scores = summary["eval"]
    before, after = scores["before"], scores["after"]
    sheet = ScoreSheet.read(scores, after)
    early = summary.get("ended_early")
    rows = score_rows(sheet, before, after, scores["gain_95"], scores.get("changed", {}))
    width = max(_LABEL_WIDTH, *(len(label) + 1 for label, *_ in rows))
    table = [
        f"{label:<{width}}{start:>10}{end:>10}   {gain}".rstrip()
        for label, start, end, gain in rows
    ]
    return "\n".join(
        [
            *table,
            (
                f"training time {human_seconds(summary['training_seconds'])} for {summary['steps']}"
                f" steps, {summary['tokens_per_second']:,.0f} tokens/s on average; saves blocked"
                f" training for {human_seconds(summary['checkpoint_blocked_seconds'])}"
            ),
            (
                f"peak memory {human_bytes(summary['peak_memory_bytes'])} per worker (optimizer"
                f" state: {human_bytes(summary['optimizer_state_bytes'])}); sent"
                f" {human_bytes(summary['comm_bytes_per_step'])} per step"
            ),
            *([f"ended early, at step {summary['steps']}: {early}"] if early else []),
            f"model: {summary['export']}",
        ]
    )
