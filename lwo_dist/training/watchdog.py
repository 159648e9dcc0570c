"""Ends a hanging run in bounded time and reports where: rank, host, step and layer.

If the backend supports it, a collective that waits for a dead or stopped peer ends by its own
timeout. For all other hangs (a GPU kernel, a file system, a peer of NCCL) a thread of this process
ends it.
"""

from __future__ import annotations

import faulthandler
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from lwo_dist import distributed
from lwo_dist.errors import UserError, first_line
from lwo_dist.stop import StopNow, Stopped

__all__ = ["CollectiveError", "Watchdog"]

_COLLECTIVE = re.compile(
    r"gloo|nccl|timed? ?out|connection (was )?(closed|reset|refused)|socket", re.IGNORECASE
)


class CollectiveError(RuntimeError):
    """A collective failed or timed out. Names rank, host, step, layer and unresponsive ranks."""


class Watchdog:
    """Use as a context around the training loop, and call `beat` as it progresses.

    Args:
        timeout_s: seconds that a collective may take (`cluster.timeout_s`). After half of it
            without a beat the watchdog prints a warning; after all of it plus a margin it ends the
            process.
        end: ends the process; replaceable in tests.
    """

    def __init__(self, timeout_s: float, *, end: Callable[[int], object] = os._exit):
        self._timeout_s = timeout_s
        # The collective's own timeout, which leaves a traceback, should fire first; it starts after
        # the beat.
        self._limit_s = timeout_s + min(30.0, timeout_s / 2)
        self._end = end
        self._where = "before the first step"
        self._last = time.monotonic()
        self._pauses = 0
        self._warned = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="lwo-dist-watchdog", daemon=True)

    def beat(self, step: int, layer: str) -> None:
        """A micro-batch of `step` (from 0) is starting, or a step is complete."""
        self._where = f"step {step + 1}, layer {layer}"
        self._last = time.monotonic()
        self._warned = False

    @contextmanager
    def paused(self, what: str) -> Iterator[None]:
        """Expect no beats inside: evaluations and saves take as long as they take."""
        where = self._where
        if not self._pauses:
            self._where = f"{what} after {where}"
        self._pauses += 1
        yield
        # Not after an error: the position then shows where it happened.
        self._pauses -= 1
        self._where = where
        self._last = time.monotonic()

    @property
    def position(self) -> str:
        """`rank 1 on host-b, step 17, layer layer_3`."""
        return f"rank {distributed.rank()} on {socket.gethostname()}, {self._where}"

    def __enter__(self) -> Watchdog:
        self._last = time.monotonic()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._over.set()
        if not isinstance(error, Exception) or isinstance(error, UserError | StopNow | Stopped):
            return
        if isinstance(error, RuntimeError) and _COLLECTIVE.search(str(error)):
            silent = distributed.silent_ranks(min(5.0, self._timeout_s))
            who = f"; no answer from rank {', '.join(map(str, silent))}" if silent else ""
            raise CollectiveError(
                f"{self.position}: a collective failed{who} (cluster.timeout_s ="
                f" {self._timeout_s:g}): {first_line(error)}"
            ) from error
        error.add_note(f"at {self.position}")

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self._timeout_s / 10)):
            idle = time.monotonic() - self._last
            if self._pauses:
                continue
            if idle > self._limit_s:
                self._say(
                    f"no progress for {idle:.0f} s, more than cluster.timeout_s ="
                    f" {self._timeout_s:g}; ending"
                )
                faulthandler.dump_traceback(all_threads=True)
                sys.stderr.flush()
                self._end(1)
                return
            if idle > self._timeout_s / 2 and not self._warned:
                self._warned = True
                self._say(f"no progress for {idle:.0f} s (cluster.timeout_s = {self._timeout_s:g})")

    def _say(self, what: str) -> None:
        print(f"watchdog: {self.position}: {what}", file=sys.stderr, flush=True)
