"""Processes that compete for one run: drivers, each with a worker that trains and saves.

Each acknowledged commit is logged in `commits.log` as "step claim"; the reason why a process gave
up is in `<name>.error`.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from unittest.mock import patch

from lwo_dist import lease
from lwo_dist.checkpoint.format import newest_checkpoint
from lwo_dist.checkpoint.resume import restore
from lwo_dist.checkpoint.store import LayerStore
from lwo_dist.errors import UserError
from lwo_dist.storage import RunFolder
from tests import stores
from tests.ranks import fork_server

__all__ = ["commits", "error", "held", "start", "wait_for"]

DEADLINE_S = 60


def start(storage: str, notes: Path, name: str, steps: int) -> tuple[ForkServerProcess, ...]:
    """Start a driver and its worker, which ends after `steps` steps or when it loses the run.

    The driver ends at once if it is refused; otherwise when the worker has ended and a file
    `finish` exists in `notes`.
    """
    context = multiprocessing.get_context("forkserver")
    pair = (
        context.Process(target=_drive, args=(storage, notes / name, dict(os.environ))),
        context.Process(target=_work, args=(storage, notes / name, steps, dict(os.environ))),
    )
    connect = fork_server().connect_to_new_process
    with patch.object(forkserver, "connect_to_new_process", connect):
        for process in pair:
            process.start()
    return pair


@contextmanager
def held(storage: str) -> Iterator[None]:
    """Inside, another process holds the run."""
    with tempfile.TemporaryDirectory() as folder:
        notes = Path(folder)
        driver, worker = start(storage, notes, "holder", 0)
        worker.join(DEADLINE_S)
        yield
        (notes / "finish").write_text("\n")
        driver.join(DEADLINE_S)


def commits(notes: Path) -> list[tuple[int, int]]:
    """(step, number of the claim) of each commit, in order."""
    log = notes / "commits.log"
    lines = log.read_text().splitlines() if log.exists() else []
    return [(int(step), int(claim)) for step, claim in map(str.split, lines)]


def error(notes: Path, name: str) -> str:
    path = notes / f"{name}.error"
    return path.read_text() if path.exists() else ""


def wait_for(path: Path, lines: int = 1) -> str:
    """The text of a file, once it has `lines` lines."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        text = path.read_text() if path.exists() else ""
        if text.count("\n") >= lines:
            return text
        time.sleep(0.005)
    raise AssertionError(f"{path} does not have {lines} lines after {DEADLINE_S} s")


def _drive(storage: str, name: Path, environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    lease.RENEW_S = 0.2
    lease.EXPIRES_S = 5.0
    run = RunFolder(storage, "r")
    try:
        claim = lease.take(run)
    except UserError as refused:
        name.with_suffix(".error").write_text(str(refused))
        name.with_suffix(".holder").write_text("none\n")
        return
    with lease.renewed(run):
        name.with_suffix(".holder").write_text(f"{claim.holder}\n")
        wait_for(name.with_suffix(".done"))
        wait_for(name.with_name("finish"))


def _work(storage: str, name: Path, steps: int, environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    holder = wait_for(name.with_suffix(".holder")).strip()
    if holder == "none":
        return
    try:
        _train(RunFolder(storage, "r"), holder, name.with_name("commits.log"), steps)
    except UserError as lost:
        name.with_suffix(".error").write_text(str(lost))
    name.with_suffix(".done").write_text("\n")


def _train(run: RunFolder, holder: str, log: Path, steps: int) -> None:
    claim = lease.join(run, holder)
    lwo = stores.attach()
    store = LayerStore(run, stores.model_files, keep=1000, may_write=claim.check)
    checkpoint = newest_checkpoint(run)
    if checkpoint is not None:
        restore(lwo, checkpoint, has_weights=False)
        store.remember(checkpoint, lwo)
    for _ in range(steps):
        stores.step(lwo)
        outcome = stores.save(store, lwo, attempt=claim.number)
        if not outcome.error:
            with log.open("a") as file:
                file.write(f"{outcome.step} {claim.number}\n")
