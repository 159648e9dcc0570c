"""Run a function on several ranks of one machine: gloo, a process per rank, started in about 0.1 s
each.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

__all__ = ["RanksError", "fork_server", "run_ranks"]

# What a rank needs is imported once, in the server that it is forked from. Ranks that use DeepSpeed
# have a server of their own: where all else runs, DeepSpeed is not imported behind its back.
_PRELOAD = "tests.preload"
_PRELOAD_DEEPSPEED = "tests.preload_deepspeed"


class RanksError(AssertionError):
    """A rank raised, died or hung. The message holds the traceback of the rank that failed
    first.
    """


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 120,
    deepspeed: bool = False,
) -> list[Any]:
    """Call `fn(*args)` on `world_size` ranks that share a gloo process group; return the ranks'
    values in rank order.

    `fn` must be a function at the top of a module, `args` and what it returns must pickle. The
    ranks have the caller's environment of this moment, RANK, LOCAL_RANK, WORLD_SIZE,
    LOCAL_WORLD_SIZE and one thread each.

    Args:
        timeout: seconds, for the whole call.
        deepspeed: DeepSpeed is imported already. Without, a rank may still import it, which takes
            it two seconds.

    Raises:
        RanksError: a rank raised, died or was still running after `timeout`; all ranks are gone by
            then.
    """
    context = multiprocessing.get_context("forkserver")
    server = fork_server(_PRELOAD_DEEPSPEED if deepspeed else _PRELOAD)
    with tempfile.TemporaryDirectory(prefix="ranks-") as name:
        folder = Path(name)
        environment = dict(os.environ)
        ranks = [
            context.Process(
                target=_rank_main, args=(folder, rank, world_size, timeout, environment, fn, args)
            )
            for rank in range(world_size)
        ]
        try:
            # `multiprocessing` knows one server only.
            connect = server.connect_to_new_process
            with patch.object(forkserver, "connect_to_new_process", connect):
                for process in ranks:
                    process.start()
            _join(folder, ranks, timeout)
        finally:
            for process in ranks:
                if process.pid is not None:
                    process.kill()
                    process.join()
        return [pickle.loads((folder / f"{rank}.value").read_bytes()) for rank in range(world_size)]


@functools.cache
def fork_server(preload: str = _PRELOAD) -> forkserver.ForkServer:
    """The fork server, with the modules that the processes need already imported."""
    server = forkserver.ForkServer()
    server.set_forkserver_preload([preload])
    environment = {
        "PYTHONPATH": f"{Path(__file__).parents[1]}:{os.environ.get('PYTHONPATH', '')}",
        # The server must not initialise CUDA, which no fork survives, nor report the use of MLflow,
        # which DeepSpeed imports. The ranks have the caller's environment instead.
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    with patch.dict(os.environ, environment):
        server.ensure_running()
    return server


def _join(folder: Path, ranks: list[ForkServerProcess], timeout: float) -> None:
    # One second more than the ranks have: by then each hung rank has written where it hangs.
    deadline = time.monotonic() + timeout + 1
    running = {process.sentinel: process for process in ranks}
    while running:
        ended = wait(list(running), timeout=max(0.0, deadline - time.monotonic()))
        if not ended:
            hung = [rank for rank, process in enumerate(ranks) if process.is_alive()]
            stacks = "\n".join(
                f"rank {rank}:\n{(folder / f'{rank}.stack').read_text()}" for rank in hung
            )
            raise RanksError(f"ranks {hung} still ran after {timeout} s\n{stacks}")
        if any(running.pop(sentinel).exitcode != 0 for sentinel in ended):  # type: ignore[arg-type]
            raise RanksError(_first_failure(folder, ranks))


def _first_failure(folder: Path, ranks: list[ForkServerProcess]) -> str:
    # A failed rank makes its peers fail too, with a broken connection: the first in time is the
    # cause.
    tracebacks = sorted(folder.glob("*.error"), key=lambda path: path.stat().st_mtime_ns)
    dead = [
        (rank, process.exitcode)
        for rank, process in enumerate(ranks)
        if (process.exitcode or 0) < 0
    ]
    if dead:
        return f"rank {dead[0][0]} died with exit code {dead[0][1]}"
    if not tracebacks:
        return f"a rank ended early, exit codes {[process.exitcode for process in ranks]}"
    return f"rank {tracebacks[0].stem}:\n{tracebacks[0].read_text()}"


def _rank_main(
    folder: Path,
    rank: int,
    world_size: int,
    timeout: float,
    environment: dict[str, str],
    fn: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    # The server's environment is that of its first use, not the caller's of now.
    os.environ.clear()
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    os.environ.update(WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size))
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    with (folder / f"{rank}.stack").open("w") as stack:
        faulthandler.dump_traceback_later(timeout, file=stack)
        try:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{folder}/rendezvous",
                rank=rank,
                world_size=world_size,
                timeout=timedelta(
                    seconds=timeout + 60
                ),  # Not the first to end a hang: a stack of each rank says more.
            )
            value = pickle.dumps(fn(*args))
            if dist.is_initialized():
                # A rank that leaves first would close connections that its peers still read from.
                dist.barrier()
                dist.destroy_process_group()
            (folder / f"{rank}.value").write_bytes(value)
        except BaseException:
            with contextlib.suppress(OSError):
                (folder / f"{rank}.error").write_text(traceback.format_exc())
            os._exit(1)  # Not through the interpreter's shutdown: a broken group may hang there.
        finally:
            faulthandler.cancel_dump_traceback_later()
