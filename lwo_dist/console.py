"""What a run says on the console while it starts and trains."""

from __future__ import annotations

import os

__all__ = ["say"]


def say(line: str) -> None:
    """Print a line on rank 0, or where there are no ranks yet; flushed, as a job's log is a file.

    Imports nothing heavy and needs no process group: the first line comes before both.
    """
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)
