"""Pictures of a run: its history in, matplotlib figures out. No pyplot, so no global state and no
display.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from lwo_dist.units import byte_unit, human_bytes

from .history import PARKS, Band, History, Series, Visit

__all__ = [
    "figures",
    "layers_figure",
    "loss_figure",
    "memory_figure",
    "memory_parts_figure",
    "save_pictures",
]

INK = "#1f2430"
SOFT = "#6b7280"
GRID = "#e5e7eb"
LOSS = "#111827"
EVALUATION = "#d6336c"
RESTART = "#6b7280"
# From the first layer to the last: cold to warm, calm enough to read a curve on.
DEPTH = LinearSegmentedColormap.from_list(
    "depth",
    ["#4a4fb5", "#3d86e0", "#2fb3bf", "#54bf7d", "#b9c94a", "#f3b53f", "#ec7f43", "#cf3f5d"],
)
# Bottom to top of the stack; what is left of the peak is activations and buffers.
PARTS = (
    ("memory/parameter_bytes", "parameters", "#4a6fd8"),
    ("memory/gradient_bytes", "gradients", "#3fbccb"),
    ("memory/optimizer_state_bytes", "optimizer state", "#f4b03f"),
)
PEAK = ("memory/peak_bytes", "activations and the rest", "#e8eaef")
PART_COLOURS = {
    "weights": "#4a6fd8",
    "gradients": "#3fbccb",
    "optimizer state": "#f4b03f",
    PARKS: "#a78bda",
    PEAK[1]: PEAK[2],
}
PANELS = (
    ("loss_drop", "fall of the training loss"),
    ("grad_norm", "gradient norm"),
    ("change_norm", "change of weights"),
    ("seconds", "seconds a visit"),
)


def loss_figure(
    loss: Series,
    bands: Sequence[Band],
    layers: Sequence[str],
    evaluations: Series = (),
    restarts: Sequence[float] = (),
) -> Figure:
    """The loss over the steps on top of the visits: a row per layer below, its colour as a band
    behind the curve.

    Args:
        layers: names in model order, first at the bottom; a band of another name is not drawn.
        evaluations: (step, held-out loss), marked.
        restarts: the step that each restart went on from, marked.
    """
    rows = len(layers)
    lower = min(max(0.17 * rows, 0.9), 5.4)
    figure = Figure(
        figsize=(11, 4.3 + lower + 1.0), dpi=150, layout="constrained", facecolor="white"
    )
    top, visits = figure.subplots(2, 1, sharex=True, height_ratios=(4.3, lower))
    shades = _shades(layers)
    for layer in layers:
        spans = [(start, end - start) for start, end, name in bands if name == layer]
        row = layers.index(layer)
        # One collection per layer: thousands of short visits draw as fast as ten.
        visits.broken_barh(spans, (row - 0.41, 0.82), color=shades[layer], linewidth=0)
        top.broken_barh(
            spans,
            (0, 1),
            transform=top.get_xaxis_transform(),
            color=shades[layer],
            alpha=0.22,
            linewidth=0,
            zorder=0,
        )
    for step in restarts:
        for axes in (top, visits):
            axes.axvline(step, color=RESTART, linewidth=1.1, linestyle=(0, (1, 2)), zorder=2)
        top.annotate(
            "restart",
            (step, 1),
            xycoords=("data", "axes fraction"),
            xytext=(-3, -4),
            textcoords="offset points",
            rotation=90,
            ha="right",
            va="top",
            fontsize=8,
            color=RESTART,
        )
    _loss_curve(top, loss, evaluations)
    top.set_title(
        "Loss, with the active layer as coloured bands", loc="left", color=INK, fontsize=13, pad=12
    )
    top.set_ylabel("loss per token", color=SOFT)
    top.tick_params(labelbottom=False)
    visits.set_ylim(-0.7, rows - 0.3)
    size = 8.5 if rows <= 14 else max(5.8, 8.5 - 0.12 * (rows - 14))
    visits.set_yticks(range(rows), layers, fontsize=size)
    visits.set_ylabel("active layer", color=SOFT)
    visits.set_xlabel("optimizer step", color=SOFT)
    visits.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
    ends = [x for x, _ in (*loss, *evaluations)] + [
        edge for start, end, _ in bands for edge in (start, end)
    ]
    if ends and max(ends) > min(ends):
        visits.set_xlim(min(ends), max(ends))
    for axes in (top, visits):
        _plain(axes)
    visits.grid(axis="y", visible=False)
    visits.tick_params(axis="y", length=0)
    figure.align_ylabels()
    return figure


def memory_figure(
    points: Mapping[str, Series], x_label: str, hours: bool = False, full: float | None = None
) -> Figure:
    """The largest peak over the ranks over time, what it is made of, and what full fine-tuning
    would need.

    Args:
        points: memory/peak_bytes, memory/parameter_bytes, ... in bytes; what is missing is left
            out.
        hours: x is in hours and is shown in the unit that suits.
        full: bytes that full fine-tuning would need at least.
    """
    figure = Figure(figsize=(11, 5), dpi=150, layout="constrained", facecolor="white")
    axes = figure.subplots()
    highest = max([full or 0.0, *(y for name in points for _, y in _finite(points[name]))])
    unit, scale = byte_unit(highest)
    stretch, x_unit = (
        _time_unit(max((x for name in points for x, _ in points[name]), default=0.0))
        if hours
        else (1, "")
    )
    x_below = np.zeros(1)
    top = np.zeros(1)
    for name, label, colour in (*PARTS, PEAK):
        series = _finite(points.get(name, ()))
        if not series:
            continue
        x, y = np.array(series).T * [[stretch], [1 / scale]]
        below = np.interp(x, x_below, top)
        y = y if name == PEAK[0] else below + y
        axes.fill_between(
            x, below, np.maximum(below, y), step="post", color=colour, linewidth=0, label=label
        )
        if name == PEAK[0]:
            axes.plot(x, y, drawstyle="steps-post", color=INK, linewidth=1.6, label="peak")
        x_below = x
        top = y
    if full is not None:
        label = f"full fine-tuning: at least {full / scale:,.3g} {unit}"
        axes.axhline(
            full / scale, color=EVALUATION, linewidth=1.8, linestyle=(0, (5, 2)), label=label
        )
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
            handles[::-1],
            labels[::-1],
            loc="center left",
            bbox_to_anchor=(1.0, 0.5),
            frameon=False,
            labelcolor=INK,
        )
    return figure


def memory_parts_figure(parts: Mapping[str, Mapping[str, float]]) -> Figure:
    """A bar for each method, made of its parts.

    Args:
        parts: method -> part -> bytes; the first method is on top.
    """
    height = 1.5 + 0.6 * len(parts)
    figure = Figure(figsize=(11, height), dpi=150, layout="constrained", facecolor="white")
    axes = figure.subplots()
    totals = {method: sum(sizes.values()) for method, sizes in parts.items()}
    unit, scale = byte_unit(max(totals.values(), default=0.0))
    labelled = set()
    for row, (method, sizes) in enumerate(parts.items()):
        left = 0.0
        for part, size in sizes.items():
            label = None if part in labelled or not size else part
            labelled |= {part} if size else set()
            axes.barh(
                row, size / scale, left=left, height=0.62, color=PART_COLOURS[part], label=label
            )
            left += size / scale
        text = f" {human_bytes(totals[method])}"
        axes.text(left, row, text, va="center", ha="left", color=INK, fontsize=10)
    axes.set_yticks(range(len(parts)), list(parts))
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * max(totals.values(), default=1.0) / scale)
    axes.set_xlabel(f"{unit} of the fullest worker", color=SOFT)
    axes.set_title("Memory by part", loc="left", color=INK, fontsize=13, pad=12)
    _plain(axes)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    figure.legend(loc="outside lower center", ncols=5, frameon=False, labelcolor=INK)
    return figure


def layers_figure(visits: Sequence[Visit], layers: Sequence[str]) -> Figure:
    """The layers by the loss that fell in their visits, the one with most on top; a dot is a visit,
    a bar their mean.

    Args:
        layers: names in model order, which their colours follow. Those without a visit are left
            out.
    """
    by_layer = {
        layer: [visit.metrics for visit in visits if visit.layer == layer] for layer in layers
    }
    by_layer = {layer: found for layer, found in by_layer.items() if found}
    order = sorted(by_layer, key=lambda layer: _mean(by_layer[layer], "loss_drop"))
    shades = _shades(layers)
    size = 9.0 if len(order) <= 14 else max(5.8, 9.0 - 0.12 * (len(order) - 14))
    height = 1.6 + min(max(0.3 * len(order), 1.2), 9.0)
    figure = Figure(figsize=(11, height), dpi=150, layout="constrained", facecolor="white")
    panels = figure.subplots(1, len(PANELS), sharey=True, width_ratios=(2.2, 1, 1, 1))
    for axes, (name, label) in zip(panels, PANELS, strict=True):
        for row, layer in enumerate(order):
            values = [metrics[name] for metrics in by_layer[layer] if name in metrics]
            axes.barh(
                row, _mean(by_layer[layer], name), height=0.72, color=shades[layer], alpha=0.8
            )
            if len(values) > 1:
                axes.plot(
                    values,
                    [row] * len(values),
                    "o",
                    color=INK,
                    alpha=0.45,
                    markersize=3,
                    markeredgewidth=0,
                )
        axes.set_xlabel(label, color=SOFT)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6 if name == "loss_drop" else 3))
        axes.axvline(0, color=SOFT, linewidth=0.8)
        _plain(axes)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
    panels[0].set_yticks(range(len(order)), order, fontsize=size)
    panels[0].set_ylim(-0.7, max(len(order), 1) - 0.3)
    panels[0].set_title(
        "Layers by loss drop in a visit", loc="left", color=INK, fontsize=13, pad=12
    )
    return figure


def figures(history: History) -> dict[str, Figure]:
    """What there are points for: loss_by_layer, memory_by_part, memory, layers_by_loss_drop."""
    drawn: dict[str, Figure] = {}
    points = history.points
    layers = history.layers
    loss = points.get("train/loss", [])
    evaluations = points.get("eval/loss", [])
    if loss or evaluations:
        drawn["loss_by_layer"] = loss_figure(
            loss, history.bands(), layers, evaluations, history.restarts
        )
    if parts := history.memory_parts():
        drawn["memory_by_part"] = memory_parts_figure(parts)
    names = [name for name in (*(name for name, *_ in PARTS), PEAK[0]) if name in points]
    on_cpu = history.run.get("device") == "CPU"
    if on_cpu and len(names) > 1:  # the peak of a process would dwarf what training takes
        names.remove(PEAK[0])
    if names:
        steps = {name: points[name] for name in names}
        hours = {name: series for name in names if (series := history.hours(name)) is not None}
        timed = len(hours) == len(names)
        label = "training time" if timed else "optimizer step"
        drawn["memory"] = memory_figure(
            hours if timed else steps, label, timed, None if on_cpu else history.full_fine_tuning()
        )
    if visits := history.visits():
        drawn["layers_by_loss_drop"] = layers_figure(visits, layers)
    return drawn


def save_pictures(history: History, folder: Path) -> list[Path]:
    """Draw what the run has points for, as PNG files in `folder`. Raises: OSError."""
    files = []
    for name, figure in figures(history).items():
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
            axes.plot(
                x,
                smooth,
                color=LOSS,
                linewidth=1.8,
                label=f"training loss (mean of {width} points)",
            )
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
        axes.legend(
            loc="upper right", frameon=True, framealpha=0.85, edgecolor="none", labelcolor=INK
        )


def _shades(layers: Sequence[str]) -> dict[str, str]:
    """A colour by depth, so that neighbours look alike and bottom and top do not."""
    colours = DEPTH(np.linspace(0.0, 1.0, max(len(layers), 1)))
    return {layer: to_hex(colour) for layer, colour in zip(layers, colours, strict=False)}


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.tick_params(colors=SOFT, labelcolor=INK)
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)


def _mean(visits: Sequence[Mapping[str, float]], name: str) -> float:
    values = [metrics[name] for metrics in visits if name in metrics]
    return sum(values) / len(values) if values else 0.0


def _finite(series: Series) -> list[tuple[float, float]]:
    return [(x, y) for x, y in series if math.isfinite(y)]


def _time_unit(hours: float) -> tuple[float, str]:
    """(factor on hours, name) that shows `hours` as a number of a few digits."""
    if hours < 0.05:
        return 3600.0, "seconds"
    return (60.0, "minutes") if hours < 3 else (1.0, "hours")
