"""The runs of a comparison, each in a process of its own: the memory that is measured is its own,
and if it dies, only its row is lost.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any, Literal

from lwo_dist.config import Config
from lwo_dist.errors import UserError, first_line
from lwo_dist.stop import SIGNALS, Stopped

__all__ = ["FailedRunError", "Launcher", "run_children"]

Launcher = Literal["ray", "process"]
"""`ray`: on Ray Train, as `lwo-dist train`. `process`: one rank, without Ray."""


class FailedRunError(Exception):
    """The run did not end well; the message is one line."""


def run_children(
    configs: Sequence[Config], launcher: Launcher, jobs: int = 1
) -> dict[str, FailedRunError | None]:
    """Run the configs to their ends, `jobs` at a time; their results are in their folders.

    Returns:
        By run name: None, or how the run failed.

    Raises:
        Stopped: this process was asked to stop; the runs under way have saved their progress.
    """
    outcomes: dict[str, FailedRunError | None] = {}
    waiting = list(reversed(configs))
    running: dict[Connection, Any] = {}
    stopped: Stopped | None = None
    # The fork server reads it when it imports the libraries.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with _passing_on(running) as signals:
        while running or (waiting and not signals):
            while waiting and len(running) < jobs and not signals:
                connection, process = _start(waiting.pop(), launcher)
                running[connection] = process
                for number in signals:  # that came while it started
                    os.kill(process.pid, number)
            for ready in wait(list(running)):
                assert isinstance(ready, Connection)
                name, outcome = _outcome(ready, running.pop(ready))
                if isinstance(outcome, Stopped):
                    stopped = outcome
                else:
                    outcomes[name] = outcome
    if stopped is not None:
        raise stopped
    if signals:
        raise Stopped(signal.Signals(signals[0]).name, 0, None)
    return outcomes


def _start(config: Config, launcher: Launcher) -> tuple[Connection, Any]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lwo_dist.run"])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_main, args=(config, launcher, theirs), name=config.run_name)
    process.start()
    theirs.close()
    return ours, process


def _outcome(connection: Connection, process: Any) -> tuple[str, FailedRunError | Stopped | None]:
    try:
        kind, content = connection.recv()
    except EOFError:
        kind, content = "died", None
    process.join()
    if kind == "stopped":
        return process.name, Stopped(*content)
    if kind == "died":
        code = process.exitcode or 0
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return process.name, FailedRunError(f"its process died ({how})")
    return process.name, FailedRunError(content) if kind == "failed" else None


@contextmanager
def _passing_on(running: Mapping[Any, Any]) -> Iterator[list[int]]:
    """Pass signals on to the children, which decide what they mean: they have something to save.

    Yields:
        The signals so far.
    """
    signals: list[int] = []

    def pass_on(number: int, frame: Any) -> None:
        signals.append(number)
        for process in list(running.values()):
            if process.is_alive():
                os.kill(process.pid, number)

    before = {number: signal.signal(number, pass_on) for number in SIGNALS}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _main(config: Config, launcher: Launcher, results: Connection) -> None:
    # A group of its own: a Ctrl-C of the terminal would reach it twice.
    os.setpgid(0, 0)
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    try:
        if launcher == "ray":
            from lwo_dist.cluster.ray_train import train

            train(config)
        else:
            from lwo_dist.run import prepare_and_run

            prepare_and_run(config)
        results.send(("done", None))
    except Stopped as stopped:
        results.send(("stopped", (stopped.reason, stopped.step, stopped.checkpoint)))
    except UserError as error:
        results.send(("failed", str(error)))
    except BaseException as error:
        results.send(("failed", f"{type(error).__name__}: {first_line(error)}"))
        raise


def _stop_with_parent() -> None:
    """Save and stop if the comparison is killed: the next one goes on with this run."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
