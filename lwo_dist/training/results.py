"""What a run has achieved so far: survives restarts in state.json and ends as summary.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..tasks.metrics import paired_interval
from .evaluate import Evaluation

__all__ = ["Results"]

_PER_LINE = ("loss", "exact_match", "edit_similarity")


class Results:
    """Collects metrics and evaluations; equal on every rank. Rank 0 writes the evaluations' lines to disk."""

    def __init__(self, folder: Path, metric: str, *, writes: bool):
        self.folder, self.metric, self._writes = folder, metric, writes
        self.evaluations: dict[int, dict[str, float]] = {}
        self.training_seconds = 0.0
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
        # What is sent differs from layer to layer; the mean over the logged stretches.
        sent, count = self.peaks.get("comm/sum", 0.0), self.peaks.get("comm/count", 0.0)
        self.peaks |= {"comm/sum": sent + metrics["comm/bytes_per_step"], "comm/count": count + 1}

    def add_evaluation(self, step: int, evaluation: Evaluation) -> None:
        self.evaluations[step] = dict(evaluation.scores)
        if not self._writes:
            return
        path = self._path(step)
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = {name: getattr(evaluation, name).round(6).tolist() for name in _PER_LINE}
        samples = [vars(sample) for sample in evaluation.samples]
        text = json.dumps({"scores": evaluation.scores, "lines": lines, "samples": samples})
        temporary = path.with_suffix(".tmp")
        temporary.write_text(text)
        temporary.rename(path)

    @property
    def best_step(self) -> int:
        """The trained step with the best score; 0 before the first evaluation after training began."""
        sign = 1 if self.metric == "loss" else -1
        trained = [step for step in self.evaluations if step > 0]
        return min(trained, key=lambda step: sign * self.evaluations[step][f"eval/{self.metric}"], default=0)

    def gains(self) -> dict[str, dict[str, float]]:
        """Per-line differences, best checkpoint minus before: mean and 95 % interval; better is above 0."""
        before, after = (json.loads(self._path(step).read_text())["lines"] for step in (0, self.best_step))
        gains = {}
        for name in _PER_LINE:
            sign = -1 if name == "loss" else 1
            mean, low, high = paired_interval(sign * np.array(before[name]), sign * np.array(after[name]))
            gains[name] = {"mean": mean, "low": low, "high": high}
        return gains

    def state_dict(self) -> dict[str, Any]:
        return {
            "evaluations": {str(step): scores for step, scores in self.evaluations.items()},
            "training_seconds": self.training_seconds,
            "tokens": self.tokens,
            "losses": self.losses,
            "peaks": self.peaks,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.evaluations = {int(step): scores for step, scores in state_dict["evaluations"].items()}
        self.training_seconds, self.tokens = state_dict["training_seconds"], state_dict["tokens"]
        self.losses, self.peaks = list(state_dict["losses"]), dict(state_dict["peaks"])

    def _path(self, step: int) -> Path:
        return self.folder / "evaluations" / f"step_{step:06d}.json"
