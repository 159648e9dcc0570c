"""Scores and completions, before and after, as tables that MLflow's pages show: the format of
`mlflow.log_table`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lwo_dist.redaction import redact_values
from lwo_dist.tasks.comparison import changes
from lwo_dist.tasks.scores import ScoreSheet

__all__ = [
    "FOLDER",
    "Table",
    "completions_table",
    "first_and_best",
    "read_evaluations",
    "save_tables",
    "scores_table",
]

FOLDER = "tables"

_SHOWN = 8  # completions of each kind

Table = tuple[list[str], list[list[Any]]]
"""Columns, rows."""


def read_evaluations(folder: Path) -> dict[int, dict[str, Any]]:
    """Step -> what `evaluations/step_*.json` of a run's folder hold, in order of the steps. Raises:
    OSError.
    """
    files = sorted((folder / "evaluations").glob("step_*.json"))
    return {int(file.stem.removeprefix("step_")): json.loads(file.read_text()) for file in files}


def scores_table(evaluations: dict[int, dict[str, Any]]) -> Table:
    names = list(
        dict.fromkeys(name for evaluation in evaluations.values() for name in evaluation["scores"])
    )
    rows = [
        [step, *(evaluation["scores"].get(name) for name in names)]
        for step, evaluation in evaluations.items()
    ]
    return ["step", *(name.removeprefix("eval/") for name in names)], rows


def completions_table(
    evaluations: dict[int, dict[str, Any]], best_step: int | None, sheet: ScoreSheet
) -> Table:
    """Held-out examples before training and after it, at `best_step`, else at the last evaluation:
    some that became right (`gained`), some that became wrong (`lost`), and some of all others
    (`random`).
    """
    columns = ["change", "file", "line", "context", "reference", "before", "after"]
    if len(evaluations) < 2:
        return columns, []
    first, last = first_and_best(evaluations, best_step)
    after = {(s["name"], s["line"]): s["prediction"] for s in last["samples"]}
    pairs = [
        (sample, after[sample["name"], sample["line"]])
        for sample in first["samples"]
        if (sample["name"], sample["line"]) in after
    ]
    by_change: dict[str, list[Any]] = {"gained": [], "lost": [], "random": []}
    changed = next(iter(changes(sheet, first, last).values()), {})
    for sample, prediction in pairs:
        # Samples of version 0.1 have no index.
        index = sample.get("index", -1)
        change = next((name for name in changed if index in changed[name]), "random")
        by_change[change].append((sample, prediction))
    rows = [
        [change, s["name"], s["line"], s["context"], s["reference"], s["prediction"], prediction]
        for change, found in by_change.items()
        for s, prediction in _some(found)
    ]
    return columns, [redact_values(row) for row in rows]


def _some(found: list[Any]) -> list[Any]:
    """At most `_SHOWN`, at random, in their order."""
    chosen = random.Random(0).sample(range(len(found)), min(_SHOWN, len(found)))
    return [found[i] for i in sorted(chosen)]


def first_and_best(
    evaluations: dict[int, dict[str, Any]], best_step: int | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The first evaluation, and that of `best_step`, else the last one."""
    best = best_step if best_step in evaluations else max(evaluations)
    return evaluations[min(evaluations)], evaluations[best]


def save_tables(folder: Path, tables: dict[str, Table]) -> list[Path]:
    """Write the tables that have rows to `<folder>/tables/<name>.json`. Raises: OSError."""
    files = []
    for name, (columns, rows) in tables.items():
        if rows:
            (folder / FOLDER).mkdir(parents=True, exist_ok=True)
            files.append(_write(folder / FOLDER / f"{name}.json", columns, rows))
    return files


def _write(file: Path, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Path:
    file.write_text(json.dumps({"columns": columns, "data": rows}))
    return file
