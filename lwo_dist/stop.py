"""Graceful stops: schedulers give notice before they reclaim a machine.

SIGTERM (Slurm, Kubernetes), SIGUSR1 (`sbatch --signal`), Ctrl-C, a wall-clock limit known from the
start, and anything a launcher polls for, such as Ray's preemption notice. The ranks agree on it
after a full step; the trainer then saves and raises `Stopped`, and the process exits with
EXIT_CODE, after Ctrl-C with 130: run it again later and the run resumes.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

# Import no torch here, and no psutil at the top: the command line needs `Stopped` before it needs a
# model, and even if neither is installed.

__all__ = ["CTRL_C", "EXIT_CODE", "StopNow", "StopRequest", "Stopped", "StopVote"]

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h
CTRL_C = "Ctrl-C"
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_ECHO_S = 2.0


class Stopped(Exception):  # noqa: N818
    """The run was asked to stop and has saved its progress. Raised on all ranks."""

    def __init__(self, reason: str, step: int, checkpoint: Path | None):
        super().__init__(reason, step, checkpoint)
        self.reason = reason
        self.step = step
        self.checkpoint = checkpoint

    def __str__(self) -> str:
        saved = (
            f"checkpoint {self.checkpoint}"
            if self.checkpoint
            else "no step was done, so nothing was saved"
        )
        return f"stopped by {self.reason} at step {self.step}; {saved}"


class StopNow(Exception):  # noqa: N818
    """Inside the trainer: all ranks have agreed to stop."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


class StopRequest:
    """Whether this process has been asked to stop, and why. Any thread may request it.

    Args:
        max_seconds: wall-clock limit, from the start of the process; None: no limit.
    """

    def __init__(self, max_seconds: float | None = None):
        import psutil

        self._reason: str | None = None
        self._asked_at = float("-inf")
        self._polls: list[Callable[[], str | None]] = []
        self._max_seconds = max_seconds
        # torchrun's ranks outlive a killed torchrun, and must not write into the run that follows.
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        # When this process started, on the monotonic clock, which cannot be changed.
        self._started = time.monotonic() - (time.time() - psutil.Process().create_time())

    @property
    def reason(self) -> str | None:
        """The first reason to stop; None: continue."""
        if self._max_seconds is not None and time.monotonic() - self._started > self._max_seconds:
            self.request(f"train.max_seconds = {self._max_seconds:g}")
        if self._launcher not in (None, os.getppid()):
            self.request("the death of its launcher")
        return self._reason

    def request(self, reason: str) -> None:
        # No lock: a signal handler may interrupt this method in its own thread.
        if self._reason is None:
            self._asked_at = time.monotonic()
            self._reason = reason

    def add_poll(self, poll: Callable[[], str | None]) -> None:
        """Add a function that returns a reason or None.

        Every rank calls it at the same checks, so it may be a collective.
        """
        self._polls.append(poll)

    def poll(self) -> str | None:
        """Call every poll, then return `reason`."""
        for found in [poll() for poll in self._polls]:
            if found is not None:
                self.request(found)
        return self.reason

    def listening(self) -> AbstractContextManager[None]:
        """Treat SIGTERM, SIGUSR1 and Ctrl-C as requests inside: there is something to save.

        A Ctrl-C after the first request raises KeyboardInterrupt. Only in the main thread, else do
        nothing.
        """
        return self._handling(self._ask)

    def interrupting(self) -> AbstractContextManager[None]:
        """As `listening`, but the first signal raises KeyboardInterrupt: nothing is to be saved."""
        return self._handling(self._interrupt)

    @contextmanager
    def _handling(self, handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before: dict[int, Any] = {number: signal.signal(number, handle) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                # After a request SIGTERM is ignored permanently: a launcher that sees the first
                # rank exit sends it to the others, which are still reporting or about to exit.
                ignored = self._reason is not None and number != signal.SIGINT
                then = signal.SIG_IGN if ignored else handler
                signal.signal(number, then if then is not None else signal.SIG_DFL)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._reason is None:
            self.request(_name(number))
            if number == signal.SIGINT and os.environ.get("RANK", "0") == "0":
                # Not print: the handler may have interrupted another print.
                os.write(1, b"saving a checkpoint, then stopping; Ctrl-C again stops at once\n")
        elif number == signal.SIGINT and not self._is_echo():
            raise KeyboardInterrupt

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self._reason is None or (number == signal.SIGINT and not self._is_echo()):
            self.request(_name(number))
            raise KeyboardInterrupt

    def _is_echo(self) -> bool:
        """Whether torchrun passes on a Ctrl-C that its ranks have had from the terminal."""
        return self._launcher is not None and time.monotonic() - self._asked_at < _ECHO_S


def _name(number: int) -> str:
    return CTRL_C if number == signal.SIGINT else signal.Signals(number).name


class StopVote:
    """Whether all ranks stop now. They vote about once a second rather than every step.

    Args:
        agree: a collective; returns any rank's reason on all ranks, or None.
    """

    def __init__(self, request: StopRequest, agree: Callable[[str | None], str | None]):
        self._request = request
        self._agree = agree
        self._interval = 1
        self._next = 0

    def pace(self, step_seconds: float) -> None:
        """Set the time per step, equal on all ranks, because it determines when they vote."""
        self._interval = max(1, int(1.0 / step_seconds)) if step_seconds > 0 else 1

    def after_step(self, step: int) -> None:
        """Call after every step.

        Raises:
            StopNow: on all ranks.
        """
        if step >= self._next:
            self._next = step + self._interval
            self.now()

    def now(self) -> None:
        """Vote immediately; every rank calls it at the same point.

        Raises:
            StopNow: on all ranks.
        """
        reason = self._agree(self._request.poll())
        if reason is not None:
            self._request.request(
                reason
            )  # Possibly another rank's; from now on it is also this one's.
            raise StopNow(reason)
