"""Pictures of a comparison: the loss over training time, and what the methods cost and gain."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .charts import GRID, INK, SOFT

__all__ = ["difference_figure", "loss_over_time_figure", "save_comparison_pictures"]

COLOURS = ("#d6336c", "#3d6fd8", "#6b7280", "#2f9e63", "#e08a1e", "#7a5bd0")

Rows = Sequence[Mapping[str, Any]]


def save_comparison_pictures(found: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw the comparison of `compare.Comparison` into PNG files in `folder`.

    Returns:
        The files: for each task with finished runs `comparison-<task>.png`.
    """
    written = []
    for task in found["design"]["tasks"]:
        rows = [row for row in found["rows"] if row["task"] == task and row["status"] == "done"]
        if rows:
            path = folder / f"comparison-{task}.png"
            figure = task_figure(found, task, rows)
            figure.savefig(path, dpi=110, bbox_inches="tight", facecolor="white")
            written.append(path)
    return written


def task_figure(found: Mapping[str, Any], task: str, rows: Rows) -> Figure:
    """Loss over training time on the left; on the right the differences from the reference."""
    blocks = _differences(found, task)
    lines = len(blocks) + sum(map(len, blocks.values()))
    figure = Figure(figsize=(12, max(4.4, 1 + 0.24 * lines)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    methods = list(found["design"]["methods"])
    colours = dict(zip(methods, COLOURS * len(methods), strict=False))
    loss_over_time_figure(left, rows, colours)
    left.set_title(f"{task}: held-out loss over training time", loc="left", color=INK)
    difference_figure(right, found, task, colours)
    return figure


def loss_over_time_figure(axes: Axes, rows: Rows, colours: Mapping[str, str]) -> None:
    """A thin curve for each run at equal steps, and the mean of a method's seeds as a thick one;
    runs of the reference's training time are dashed.
    """
    _plain(axes)
    for method, colour in colours.items():
        for purpose, style in (("equal_steps", "-"), ("equal_time", "--")):
            own = [row for row in rows if row["method"] == method and row["purpose"] == purpose]
            if not own:
                continue
            curves = [
                [(point["training_seconds"], point["scores"]["loss"]) for point in row["curve"]]
                for row in own
            ]
            for curve in curves if len(curves) > 1 else []:
                axes.plot(*zip(*curve, strict=True), style, color=colour, linewidth=0.7, alpha=0.45)
            length = min(map(len, curves))
            mean = np.mean([curve[:length] for curve in curves], axis=0)
            label = method if purpose == "equal_steps" else f"{method}, equal time"
            axes.plot(*mean.T, style, color=colour, linewidth=2.2, marker="o", markersize=4)
            axes.plot([], [], style, color=colour, linewidth=2.2, label=label)
    axes.set_xlabel("training seconds", color=SOFT)
    axes.set_ylabel("held-out loss, nats per token", color=SOFT)
    axes.legend(frameon=False)


def difference_figure(
    axes: Axes, found: Mapping[str, Any], task: str, colours: Mapping[str, str]
) -> None:
    """Differences from the reference with their 95 % intervals, in a block for each score. A block
    has its own unit, so its bars are compared with each other and with the line only.
    """
    _plain(axes)
    reference = found["design"]["reference"]
    blocks = _differences(found, task)
    labels: list[str] = []
    for score, bars in blocks.items():
        labels.append(f"{score}:")
        ends = [abs(gain[end]) for _, _, gain in bars for end in ("low", "high")]
        unit = max(filter(math.isfinite, ends), default=0.0) or 1.0
        for label, method, gain in bars:
            mean, low, high = (gain[name] / unit for name in ("mean", "low", "high"))
            if math.isfinite(mean):
                place = len(labels)
                axes.plot([low, high], [place, place], color=colours[method], linewidth=2)
                axes.plot([mean], [place], "o", color=colours[method], markersize=6)
            labels.append(f"{label}  {gain['mean']:+.3g}")
    axes.axvline(0, color=SOFT, linewidth=1)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(max(len(labels), 1) - 0.5, -0.5)  # no labels while nothing can be compared
    axes.set_xlim(-1.1, 1.1)
    axes.set_xticks([])
    axes.set_title(f"better than {reference} to the right of the line", loc="left", color=INK)


def _differences(
    found: Mapping[str, Any], task: str
) -> dict[str, list[tuple[str, str, Mapping[str, float]]]]:
    """By score: label, method and difference of every bar."""
    blocks: dict[str, list[tuple[str, str, Mapping[str, float]]]] = {}
    for purpose, suffix in (("equal_steps", ""), ("equal_time", ", equal time")):
        for method, reading in found["readings"].get(task, {}).get(purpose, {}).items():
            names = reading["mean"]["labels"]
            for name, gain in reading["against"].items():
                score = names.get(name, name)
                blocks.setdefault(score, []).append((f"{method}{suffix}", method, gain))
    return blocks


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GRID)
    axes.tick_params(colors=SOFT, length=0)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
