"""While a run waits for room on the cluster, Ray Train says nothing and hears nothing: here it does
both.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from lwo_dist.config import Config
from lwo_dist.stop import Stopped, StopRequest
from lwo_dist.storage import RunFolder, storage_folder

from .nodes import nodes_of_cluster, placement_groups, room

__all__ = ["watched_waiting"]

_LOOK_S = 1.0
_FIRST_LINE_S = 15.0  # A run that finds room says nothing; then the times between the lines double.
# A node that goes takes a part of the slots along, while workers on others may still be saving.
_PATIENCE_S = 10.0
_OVER = b"\0"  # No signal has this number.


@contextlib.contextmanager
def watched_waiting(
    config: Config, resources: Mapping[str, float], stop: StopRequest
) -> Iterator[None]:
    """Say when the run waits for room, and let it end meanwhile. With workers, they hear of `stop`,
    and Ray of Ctrl-C.

    Raises:
        Stopped: `stop` was requested while the run waited; its checkpoint is the newest one.
    """
    bell, ring = socket.socketpair()
    ring.setblocking(False)
    watch = _Watch(config, resources, stop, bell)
    # Signals reach the main thread only. Ray puts its own handler of Ctrl-C there; the bell rings
    # all the same.
    before = signal.set_wakeup_fd(ring.fileno()) if watch.can_end else -1
    watch.start()
    try:
        yield
    except KeyboardInterrupt:
        if not watch.ended_by_stop:
            raise
        raise _stopped(config, str(stop.reason)) from None
    finally:
        if watch.can_end:
            signal.set_wakeup_fd(before)
        ring.send(_OVER)
        ring.close()
        watch.join(timeout=5)  # A Ray that is gone may not answer it.


class _Watch(threading.Thread):
    def __init__(
        self, config: Config, resources: Mapping[str, float], stop: StopRequest, bell: socket.socket
    ):
        super().__init__(name="lwo-dist-waiting", daemon=True)
        self._config = config
        self._resources = resources
        self._stop_request = stop
        self._bell = bell
        self._handler: Any = signal.getsignal(signal.SIGINT)
        self.can_end = threading.current_thread() is threading.main_thread()
        self.ended_by_stop = False

    def run(self) -> None:
        with self._bell:
            self._listen()

    def _listen(self) -> None:
        began = None
        next_line = _FIRST_LINE_S
        ends = False
        while True:
            came = self._bell.recv(64) if select.select([self._bell], [], [], _LOOK_S)[0] else b""
            if _OVER in came:
                return
            ends = ends or signal.SIGINT in came
            waits = _waits()
            if waits is None:  # Ray Train asks for the slots again, from time to time.
                continue
            if not waits:
                began = None
                next_line = _FIRST_LINE_S
                continue
            began = began or time.monotonic()
            waited = time.monotonic() - began
            if not ends and self._stop_request.reason is not None and waited >= _PATIENCE_S:
                ends = True
                self.ended_by_stop = True
            if ends:
                self._end()
            elif waited >= next_line:
                with contextlib.suppress(Exception):  # as in _waits
                    print(_line(self._config, self._resources, waited), flush=True)
                next_line *= 2

    def _end(self) -> None:
        """Bring the main thread out of Ray.

        At the first Ctrl-C Ray 2.60 asks its controller to end, which waits for room and does not
        listen; at the third it leaves. They come one by one, so that none is lost, as long as Ray's
        handler is there.
        """
        if self.can_end and signal.getsignal(signal.SIGINT) is not self._handler:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(_LOOK_S)


def _waits() -> bool | None:
    """Whether slots were asked for that are not there; None: nothing is asked for now."""
    try:
        states = set(placement_groups().values())
    except Exception:  # Ray is going, or busy. The main thread will see it.
        return None
    return "CREATED" not in states if states else None


def _line(config: Config, resources: Mapping[str, float], waited: float) -> str:
    slots = room(nodes_of_cluster(), resources)
    min_workers = config.cluster.min_workers
    takes = ", ".join(f"{amount:g} {name}" for name, amount in resources.items())
    why = (
        "which others use"
        if slots >= min_workers
        else "add nodes, or stop it and go on with fewer workers"
    )
    return (
        f"waiting for room for {min_workers} worker(s) of {takes} for {waited:.0f} s; the nodes "
        f"that are alive have room for {slots}, {why}"
    )


def _stopped(config: Config, reason: str) -> Stopped:
    from lwo_dist.checkpoint.format import committed_steps, step_folder
    from lwo_dist.tracking.mlflow import end_run

    run = RunFolder(config.storage, str(config.run_name))
    end_run(
        config, storage_folder(config.storage), str(config.run_name), "KILLED"
    )  # There are no workers to do it.
    steps = committed_steps(run)
    return (
        Stopped(reason, steps[-1], run.local / step_folder(steps[-1]))
        if steps
        else Stopped(reason, 0, None)
    )
