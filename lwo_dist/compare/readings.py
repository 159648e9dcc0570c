"""What is read from the runs of a comparison.

Scores are those of a run's last step: the best of several evaluations would be chosen on the
examples that it is scored on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any

import numpy as np

from lwo_dist.checkpoint.schema import read_json
from lwo_dist.storage import RunFolder
from lwo_dist.tasks.comparison import gains
from lwo_dist.tasks.scores import ScoreSheet

__all__ = ["differences", "finished", "means", "row_of", "time_to_loss"]

LOSS = "loss"
Row = dict[str, Any]


def finished(run_folder: RunFolder) -> bool:
    """Whether the run has written its summary."""
    run_folder.fetch_small()
    return run_folder.file("summary.json").is_file()


def row_of(run_folder: RunFolder) -> Row:
    """The figures of a finished run.

    Returns:
        Names and values of the columns: `base_model`, `device`, `world_size`, `steps`, `tokens`,
        seconds (`training_seconds`, `step_seconds`), bytes (`peak_memory_bytes`,
        `optimizer_state_bytes`, `bytes_sent_per_step`, `serve_bytes`), `count` (the score that
        counts the examples), `labels` and `headings` of the scores by name, scores by name without
        `eval/` (`before`, `scores`), and `curve`: for each evaluation `step`, `training_seconds`
        and `scores`.
    """
    summary = read_json(run_folder.file("summary.json"))
    sheet = ScoreSheet.read(summary["eval"], summary["eval"]["before"])
    curve = [
        {
            "step": point["step"],
            "training_seconds": point["training_seconds"],
            "scores": _plain(point),
        }
        for point in summary["eval"]["curve"]
    ]
    steps = curve[-1]["step"]
    return {
        "base_model": summary["base_model"],
        "device": summary["device"],
        "data": summary["data"],
        "never_trained": summary["never_trained"],
        "world_size": summary["world_size"],
        "count": sheet.example[1],
        "labels": {score.name: score.label for score in sheet.scores},
        "headings": {score.name: score.heading for score in sheet.scores},
        "steps": steps,
        "training_seconds": summary["training_seconds"],
        "step_seconds": summary["training_seconds"] / steps,
        "tokens": summary["tokens"],
        "peak_memory_bytes": summary["peak_memory_bytes"],
        "optimizer_state_bytes": summary["optimizer_state_bytes"],
        "bytes_sent_per_step": summary["comm_bytes_per_step"],
        "serve_bytes": summary["serve_bytes"],
        "examples": int(summary["eval"]["before"][sheet.count_key]),
        "before": curve[0]["scores"],
        "scores": curve[-1]["scores"],
        "curve": curve,
    }


def _plain(scores: Mapping[str, float]) -> dict[str, float]:
    return {
        name.removeprefix("eval/"): value
        for name, value in scores.items()
        if name.startswith("eval/")
    }


def means(rows: Sequence[Row]) -> Row:
    """The rows of a method's seeds as one: medians of seconds, means of everything else, and the
    lowest and highest of every score, `low` and `high`.

    `curve` has the means of the evaluations that all of them have.
    """
    numbers = ("peak_memory_bytes", "optimizer_state_bytes", "bytes_sent_per_step", "serve_bytes")
    names = rows[0]["scores"]
    return {
        "seeds": len(rows),
        "count": rows[0]["count"],
        "never_trained": rows[0]["never_trained"],
        "labels": rows[0]["labels"],
        "headings": rows[0]["headings"],
        "examples": rows[0]["examples"],
        "lr": rows[0]["lr"],
        "steps": rows[0]["steps"],
        "flops_per_step": rows[0]["flops_per_step"],
        "training_seconds": median(row["training_seconds"] for row in rows),
        "step_seconds": median(row["step_seconds"] for row in rows),
        **{name: fmean(row[name] for row in rows) for name in numbers},
        "scores": {name: fmean(row["scores"][name] for row in rows) for name in names},
        "low": {name: min(row["scores"][name] for row in rows) for name in names},
        "high": {name: max(row["scores"][name] for row in rows) for name in names},
        "curve": [
            {
                "training_seconds": fmean(point["training_seconds"] for point in points),
                "scores": {LOSS: fmean(point["scores"][LOSS] for point in points)},
            }
            for points in zip(*(row["curve"] for row in rows), strict=False)
        ],
    }


def differences(
    reference: Sequence[RunFolder], other: Sequence[RunFolder]
) -> dict[str, dict[str, float]]:
    """How much better `other` is than `reference`, for each score with values by example.

    Each example's value is its mean over the runs of a side; the differences are paired by
    example. The interval therefore covers the choice of examples, not that of seeds.

    Returns:
        `mean`, `low` and `high` by name of score, positive where `other` is better.
    """
    sheet, first = _mean_evaluation(reference)
    _, second = _mean_evaluation(other)
    return gains(sheet, first, second)


def _mean_evaluation(runs: Sequence[RunFolder]) -> tuple[ScoreSheet, dict[str, Any]]:
    records = []
    for run in runs:
        summary = read_json(run.file("summary.json"))
        step = summary["eval"]["curve"][-1]["step"]
        records.append(read_json(run.file(f"evaluations/step_{step:06d}.json")))
    sheet = ScoreSheet.read(summary["eval"], summary["eval"]["before"])
    lines = {
        name: np.mean([record["lines"][name] for record in records], axis=0).tolist()
        for name in records[0]["lines"]
    }
    return sheet, {**records[0], "lines": lines}


def time_to_loss(curve: Sequence[Mapping[str, Any]], target: float) -> float | None:
    """Training seconds until the held-out loss is at most `target`, between two evaluations on the
    straight line through them; None if it never is.
    """
    before: tuple[float, float] | None = None
    for point in curve:
        seconds, loss = point["training_seconds"], point["scores"][LOSS]
        if math.isfinite(loss) and loss <= target:
            if before is None or before[1] <= loss:
                return float(seconds)
            share = (before[1] - target) / (before[1] - loss)
            return float(before[0] + share * (seconds - before[0]))
        before = (seconds, loss) if math.isfinite(loss) else None
    return None
