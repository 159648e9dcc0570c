"""The end of a spool: the pictures of the run, and the line that says how it ended."""

from __future__ import annotations

import logging
import shlex
from pathlib import Path

from .charts import save_pictures
from .sender import reason
from .spool import Spool, read_spool

__all__ = ["close_spool", "finish", "remedy"]

logger = logging.getLogger(__name__)


def finish(spool: Spool, status: str, *, error: str | None = None, time_ms: int | None = None) -> None:
    """Draw the pictures, name the run's files for upload and write its end. Raises: OSError."""
    folder = spool.path.parent
    try:
        files = save_pictures(list(read_spool(spool.path)), folder / "pictures")
    except Exception as problem:  # a picture is no reason to leave a run without its end
        logger.warning("no pictures of the run: %s", reason(problem))
        files = []
    files += [file for file in (folder / "summary.json",) if file.exists()]
    for file in files:
        spool.append("artifact", path=file.relative_to(folder).as_posix())
    spool.append(
        "end", status=status, **({"error": error} if error else {}), **({"time_ms": time_ms} if time_ms else {})
    )


def close_spool(path: Path, status: str) -> None:
    """End the spool of a run that died without a word, at the time of its last line. Raises: OSError."""
    spool = Spool(path)
    try:
        if not spool.ended:
            finish(spool, status, time_ms=spool.last_time_ms)
    finally:
        spool.close()


def remedy(spool: Path) -> str:
    return f"send it with: lwo-dist replay {shlex.quote(str(spool))}"
