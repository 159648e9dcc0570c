"""Between Ray and a run on one of its workers: what stops the run, and which checkpoints there
are.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lwo_dist.config import Config
from lwo_dist.stop import Stopped, StopRequest
from lwo_dist.storage import is_url

__all__ = ["Interrupted", "forwarded", "run_on_worker"]

_ASK_TIMEOUT_S = 10


@dataclass(frozen=True)
class Interrupted:
    """What a worker returns, because Ray would answer an exception by starting it again."""

    stopped: Stopped
    preempted_nodes: tuple[str, ...]
    """Ids of the nodes that Ray is about to lose, if that is why."""


class _StopFlag:
    """An actor without resources: the driver, who gets the signals, tells the workers, whom Ray
    runs in threads.
    """

    def __init__(self) -> None:
        self._reason: str | None = None
        self._was_asked = False

    def set(self, reason: str) -> bool:
        """Whether a worker listens: before the first step none does."""
        self._reason = reason
        return self._was_asked

    def get(self) -> str | None:
        self._was_asked = True
        return self._reason


@contextlib.contextmanager
def forwarded(stop: StopRequest) -> Iterator[Any]:
    """A handle for `run_on_worker` that carries the driver's request to stop, from whichever thread
    it comes. While no worker listens yet, KeyboardInterrupt is raised in the main thread instead.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    flag = ray.remote(num_cpus=0, scheduling_strategy=here)(_StopFlag).remote()
    over = threading.Event()
    can_interrupt = threading.current_thread() is threading.main_thread()

    def forward() -> None:
        while not over.wait(0.2):
            if (reason := stop.reason) is None:
                continue
            with contextlib.suppress(Exception):  # Ray is going; the main thread sees why
                if not ray.get(flag.set.remote(reason)) and can_interrupt and not over.is_set():
                    os.kill(os.getpid(), signal.SIGINT)  # after a request: KeyboardInterrupt
            return

    thread = threading.Thread(target=forward, name="lwo-dist-stop", daemon=True)
    thread.start()
    try:
        yield flag
    finally:
        over.set()
        thread.join()


def run_on_worker(config: Config, flag: Any, holder: str | None = None) -> Any:
    """`run` in Ray Train's worker: its summary on rank 0, or Interrupted on every rank.

    Args:
        holder: the driver's id in the run's lease.
    """
    from lwo_dist.run import run

    from .gauges import RayGauges

    stop = StopRequest()
    preempted = list[str]()
    if flag is not None and os.environ["RANK"] == "0":
        stop.add_poll(lambda: _ask(flag))
    if os.environ.get("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "1").lower() not in ("0", "false"):
        stop.add_poll(lambda: _preemption(preempted))
    try:
        return run(
            config,
            [RayGauges()],
            on_commit=partial(_report, config),
            stop=stop,
            holder=holder,
        )
    except Stopped as stopped:
        return Interrupted(stopped, tuple(preempted))


def _ask(flag: Any) -> str | None:
    import ray

    try:
        reason: str | None = ray.get(flag.get.remote(), timeout=_ASK_TIMEOUT_S)
    except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
        return None  # Its node is gone, or too busy; the driver is what ends this run then.
    return reason


def _preemption(preempted: list[str]) -> str | None:
    import ray.train

    info = ray.train.get_preemption_info()  # A collective.
    if info is None:
        return None
    preempted[:] = info.preempted_node_ids
    return f"the preemption of node {', '.join(node[:8] for node in preempted)}"


def _report(config: Config, step: int, folder: Path) -> None:
    """Tell Ray of a checkpoint that is there for good; every rank calls it."""
    import ray.train

    for name in list(logging.root.manager.loggerDict):
        if name.endswith(
            "execution/context.py"
        ):  # Ray's: a line for every report, outside its `log_level`.
            logging.getLogger(name).setLevel(logging.WARNING)
    where = f"{config.storage.rstrip('/')}/{config.run_name}/checkpoints/{folder.name}"
    ray.train.report(
        {"step": step},
        checkpoint=ray.train.Checkpoint(where if is_url(config.storage) else str(folder)),
        checkpoint_upload_mode=ray.train.CheckpointUploadMode.NO_UPLOAD,
    )
