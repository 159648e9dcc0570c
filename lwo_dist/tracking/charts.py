"""Pictures of a run: points in, matplotlib figures out. No pyplot, so no global state and no display."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from .spool import Record, points_of

__all__ = ["Band", "Series", "layer_bands", "loss_figure", "memory_figure", "save_pictures"]

Series = Sequence[tuple[float, float]]
"""(x, y) in order of x; x is a step, or hours."""
Band = tuple[float, float, str]
"""From step, to step, the layer that was active between them."""

INK, SOFT, GRID = "#1f2430", "#6b7280", "#e5e7eb"
LOSS, EVALUATION = "#111827", "#d6336c"
# From the first layer to the last: cold to warm, calm enough to read a curve on.
DEPTH = LinearSegmentedColormap.from_list(
    "depth", ["#4a4fb5", "#3d86e0", "#2fb3bf", "#54bf7d", "#b9c94a", "#f3b53f", "#ec7f43", "#cf3f5d"]
)
# Bottom to top of the stack; what is left of the peak is activations and buffers.
PARTS = (
    ("memory/parameter_bytes", "parameters", "#4a6fd8"),
    ("memory/gradient_bytes", "gradients", "#3fbccb"),
    ("memory/optimizer_state_bytes", "optimizer state", "#f4b03f"),
)
PEAK = ("memory/peak_bytes", "activations and the rest", "#e8eaef")


def layer_bands(switches: Sequence[tuple[float, str]], last_step: float) -> list[Band]:
    """Turn `(after step, layer)` switches into bands up to `last_step`; repeats of a layer are one band."""
    bands: list[Band] = []
    for (start, layer), (end, _) in pairwise([*sorted(switches), (last_step, "")]):
        if end <= start:
            continue
        if bands and bands[-1][2] == layer and bands[-1][1] == start:
            bands[-1] = (bands[-1][0], end, layer)
        else:
            bands.append((start, end, layer))
    return bands


def loss_figure(loss: Series, bands: Sequence[Band], layers: Sequence[str], evaluations: Series = ()) -> Figure:
    """The loss over the steps on top of the visits: a row per layer below, its colour as a band behind the curve.

    Args:
        layers: names in model order, first at the bottom; a band of another name is not drawn.
        evaluations: (step, held-out loss), marked.
    """
    rows = len(layers)
    lower = min(max(0.17 * rows, 0.9), 5.4)
    figure = Figure(figsize=(11, 4.3 + lower + 1.0), dpi=150, layout="constrained", facecolor="white")
    top, visits = figure.subplots(2, 1, sharex=True, height_ratios=(4.3, lower))
    shades = _shades(layers)
    for layer in layers:
        spans = [(start, end - start) for start, end, name in bands if name == layer]
        row = layers.index(layer)
        # One collection per layer: thousands of short visits draw as fast as ten.
        visits.broken_barh(spans, (row - 0.41, 0.82), color=shades[layer], linewidth=0)
        top.broken_barh(
            spans, (0, 1), transform=top.get_xaxis_transform(), color=shades[layer], alpha=0.22, linewidth=0, zorder=0
        )
    _loss_curve(top, loss, evaluations)
    top.set_title("Loss, with the active layer as coloured bands", loc="left", color=INK, fontsize=13, pad=12)
    top.set_ylabel("loss per token", color=SOFT)
    top.tick_params(labelbottom=False)
    visits.set_ylim(-0.7, rows - 0.3)
    size = 8.5 if rows <= 14 else max(5.8, 8.5 - 0.12 * (rows - 14))
    visits.set_yticks(range(rows), layers, fontsize=size)
    visits.set_ylabel("active layer", color=SOFT)
    visits.set_xlabel("optimizer step", color=SOFT)
    visits.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
    ends = [x for x, _ in (*loss, *evaluations)] + [edge for start, end, _ in bands for edge in (start, end)]
    if ends and max(ends) > min(ends):
        visits.set_xlim(min(ends), max(ends))
    for axes in (top, visits):
        _plain(axes)
    visits.grid(axis="y", visible=False)
    visits.tick_params(axis="y", length=0)
    figure.align_ylabels()
    return figure


def memory_figure(points: Mapping[str, Series], x_label: str, hours: bool = False) -> Figure:
    """The largest peak over the ranks over time, and what it is made of.

    Args:
        points: memory/peak_bytes, memory/parameter_bytes, ... in bytes; what is missing is left out.
        hours: x is in hours and is shown in the unit that suits.
    """
    figure = Figure(figsize=(11, 5), dpi=150, layout="constrained", facecolor="white")
    axes = figure.subplots()
    highest = max((y for name in points for _, y in _finite(points[name])), default=0.0)
    unit, scale = next(((u, s) for u, s in (("GiB", 2**30), ("MiB", 2**20)) if highest >= s), ("KiB", 2**10))
    stretch, x_unit = (
        _time_unit(max((x for name in points for x, _ in points[name]), default=0.0)) if hours else (1, "")
    )
    x_below, top = np.zeros(1), np.zeros(1)
    for name, label, colour in (*PARTS, PEAK):
        series = _finite(points.get(name, ()))
        if not series:
            continue
        x, y = np.array(series).T * [[stretch], [1 / scale]]
        below = np.interp(x, x_below, top)
        y = y if name == PEAK[0] else below + y
        axes.fill_between(x, below, np.maximum(below, y), step="post", color=colour, linewidth=0, label=label)
        if name == PEAK[0]:
            axes.plot(x, y, drawstyle="steps-post", color=INK, linewidth=1.6, label="peak")
        x_below, top = x, y
    axes.set_title("Memory of the fullest worker", loc="left", color=INK, fontsize=13, pad=12)
    axes.set_ylabel(unit, color=SOFT)
    axes.set_xlabel(f"{x_label} ({x_unit})" if x_unit else x_label, color=SOFT)
    axes.set_ylim(bottom=0)
    axes.margins(x=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))
    _plain(axes)
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        axes.legend(
            handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, labelcolor=INK
        )
    return figure


def save_pictures(records: Iterable[Record], folder: Path) -> list[Path]:
    """Draw what the records of a spool have points for, as PNG files in `folder`. Raises: OSError."""
    layers: list[str] = []
    switches: list[tuple[float, str]] = []
    points: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        if record.kind == "run":
            layers = record.fields["layers"]
        elif record.kind == "switch":
            switches.append((record.fields["step"], record.fields["layer"]))
        for point in points_of(record):
            points.setdefault(point.name, []).append((point.step, point.value))
    figures: dict[str, Figure] = {}
    loss, evaluations = points.get("train/loss", []), points.get("eval/loss", [])
    if loss or evaluations:
        # Before the first switch the active layer is known from the points alone.
        first = min((step for step, _ in switches), default=math.inf)
        early = [(step, value) for step, value in points.get("lwo/active_layer", []) if step <= first]
        if early and 0 <= early[0][1] < len(layers) and first > 0:
            switches.append((0, layers[int(early[0][1])]))
        last = max(step for step, _ in (*loss, *evaluations))
        figures["loss_by_layer"] = loss_figure(loss, layer_bands(switches, last), layers, evaluations)
    memory = {name: series for name, series in points.items() if name.startswith("memory/")}
    if memory:
        clock = dict(points.get("train/elapsed_seconds", []))
        seconds = [clock.get(step) for series in memory.values() for step, _ in series]
        timed = None not in seconds and all(a <= b for a, b in pairwise(clock.values()))  # a restart may set it back
        if timed:
            memory = {name: [(clock[step] / 3600, y) for step, y in series] for name, series in memory.items()}
        figures["memory"] = memory_figure(memory, "training time" if timed else "optimizer step", hours=timed)
    files = []
    for name, figure in figures.items():
        folder.mkdir(parents=True, exist_ok=True)
        files.append(folder / f"{name}.png")
        figure.savefig(files[-1])
    return files


def _loss_curve(axes: Axes, loss: Series, evaluations: Series) -> None:
    series = _finite(loss)
    if series:
        x, y = np.array(series).T
        width = max(1, len(y) // 40)
        noisy = width >= 4  # a mean of fewer hides more than it shows
        axes.plot(x, y, color=LOSS, linewidth=0.8 if noisy else 1.5, alpha=0.35 if noisy else 1.0)
        if noisy:
            window = np.ones(width)
            smooth = np.convolve(y, window, "same") / np.convolve(np.ones_like(y), window, "same")
            axes.plot(x, smooth, color=LOSS, linewidth=1.8, label=f"training loss (mean of {width} points)")
        else:
            axes.lines[-1].set_label("training loss")
        if len(series) == 1:
            axes.lines[-1].set_marker("o")
    marks = _finite(evaluations)
    if marks:
        x, y = np.array(marks).T
        axes.plot(x, y, color=EVALUATION, linewidth=1.0, linestyle=(0, (4, 3)), alpha=0.7)
        axes.plot(
            x,
            y,
            "o",
            color=EVALUATION,
            markersize=7.5,
            markeredgecolor="white",
            markeredgewidth=1.2,
            label="held-out loss",
            clip_on=False,
            zorder=5,
        )
    if series or marks:
        axes.legend(loc="upper right", frameon=True, framealpha=0.85, edgecolor="none", labelcolor=INK)


def _shades(layers: Sequence[str]) -> dict[str, tuple[float, float, float, float]]:
    """A colour by depth, so that neighbours look alike and bottom and top do not."""
    colours = DEPTH(np.linspace(0.0, 1.0, max(len(layers), 1)))
    return {layer: tuple(map(float, colour)) for layer, colour in zip(layers, colours, strict=False)}  # type: ignore[misc]


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.tick_params(colors=SOFT, labelcolor=INK)
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)


def _finite(series: Series) -> list[tuple[float, float]]:
    return [(x, y) for x, y in series if math.isfinite(y)]


def _time_unit(hours: float) -> tuple[float, str]:
    """(factor on hours, name) that shows `hours` as a number of a few digits."""
    if hours < 0.05:
        return 3600.0, "seconds"
    return (60.0, "minutes") if hours < 3 else (1.0, "hours")
