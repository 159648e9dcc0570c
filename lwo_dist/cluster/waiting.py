"""While a run waits for room on the cluster, Ray Train says nothing, and there are no workers to
hear of a stop: here a thread does both.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping

from lwo_dist.config import Config
from lwo_dist.stop import CTRL_C, StopRequest

from .nodes import nodes_of_cluster, placement_groups, room

__all__ = ["watched_waiting"]

_LOOK_S = 1.0
_FIRST_LINE_S = 15.0  # A run that finds room says nothing; then the times between the lines double.
# A node that goes takes a part of the slots along, while workers on others may still be saving.
_PATIENCE_S = 10.0


@contextlib.contextmanager
def watched_waiting(
    config: Config, resources: Mapping[str, float], stop: StopRequest
) -> Iterator[None]:
    """Say when the run waits for room, and interrupt the wait if the run is to stop.

    Workers hear of `stop` themselves. While there are none, KeyboardInterrupt is raised in the
    main thread.
    """
    over = threading.Event()
    can_interrupt = threading.current_thread() is threading.main_thread()
    watch = threading.Thread(
        target=_watch,
        args=(config, resources, stop, over, can_interrupt),
        name="lwo-dist-waiting",
        daemon=True,
    )
    watch.start()
    try:
        yield
    finally:
        over.set()
        watch.join(timeout=5)  # A Ray that is gone may not answer it.


def _watch(
    config: Config,
    resources: Mapping[str, float],
    stop: StopRequest,
    over: threading.Event,
    can_interrupt: bool,
) -> None:
    began = None
    next_line = _FIRST_LINE_S
    while not over.wait(_LOOK_S):
        waits = _waits()
        if waits is None:  # Ray Train asks for the slots again, from time to time.
            continue
        if not waits:
            began = None
            next_line = _FIRST_LINE_S
            continue
        began = began or time.monotonic()
        waited = time.monotonic() - began
        if stop.reason is not None and (waited >= _PATIENCE_S or stop.reason == CTRL_C):
            if can_interrupt and not over.is_set():
                os.kill(os.getpid(), signal.SIGINT)  # after a request it is a KeyboardInterrupt
            return
        if waited >= next_line:
            with contextlib.suppress(Exception):  # as in _waits
                print(_line(config, resources, waited), flush=True)
            next_line *= 2


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
