"""One HTML page of a run: opens anywhere, loads nothing."""

from __future__ import annotations

import html
import io
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from string import Template
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from lwo_dist.tasks.scores import ScoreSheet
from lwo_dist.units import human_bytes, human_seconds

from .charts import figures
from .history import History, Series
from .tables import Table
from .template import HEADINGS, PAGE

__all__ = ["save_report"]

_MOST_POINTS = 1500  # of a curve: more than the page has pixels for


def save_report(history: History, completions: Table, file: Path) -> Path:
    """Write the page about `history` to `file` and return it. Raises: OSError."""
    drawn = figures(_thinned(history))
    sections = [_section(name, _svg(figure)) for name, figure in drawn.items()]
    if visits := _visits(history):
        sections.append(_section("visits", visits))
    if completions[1]:
        sections.append(_section("completions", _completions(completions)))
    sections.append(_section("configuration", _configuration(history)))
    tags = history.run.get("tags", {})
    facts = [
        tags.get("method"),
        tags.get("strategy"),
        f"on {tags['hosts']}" if "hosts" in tags else None,
    ]
    if history.started_ms:
        facts.append(f"{datetime.fromtimestamp(history.started_ms / 1000, UTC):%Y-%m-%d %H:%M} UTC")
    page = Template(PAGE).substitute(
        name=html.escape(str(history.run.get("run_name", "run"))),
        status=html.escape(history.status),
        facts=html.escape(" · ".join(filter(None, facts))),
        cards="".join(_card(*card) for card in _cards(history)),
        sections="\n".join(sections),
    )
    file.write_text(page)
    return file


def _cards(history: History) -> Iterable[tuple[str, str, str]]:
    """(label, value, remark)"""
    for score in ScoreSheet.read(history.run, history.points).scores:
        series = history.points.get(score.key, [])
        if score.headline and series:
            before = f"before: {score.show(series[0][1])}" if len(series) > 1 else ""
            yield f"held-out {score.heading}", score.show(series[-1][1]), before
    newest = history.newest
    if (seconds := newest("train/elapsed_seconds")) is not None:
        lost = newest("time/lost_seconds") or 0.0
        restarts = len(history.restarts)
        remark = (
            f"{restarts} restart{'s' if restarts > 1 else ''} cost {human_seconds(lost)}"
            if restarts
            else ""
        )
        yield "training time", human_seconds(seconds), remark
    if (rate := newest("train/tokens_per_second")) is not None:
        sent = newest("comm/bytes_per_step")
        yield "tokens a second", f"{rate:,.0f}", f"{human_bytes(sent)} sent a step" if sent else ""
    if peaks := [value for _, value in history.points.get("memory/peak_bytes", ())]:
        full = history.full_fine_tuning()
        yield (
            "peak memory",
            human_bytes(max(peaks)),
            f"full fine-tuning: {human_bytes(full)} or more" if full else "",
        )
    if state := [value for _, value in history.points.get("memory/optimizer_state_bytes", ())]:
        yield "optimizer state", human_bytes(max(state)), "of the fullest worker"


def _visits(history: History) -> str:
    """A row per layer, those whose visits brought most first."""
    rows = []
    visits = history.visits()
    for layer in history.layers:
        own = [visit.metrics for visit in visits if visit.layer == layer]
        if own:
            means = [
                _mean([metrics[name] for metrics in own if name in metrics]) for name in _COLUMNS
            ]
            rows.append(
                (means[0] or 0.0, [layer, str(len(own)), *(_number(mean) for mean in means)])
            )
    rows.sort(key=lambda row: -row[0])
    return (
        _table(["layer", "visits", *_COLUMNS.values()], [row for _, row in rows], "figures")
        if rows
        else ""
    )


_COLUMNS = {
    "loss_drop": "loss drop a visit",
    "grad_norm": "gradient norm",
    "change_norm": "change of weights",
    "seconds": "seconds a visit",
}


def _completions(completions: Table) -> str:
    columns, rows = completions
    column = {name: columns.index(name) for name in columns}
    shown = []
    for row in rows:
        context, reference, before, after = (
            row[column[name]] for name in ("context", "reference", "before", "after")
        )
        marks = [
            f"<mark>{html.escape(text)}</mark>" if text == reference else html.escape(text)
            for text in (before, after)
        ]
        where = f"{row[column['file']]}:{row[column['line']]}"
        shown.append(
            f"<tr><td colspan=3 class=context><small>{html.escape(where)}</small>"
            f"<pre>{html.escape(context)}</pre></td></tr><tr"
            f" class=answers><td><pre>{html.escape(reference)}</pre></td>"
            f"<td><pre>{marks[0]}</pre></td><td><pre>{marks[1]}</pre></td></tr>"
        )
    return (
        "<div class=wide><table"
        " class=code><thead><tr><th>reference</th><th>before</th><th>after</th></tr></thead>"
        f"<tbody>{''.join(shown)}</tbody></table></div>"
    )


def _configuration(history: History) -> str:
    parameters = history.run.get("parameters", {})
    rows = [[name, str(value)] for name, value in sorted(parameters.items())]
    table = _table(["name", "value"], rows, "names")
    return f"<details><summary>{len(rows)} settings and facts</summary>{table}</details>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str) -> str:
    cells = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return (
        "<div class=wide><table"
        f" class={kind}><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _section(name: str, content: str) -> str:
    title, text = HEADINGS[name]
    return f"<section id={name}><h2>{title}</h2><p>{text}</p>{content}</section>"


def _svg(figure: Figure) -> str:
    for axes in figure.axes:  # the page has its own headings
        axes.set_title("", loc="left")
    buffer = io.StringIO()
    # Text stays text: it takes the page's font, can be searched, and is small.
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _thinned(history: History) -> History:
    points = {name: _fewer(series) for name, series in history.points.items()}
    return History(
        history.run, points, history.restarts, history.status, history.started_ms, history._switches
    )


def _fewer(series: Series) -> list[tuple[float, float]]:
    every = -(-len(series) // _MOST_POINTS)
    return list(series) if every <= 1 else [*series[:-1:every], series[-1]]


def _card(label: str, value: str, remark: str) -> str:
    parts = [("label", label), ("value", value), ("remark", remark)]
    return (
        "<div class=card>"
        + "".join(f"<div class={kind}>{html.escape(text)}</div>" for kind, text in parts)
        + "</div>"
    )


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _number(value: Any) -> str:
    return "" if value is None else f"{value:,.4g}"
