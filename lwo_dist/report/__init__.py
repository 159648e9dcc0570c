"""The report of a run, from its spool and its evaluations: pictures, tables and one HTML page."""

from __future__ import annotations

from pathlib import Path

from lwo_dist.spool import read_spool
from lwo_dist.tasks.scores import ScoreSheet

from .charts import save_pictures
from .history import History
from .outcome import Outcome
from .page import save_report
from .tables import completions_table, read_evaluations, save_tables, scores_table

__all__ = ["write_report"]


def write_report(spool: Path, status: str, best_step: int | None = None) -> list[Path]:
    """Write `pictures/`, `tables/` and `report.html` into the folder that `spool` lies in.

    Args:
        spool: the run's metrics.jsonl.
        status: FINISHED, FAILED or KILLED.
        best_step: the checkpoint whose completions are shown, unless `tracking.log_completions` is
            false; None: the last evaluation's.

    Returns:
        The files that were written.

    Raises:
        OSError
    """
    run_dir = spool.parent
    history = History.read(read_spool(spool))
    history.status = status
    evaluations = read_evaluations(run_dir)
    # An earlier attempt may have written samples under another setting.
    shown = history.run.get("parameters", {}).get("tracking.log_completions") != "false"
    sheet = ScoreSheet.read(history.run, history.points)
    completions = completions_table(evaluations if shown else {}, best_step, sheet)
    tables = {"scores": scores_table(evaluations), "completions": completions}
    return [
        *save_pictures(history, run_dir / "pictures"),
        *save_tables(run_dir, tables),
        save_report(
            history,
            Outcome.read(sheet, evaluations, best_step),
            completions,
            run_dir / "report.html",
        ),
    ]
