"""The end of a spool: the pictures, the report and the tables of the run, and the line that says
how it ended.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lwo_dist.report.charts import save_pictures
from lwo_dist.report.history import History
from lwo_dist.report.page import save_report
from lwo_dist.report.tables import completions_table, read_evaluations, save_tables, scores_table
from lwo_dist.spool import Spool, read_spool

from .sender import reason

__all__ = ["close_spool", "finish", "remedy"]

logger = logging.getLogger(__name__)


def finish(
    spool: Spool,
    status: str,
    *,
    error: str | None = None,
    time_ms: int | None = None,
    best_step: int | None = None,
    model: Mapping[str, Any] | None = None,
) -> None:
    """Draw, name the run's files for upload and write its end.

    Args:
        model: the fields of the record that logs the exported model; None: there is none to log.

    Raises:
        OSError
    """
    folder = spool.path.parent
    try:
        history = History.read(read_spool(spool.path))
        history.status = status
        evaluations = read_evaluations(folder)
        completions = completions_table(evaluations, best_step)
        files = save_pictures(history, folder / "pictures")
        files += save_tables(
            folder, {"scores": scores_table(evaluations), "completions": completions}
        )
        files.append(save_report(history, completions, folder / "report.html"))
    except Exception as problem:  # a picture is no reason to leave a run without its end
        logger.warning("no pictures of the run: %s", reason(problem))
        files = []
    files += [file for file in (folder / "summary.json",) if file.exists()]
    for file in files:
        spool.append("artifact", path=file.relative_to(folder).as_posix())
    if model is not None:
        spool.append("model", **model)
    spool.append(
        "end",
        status=status,
        attempt=spool.attempts,
        **({"error": error} if error else {}),
        **({"time_ms": time_ms} if time_ms else {}),
    )


def close_spool(path: Path, status: str) -> None:
    """End the spool of a run that died without a word, at the time of its last line. Raises:
    OSError.
    """
    spool = Spool(path)
    try:
        if not spool.ended:
            finish(spool, status, time_ms=spool.last_time_ms)
    finally:
        spool.close()


def remedy(spool: Path) -> str:
    return f"send it with: lwo-dist replay {shlex.quote(str(spool))}"
