"""Sends a spool to a store: `send_spool` once, `Sender` in a thread beside the training.

The loop of `Sender`:
    wait for news, then gather for a few seconds
    for each batch behind the offset: one call of the store; after success, move the offset
    on an error: one warning, then retries after 1, 2, 4, ... 60 s until the store is back
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from lwo_dist.errors import DamagedError, printable
from lwo_dist.files import contained
from lwo_dist.redaction import redact
from lwo_dist.spool import Point, Record, Sent, points_of, read_spool

__all__ = ["Sender", "Store", "reason", "send_spool", "unsent"]

MAX_POINTS = 1000  # MLflow's limit for one log_batch

logger = logging.getLogger(__name__)


class Store(Protocol):
    """Where points go. Every method may raise anything; a repeated call must do no harm."""

    uri: str
    """For people: without credentials."""

    def open_run(self, fields: Mapping[str, Any], time_ms: int, run_id: str | None) -> str:
        """Continue run `run_id`, or find or create one; log its parameters and tags. Returns its
        id.
        """

    def log_points(self, run_id: str, points: list[Point]) -> None: ...

    def upload(self, run_id: str, file: Path, folder: str | None) -> None: ...

    def log_model(self, run_id: str, folder: Path, fields: Mapping[str, Any]) -> None: ...

    def end_run(self, run_id: str, fields: Mapping[str, Any], time_ms: int) -> None: ...


def send_spool(
    spool: Path, store: Store, sent: Sent, stop: Callable[[], bool] = lambda: False
) -> None:
    """Send what lies behind `sent.offset`, then the waiting files. Raises what the store raises."""
    for batch in _batches(read_spool(spool, sent.offset)):
        if stop():
            return
        first = batch[0]
        if first.kind == "run":
            sent.run_id = store.open_run(first.fields, first.time_ms, sent.run_id)
        elif first.kind in ("artifact", "model"):
            # Files go last: an artifact store that is down or misconfigured must not hold up the
            # points.
            sent.waiting = [
                *(name for name in sent.waiting if name != first.fields["path"]),
                first.fields["path"],
            ]
        elif first.kind == "damaged":
            logger.warning("%s: skipped a damaged line before byte %d", spool, first.end)
        elif first.kind == "end":
            if sent.run_id is not None:  # None: the start failed before the run had a record
                store.end_run(sent.run_id, first.fields, first.time_ms)
        elif sent.run_id is None:
            raise RuntimeError(
                f"{spool} has points before the record of its run; its first line is lost"
            )
        else:
            points = [point for record in batch for point in points_of(record)]
            for start in range(0, len(points), MAX_POINTS):
                store.log_points(sent.run_id, points[start : start + MAX_POINTS])
            sent.points += len(points)
        sent.offset = batch[-1].end
        sent.save()
    for name in tuple(sent.waiting):
        if stop() or sent.run_id is None:
            return
        try:
            _upload(spool, store, sent.run_id, name)
        except Exception as error:
            raise RuntimeError(f"{name} could not be uploaded: {reason(error)}") from None
        sent.waiting.remove(name)
        sent.save()


def _upload(spool: Path, store: Store, run_id: str, name: str) -> None:
    try:
        file = contained(spool.parent, name)
        # A run may come from anybody, and must not upload other files of this machine.
        for part in file.rglob("*"):
            contained(file, part.relative_to(file).as_posix())
    except DamagedError as error:
        logger.warning("%s; not uploaded to MLflow", printable(str(error)))
        return
    if not file.exists():
        logger.warning("%s is gone; not uploaded to MLflow", file)
    elif file.is_dir():
        fields = [
            r.fields for r in read_spool(spool) if r.kind == "model" and r.fields["path"] == name
        ]
        store.log_model(run_id, file, fields[-1])
    else:
        store.upload(run_id, file, str(Path(name).parent) if "/" in name else None)


def unsent(spool: Path, sent: Sent) -> str:
    """What the store lacks, in words, such as `410 metric points, 3 files, the state of the run`.

    Empty if it lacks nothing.
    """
    points = 0
    files = set(sent.waiting)
    state = False
    for record in read_spool(spool, sent.offset):
        points += len(points_of(record))
        state |= record.kind in ("run", "end")
        if record.kind in ("artifact", "model"):
            files.add(record.fields["path"])
    lacks = [f"{points} metric points"] * bool(points) + [f"{len(files)} files"] * bool(files)
    return ", ".join(lacks + ["the state of the run"] * state)


def reason(error: BaseException) -> str:
    """The root of a chain of exceptions in one printable line of at most 300 characters, without
    secrets.

    For example `Connection refused` instead of urllib3's page.
    """
    while cause := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        error = cause
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return printable(redact(" ".join(text.split()))[:300])[:300] or type(error).__name__


class Sender(threading.Thread):
    """The only thread that talks to the store. A daemon: it never keeps a finished run alive."""

    def __init__(
        self,
        spool: Path,
        store: Store,
        sent: Sent,
        *,
        interval_s: float = 5.0,
        max_pause_s: float = 60.0,
    ) -> None:
        super().__init__(name="lwo-mlflow-sender", daemon=True)
        self.problem: str | None = None
        """Why the last try failed; None while all is well."""
        self.sent = sent
        self._spool = spool
        self._store = store
        self._interval_s = interval_s
        self._max_pause_s = max_pause_s
        self._news = threading.Event()
        self._closing = threading.Event()
        self._abandoned = threading.Event()
        # Not the global generator: training's own draws must not depend on how often a server
        # failed.
        self._random = random.Random()

    def wake(self) -> None:
        """Say that the spool has grown. Returns at once."""
        self._news.set()

    def close(self, timeout_s: float, upload_timeout_s: float = 0.0) -> bool:
        """Send the rest and end the thread. Returns whether all was sent.

        Args:
            timeout_s: how long to wait, in seconds.
            upload_timeout_s: how much longer to wait if only files are left and their upload has
                not failed.
        """
        self._closing.set()
        self._news.set()
        self.join(timeout_s)
        deadline = time.monotonic() + upload_timeout_s
        while self.is_alive() and self._only_files_left() and time.monotonic() < deadline:
            self.join(0.1)
        all_sent = not self.is_alive()
        self._abandoned.set()
        return all_sent

    def run(self) -> None:
        failures = 0
        while not self._abandoned.is_set():
            self._news.wait()
            self._news.clear()
            last = self._closing.is_set()
            before = self.sent.points
            try:
                send_spool(self._spool, self._store, self.sent, self._abandoned.is_set)
            except Exception as error:
                failures += 1
                self.problem = reason(error)
                if failures == 1:
                    logger.warning(
                        "MLflow at %s: %s; points are kept in %s and sent once it is back",
                        self._store.uri,
                        self.problem,
                        self._spool,
                    )
                self._news.set()
                self._pause(failures)
                continue
            if self._abandoned.is_set():
                return  # interrupted, so this says nothing about the server
            if failures:
                count = self.sent.points - before
                logger.warning(
                    "MLflow at %s is back; sent %d waiting points", self._store.uri, count
                )
            failures = 0
            self.problem = None
            if last:
                return
            # Gather: a call costs tens of milliseconds of Python, which training in this process
            # has to wait for.
            self._closing.wait(self._interval_s)

    def _only_files_left(self) -> bool:
        return self.problem is None and self.sent.offset == self._spool.stat().st_size

    def _pause(self, failures: int) -> None:
        seconds = min(2.0 ** (failures - 1), self._max_pause_s) * self._random.uniform(0.75, 1.0)
        if not self._closing.wait(seconds):
            return
        self._abandoned.wait(min(seconds, 1.0))


def _batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Neighbouring points together, up to the limit of one call; every other record alone."""
    batch: list[Record] = []
    count = 0
    for record in records:
        plain = record.kind in ("metrics", "switch")
        size = len(points_of(record))
        if batch and (not plain or count + size > MAX_POINTS):
            yield batch
            batch = []
            count = 0
        if plain:
            batch.append(record)
            count += size
        else:
            yield [record]
    if batch:
        yield batch
