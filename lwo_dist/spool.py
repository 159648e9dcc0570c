"""The metric points of a run as JSON lines, one file per run folder; MLflow holds a copy of it.

    metrics.jsonl        {"kind": "run" | "metrics" | "switch" | "artifact" | "model" | "end",
                          "time_ms": ..., ...}
    metrics.sent.json    how much has been sent, and to which MLflow run

Everything sent to MLflow goes through these lines, including the run's start and end. The same code
therefore sends during the run and replays later, and a server outage loses nothing.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

__all__ = [
    "SPOOL_NAME",
    "Point",
    "Record",
    "Sent",
    "Spool",
    "count_points",
    "is_being_written",
    "points_of",
    "read_spool",
]

SPOOL_NAME = "metrics.jsonl"

_MAX_LINE_BYTES = 16 * 2**20

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """One line of a spool."""

    kind: str
    """run, metrics, switch, artifact, model or end; damaged for a line that cannot be read."""
    time_ms: int
    """When it was written, in milliseconds since 1970."""
    fields: Mapping[str, Any]
    end: int
    """The byte offset after the line."""


class Point(NamedTuple):
    name: str
    value: float
    step: int
    time_ms: int


def read_spool(path: Path, offset: int = 0) -> Iterator[Record]:
    """Yield the records from byte `offset`, except an incomplete last line left by a kill.

    A malformed line becomes a record of the kind "damaged".
    """
    with path.open("rb") as file:
        file.seek(offset)
        while line := file.readline(_MAX_LINE_BYTES):
            offset += len(line)
            is_long = not line.endswith(b"\n")
            while is_long and (rest := file.readline(_MAX_LINE_BYTES)):
                line = b""
                offset += len(rest)
                is_long = not rest.endswith(b"\n")
            if is_long:
                return
            yield _record(line, offset)


def _record(line: bytes, end: int) -> Record:
    try:
        fields = json.loads(line)
        record = Record(fields.pop("kind"), fields.pop("time_ms"), fields, end)
        return record if _is_sound(record) else Record("damaged", 0, {}, end)
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
        return Record("damaged", 0, {}, end)


def _is_sound(record: Record) -> bool:
    """Whether the fields that this module and the senders use have the right types."""
    fields = record.fields
    if not isinstance(record.kind, str) or not isinstance(record.time_ms, int):
        return False
    if record.kind == "metrics":
        for value in fields["values"].values():
            float(value)
        return isinstance(fields["step"], int)
    if record.kind == "switch":
        return isinstance(fields["step"], int) and isinstance(fields["layer"], str)
    if record.kind in ("artifact", "model"):
        return isinstance(fields["path"], str)
    return True


def points_of(record: Record) -> list[Point]:
    """The metric points of a record; empty unless its kind is metrics."""
    if record.kind != "metrics":
        return []
    step = record.fields["step"]
    return [
        Point(name, float(value), step, record.time_ms)
        for name, value in record.fields["values"].items()
    ]


def count_points(path: Path, offset: int = 0) -> int:
    """How many metric points the spool holds from byte `offset`."""
    return sum(
        len(record.fields["values"])
        for record in read_spool(path, offset)
        if record.kind == "metrics"
    )


def is_being_written(path: Path) -> bool:
    """Whether a live process has the file open as a `Spool`; False on file systems without locks.

    Raises:
        OSError: the file cannot be opened.
    """
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
    return False


class Spool:
    """Appends to a run's spool. One writer at a time; each attempt of the run opens it again.

    Each step counts once: a resumed run that repeats steps does not write their points again, so
    charts never go backwards.
    """

    def __init__(self, path: Path) -> None:
        """Raises: OSError if the folder cannot be written."""
        self.path = path
        self.attempts = 0
        """How many times the run has been started, including earlier attempts."""
        self.ended = False
        """Whether the latest attempt has written its end."""
        self.last_time_ms: int | None = None
        """When the last line was written."""
        self.furthest: tuple[int, int] | None = None
        """The furthest step with training metrics, and the time in milliseconds of that line."""
        self.last_value: dict[str, float] = {}
        """Metric -> its latest value."""
        self._last_step: dict[str, int] = {}
        self._stump_end = b""
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink():
            raise OSError(f"{path} is a symlink; symlinks are not followed")
        # Unbuffered: one write call per line, passed to the kernel at once, so a SIGKILL loses at
        # most that line.
        self._file = path.open("ab", buffering=0)
        # The lock may be held by a dying attempt, or unsupported: appending whole lines is safe
        # either way.
        with suppress(OSError):
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        end = 0
        for record in read_spool(path):
            self._note(record)
            end = record.end
        torn = path.stat().st_size - end
        if torn:
            os.truncate(path, end)
            logger.warning(
                "%s ended in a torn line (%d bytes, left by a kill during a write); dropped it",
                path,
                torn,
            )

    def append(self, kind: str, **fields: Any) -> None:
        """Write one record. Raises: OSError, e.g. on a full disk."""
        record = {"kind": kind, "time_ms": int(time.time() * 1000), **fields}
        line = self._stump_end + json.dumps(record, allow_nan=False).encode() + b"\n"
        written = self._file.write(line)
        if written != len(line):
            # The disk filled up within the line: the remainder must not spoil the next line once
            # there is space again.
            self._stump_end = b"\n"
            raise OSError(f"{self.path}: only {written} of {len(line)} bytes written")
        self._stump_end = b""
        self._note(Record(kind, record["time_ms"], fields, 0))

    def append_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Write the points of one step, unless an earlier attempt has written them."""
        fresh = {
            name: float(value)
            for name, value in values.items()
            if step > self._last_step.get(name, -1)
        }
        if fresh:
            # JSON has no NaN; float() converts "nan" and "inf" back.
            self.append(
                "metrics",
                step=step,
                values={n: v if math.isfinite(v) else str(v) for n, v in fresh.items()},
            )

    def append_switch(self, step: int, layer: str) -> None:
        """Record that `layer` became active after `step` steps, unless an earlier attempt has."""
        if step > self._last_step.get("switch", -1):
            self.append("switch", step=step, layer=layer)

    def sync(self) -> None:
        """Flush to disk, so that the records survive a crash of the machine."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def _note(self, record: Record) -> None:
        self.last_time_ms = record.time_ms or self.last_time_ms
        if record.kind == "metrics":
            step = record.fields["step"]
            values = record.fields["values"]
            self._last_step.update(dict.fromkeys(values, step))
            self.last_value |= {name: float(value) for name, value in values.items()}
            if "train/loss" in values:
                self.furthest = (step, record.time_ms)
        elif record.kind == "switch":
            self._last_step["switch"] = record.fields["step"]
        elif record.kind == "run":
            self.attempts += 1
            self.ended = False
        elif record.kind == "end":
            self.ended = True


@dataclass
class Sent:
    """How much of a spool has been sent. Saved beside it, only after a success."""

    path: Path
    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    """A tag of the MLflow run, to find it again if the response to its creation was lost."""
    uri: str | None = None
    """The store that the other fields refer to, without credentials."""
    run_id: str | None = None
    offset: int = 0
    waiting: list[str] = field(default_factory=list)
    """Files still to upload, relative to the run's folder."""
    points: int = 0
    """Sent by this process; not saved."""

    @classmethod
    def load(cls, spool: Path) -> Sent:
        """Read the file beside the spool; start from zero if there is none or it is damaged."""
        sent = cls(spool.with_suffix(".sent.json"))
        try:
            values = json.loads(sent.path.read_text())
            key, offset = str(values["key"]), max(0, int(values["offset"]))
            uri, run_id = (_text_or_none(values[name]) for name in ("uri", "run_id"))
            sent.waiting = [str(name) for name in values["waiting"]]
            sent.key, sent.uri, sent.run_id, sent.offset = key, uri, run_id, offset
        except FileNotFoundError:
            pass
        except (OSError, ArithmeticError, LookupError, RecursionError, TypeError, ValueError):
            logger.warning(
                "%s cannot be read; sending %s from its start (MLflow drops what it has)",
                sent.path,
                spool,
            )
        if spool.exists() and sent.offset > spool.stat().st_size:
            sent.offset = 0
        return sent

    def address(self, uri: str, run_id: str | None) -> None:
        """Set the store and, unless None, the run. If either changes, everything is sent again."""
        if uri != self.uri or (run_id is not None and run_id != self.run_id):
            self.uri = uri
            self.run_id = run_id
            self.offset = 0
            self.waiting = []

    def save(self) -> None:
        keep = {name: getattr(self, name) for name in ("key", "uri", "run_id", "offset", "waiting")}
        draft = self.path.with_suffix(f".{os.getpid()}.tmp")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(keep, indent=1))
        draft.replace(self.path)


def _text_or_none(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    raise TypeError("neither a string nor null")
