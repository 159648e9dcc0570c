"""Scores and completions, before and after, as tables that MLflow's pages show: the format of
`mlflow.log_table`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lwo_dist.redaction import redact_values

__all__ = [
    "FOLDER",
    "Table",
    "completions_table",
    "read_evaluations",
    "save_tables",
    "scores_table",
]

FOLDER = "tables"

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
    evaluations: dict[int, dict[str, Any]], best_step: int | None = None
) -> Table:
    """The same held-out examples before training and after it: at `best_step`, else at the last
    evaluation.
    """
    columns = ["file", "line", "context", "reference", "before", "after"]
    if len(evaluations) < 2:
        return columns, []
    before = evaluations[min(evaluations)]["samples"]
    after = evaluations[best_step if best_step in evaluations else max(evaluations)]["samples"]
    written = {(sample["name"], sample["line"]): sample["prediction"] for sample in after}
    return columns, [
        redact_values(
            [
                s["name"],
                s["line"],
                s["context"],
                s["reference"],
                s["prediction"],
                written[s["name"], s["line"]],
            ]
        )
        for s in before
        if (s["name"], s["line"]) in written
    ]


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
