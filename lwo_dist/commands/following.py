"""Follow a job in the terminal, for `submit` and `jobs logs`."""

from __future__ import annotations

import shlex
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lwo_dist.cluster.jobs import Jobs

__all__ = ["follow", "how_to_follow"]


def follow(jobs: Jobs, job: str, address: str) -> int:
    """Stream the job's log to stdout until it ends. Returns the job's exit code.

    Ctrl-C asks whether to stop the job; without a terminal to ask, the job keeps running. The exit
    code is then 130.
    """

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    try:
        return jobs.follow(job, write)
    except KeyboardInterrupt:
        answer = ""
        if sys.stdin.isatty():
            with suppress(EOFError, KeyboardInterrupt):
                answer = input("\nd: detach, the job runs on; s: stop the job [d] ").strip().lower()
        if answer not in ("s", "stop"):
            print(f"\n{how_to_follow(address, job)}")
            return 130
        jobs.stop(job)
        print(f"stopping {job}", flush=True)
        return jobs.follow(job, lambda text: None)


def how_to_follow(address: str, job: str) -> str:
    """Two lines: the commands to follow and to stop the job."""
    where = f"--address {shlex.quote(address)}"
    return (
        f"follow it: lwo-dist jobs logs -f {where} {job}\nstop it: lwo-dist jobs stop {where} {job}"
    )
