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

from lwo_dist.units import human_bytes, human_seconds

from .charts import figures
from .history import History, Series
from .outcome import Outcome
from .tables import Table
from .template import HEADINGS, PAGE

__all__ = ["save_report"]

_MOST_POINTS = 1500  # of a curve: more than the page has pixels for


def save_report(history: History, outcome: Outcome, completions: Table, file: Path) -> Path:
    """Write the page about `history` to `file` and return it. Raises: OSError."""
    sections = []
    if outcome.rows:
        head, *rows = outcome.rows
        sections.append(_section("scores", _table(head, rows, "figures")))
    drawn = figures(_thinned(history))
    sections += [_section(name, f"<div class=wide>{_svg(f)}</div>") for name, f in drawn.items()]
    if visits := _visits(history):
        sections.append(_section("visits", visits))
    if completions[1]:
        sections.append(_section("completions", _completions(completions), outcome.change))
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
        cards="".join(_card(*card) for card in _cards(history, outcome)),
        sections="\n".join(sections),
    )
    file.write_text(page)
    return file


def _cards(history: History, outcome: Outcome) -> Iterable[tuple[str, str, str]]:
    """(label, value, remark)"""
    for score in outcome.sheet.scores:
        series = history.points.get(score.key, [])
        if score.headline and outcome.after:
            before = score.show(outcome.before[score.key])
            yield (
                f"held-out {score.heading}",
                score.show(outcome.after[score.key]),
                f"before: {before}",
            )
        elif score.headline and series:
            yield f"held-out {score.heading}", score.show(series[-1][1]), ""
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
        # Runs of version 0.1 did not log their tokens.
        if seconds and (tokens := newest("train/tokens")) is not None:
            yield "tokens/s on average", f"{tokens / seconds:,.0f}", f"{tokens:,.0f} tokens"
    if peaks := [value for _, value in history.points.get("memory/peak_bytes", ())]:
        kind = "the whole process" if history.run.get("device") == "CPU" else "on the GPU"
        yield "peak memory per worker", human_bytes(max(peaks)), kind
    parts = {method: sum(sizes.values()) for method, sizes in history.memory_parts().items()}
    if parts and history.run.get("device") == "CPU":  # a GPU's bars have activations too
        own, *others = parts.items()
        yield (
            "weights, gradients, optimizer",
            human_bytes(own[1]),
            f"full fine-tuning: {human_bytes(others[-1][1])}" if others else "",
        )
    elif state := [value for _, value in history.points.get("memory/optimizer_state_bytes", ())]:
        yield "optimizer state per worker", human_bytes(max(state)), ""


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
    shown = []
    for row in rows:
        cells = dict(zip(columns, row, strict=True))
        where = f"{cells['file']}:{cells['line']}"
        answers = "".join(
            f"<td data-label={name}><pre>{text}</pre></td>"
            for name, text in (
                ("reference", html.escape(cells["reference"])),
                *((name, _marked(cells[name], cells["reference"])) for name in ("before", "after")),
            )
        )
        shown.append(
            f"<tr><td colspan=3 class=context><small><b class={cells['change']}>{cells['change']}"
            f"</b> {html.escape(where)}</small><pre>{html.escape(cells['context'])}</pre></td></tr>"
            f"<tr class=answers>{answers}</tr>"
        )
    return (
        "<table class=code><thead><tr><th>reference</th><th>before</th><th>after</th></tr></thead>"
        f"<tbody>{''.join(shown)}</tbody></table>"
    )


def _marked(answer: str, reference: str) -> str:
    text = html.escape(answer)
    return f"<mark>{text}</mark>" if answer.strip() == reference.strip() else text


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


def _section(name: str, content: str, text: str = "") -> str:
    title, usual = HEADINGS[name]
    text = html.escape(text) or usual
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
