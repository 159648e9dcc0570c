"""The last records of a spool: the run's files, its model and how it ended."""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lwo_dist.redaction import redact
from lwo_dist.report import write_report
from lwo_dist.spool import Spool

from .sender import reason

__all__ = ["append_end", "end_dead_run", "known_store", "replay_hint"]

logger = logging.getLogger(__name__)


def append_end(
    spool: Spool,
    status: str,
    *,
    error: str | None = None,
    time_ms: int | None = None,
    best_step: int | None = None,
    description: str | None = None,
    model: Mapping[str, Any] | None = None,
) -> None:
    """Write the report, then the records that name the run's files, its model and its end.

    Args:
        status: FINISHED, FAILED or KILLED.
        error: why the run failed or was killed, in one line.
        time_ms: when the run ended, in milliseconds since 1970; None: now.
        best_step: the checkpoint that the report compares with the start; None: the newest.
        description: what the run's page in MLflow says of the run; None: what it says already.
        model: the fields of the record that logs the exported model; None: no model is logged.

    Raises:
        OSError: the spool cannot be written.
    """
    run_dir = spool.path.parent
    try:
        files = write_report(spool.path, status, best_step)
    except Exception as problem:  # a picture is no reason to leave a run without its end
        logger.warning("the report could not be written: %s", reason(problem))
        files = []
    summary = run_dir / "summary.json"
    if summary.exists():
        files.append(summary)
    for file in files:
        spool.append("artifact", path=file.relative_to(run_dir).as_posix())
    if model is not None:
        spool.append("model", **model)
    end: dict[str, Any] = {"status": status, "attempt": spool.attempts}
    if error:
        end["error"] = error
    if description:
        end["description"] = description
    if time_ms:
        end["time_ms"] = time_ms
    spool.append("end", **end)


def end_dead_run(spool_path: Path, status: str) -> None:
    """End the spool of a run that died without writing its end, at the time of its last record.

    Does nothing if the end is there.

    Raises:
        OSError: the spool cannot be written.
    """
    spool = Spool(spool_path)
    try:
        if not spool.ended:
            append_end(spool, status, time_ms=spool.last_time_ms)
    finally:
        spool.close()


def known_store(spool_path: Path, named: str) -> str | None:
    """The store that a spool names, if it is the environment's or the database beside the runs.

    The returned URL, which may hold a password, never comes from the spool: a forged spool could
    otherwise direct the environment's credentials to its own server.
    """
    beside = f"sqlite:///{spool_path.absolute().parents[1]}/mlflow.db"
    known = (os.environ.get("MLFLOW_TRACKING_URI"), beside)
    return next((uri for uri in known if uri and redact(uri) == named), None)


def replay_hint(spool_path: Path, uri: str) -> str:
    """The command that sends the rest of a spool, for the end of a message.

    Args:
        uri: the run's store, without credentials.
    """
    command = f"lwo-dist replay {shlex.quote(str(spool_path))}"
    if known_store(spool_path, uri) is None:
        command += f" --uri {shlex.quote(uri)}"
    return f"send it with: {command}"
