"""The page of a run: its numbers agree with the summary, and it shows what changed."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lwo_dist.registry import TASKS
from lwo_dist.report import write_report
from lwo_dist.spool import Spool
from lwo_dist.training.evaluate import Evaluation, Sample
from lwo_dist.training.results import Results, format_summary

LINES = 40
GAINED, LOST = range(0, 12), range(12, 15)


def evaluation(right: set[int], loss: float) -> Evaluation:
    exact = np.array([100.0 * (i in right) for i in range(LINES)])
    losses = loss + np.linspace(-0.5, 0.5, LINES)
    tokens = np.arange(1, LINES + 1)
    predictions = [f"line {i}" if i in right else "wrong" for i in range(LINES)]
    return Evaluation(
        scores={
            "eval/exact_match": float(exact.mean()),
            "eval/edit_similarity": float(exact.mean()),
            "eval/bleu": 3.0,
            "eval/loss": float(np.average(losses, weights=tokens)),
            "eval/lines": float(LINES),
        },
        columns={"exact_match": exact, "edit_similarity": exact, "loss": losses},
        tokens=tokens,
        bytes=5 * tokens,
        predictions=tuple(predictions),
        samples=tuple(
            Sample(i, "a.py", i, "def f():", f"line {i}", text)
            for i, text in enumerate(predictions)
        ),
    )


@pytest.fixture
def run(tmp_path: Path) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """The page, the summary and the table of completions."""
    task = TASKS.get("completion")
    results = Results(tmp_path, task, "loss", writes=True)
    spool = Spool(tmp_path / "metrics.jsonl")
    spool.append("run", run_name="x", layers=["all"], device="CPU", **task.sheet.record())
    kept = set(range(15, 20))
    for step, found in (
        (0, evaluation(kept | set(LOST), 3.0)),
        (10, evaluation(kept | set(GAINED), 2.0)),
        (20, evaluation(set(), 9.0)),
    ):
        results.add_evaluation(step, found)
        spool.append_metrics(step, found.scores)
    for step, tokens in ((10, 3000), (20, 1000)):
        results.add_time(2.0, tokens)
        metrics = {
            "train/loss": 1.0,
            "train/tokens": float(results.tokens),
            "train/elapsed_seconds": results.training_seconds,
            "train/tokens_per_second": tokens / 2.0,
            "memory/peak_bytes": 2e9,
            "memory/optimizer_state_bytes": 1e6,
            "comm/bytes_per_step": 1e3,
        }
        results.add_metrics(metrics)
        spool.append_metrics(step, metrics)
    summary = {**results.summary(), "steps": 20, "export": "model"}
    write_report(spool.path, "FINISHED", results.best_step)
    spool.close()
    table = json.loads((tmp_path / "tables" / "completions.json").read_text())
    return (tmp_path / "report.html").read_text(), summary, table


def test_page_and_console_show_the_same_numbers(run: tuple[str, Any, Any]) -> None:
    page, summary, _ = run
    assert summary["eval"]["best_step"] == 10
    text = html.unescape(re.sub(r"</t[dh]>", "|", page))
    text = re.sub(r"<[^>]*>", " ", text)
    table = [
        line
        for line in format_summary(summary).splitlines()
        if not line.startswith(("t", "p", "m"))
    ]
    assert len(table) == 6
    for row in table:
        cells = re.split(r"  +", row)
        assert " | ".join(cells) in re.sub(r"\s*\|\s*", " | ", text), row
    assert "1,000 tokens/s on average" in format_summary(summary)
    assert re.search(r"tokens/s on average\s+1,000\s", text)  # not the last stretch's 500
    # What is gained is what lies between the two columns.
    loss = summary["eval"]
    gain = loss["gain_95"]["loss"]["mean"]
    assert gain == pytest.approx(loss["before"]["eval/loss"] - loss["after"]["eval/loss"])


def test_gained_lost_and_random_lines_are_shown_with_their_counts(
    run: tuple[str, Any, Any],
) -> None:
    page, summary, table = run
    assert summary["eval"]["changed"] == {"exact_match": {"gained": 12, "lost": 3}}
    assert "12 gained, 3 lost" in format_summary(summary)
    assert "Of 40 held-out lines, 12 became right (gained) and 3 became wrong (lost)." in page
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    lines = {
        change: [row["line"] for row in rows if row["change"] == change]
        for change in ("gained", "lost", "random")
    }
    assert set(lines["gained"]) <= set(GAINED) and len(lines["gained"]) == 8
    assert lines["lost"] == list(LOST)
    assert len(lines["random"]) == 8 and min(lines["random"]) >= 15
    assert all(row["after"] == row["reference"] for row in rows if row["change"] == "gained")
    assert [page.count(f"<b class={change}>") for change in lines] == [8, 3, 8]
