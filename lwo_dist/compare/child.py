"""One run of a comparison, in a process of its own: its memory is its own, and if it dies, only its
row is lost.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any, Literal

from lwo_dist.config import Config
from lwo_dist.errors import UserError, first_line
from lwo_dist.stop import SIGNALS, Stopped

__all__ = ["FailedRunError", "Launcher", "run_child"]

Launcher = Literal["ray", "process"]
"""`ray`: on Ray Train, as `lwo-dist train`. `process`: one rank, without Ray."""


class FailedRunError(Exception):
    """The run did not end well; the message is one line."""


def run_child(config: Config, launcher: Launcher) -> None:
    """Run `config` to its end; its results are in its folder.

    Raises:
        FailedRunError: the run failed, or its process died.
        Stopped: this process was asked to stop; the run has saved its progress.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lwo_dist.run"])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_main, args=(config, launcher, theirs), name=config.run_name)
    with _passing_on(process) as early:
        process.start()
        theirs.close()
        assert process.pid is not None
        for number in early:
            os.kill(process.pid, number)
        try:
            kind, content = ours.recv()
        except EOFError:
            kind, content = "died", None
        process.join()
    if kind == "stopped":
        raise Stopped(*content)
    if kind == "died":
        how = process.exitcode or 0
        raise FailedRunError(f"its process died ({_exit(how)})")
    if kind == "failed":
        raise FailedRunError(content)


def _exit(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


@contextmanager
def _passing_on(process: Any) -> Iterator[list[int]]:
    """Pass signals on to the child, which decides what they mean: it has something to save.

    Yields:
        The signals that came before the child had started.
    """
    early: list[int] = []

    def pass_on(number: int, frame: Any) -> None:
        if process.pid is None:
            early.append(number)
        elif process.is_alive():
            os.kill(process.pid, number)

    before = {number: signal.signal(number, pass_on) for number in SIGNALS}
    try:
        yield early
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _main(config: Config, launcher: Launcher, results: Connection) -> None:
    # A group of its own: a Ctrl-C of the terminal would reach it twice.
    os.setpgid(0, 0)
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
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
