"""The thread of rank 0 that writes host copies to disk or an object store during training.

All files and folders of a checkpoint are on disk before its state.json is written, and state.json
before an older checkpoint is removed: after a power loss, at least one checkpoint is intact.

A failed save (a full disk) loses nothing: its layers stay in host memory and are written with the
next one.
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from lwo_dist.errors import DamagedError, first_line
from lwo_dist.files import make_folder, sync, write_new, write_whole
from lwo_dist.storage import RunFolder

from .format import (
    FORMAT,
    committed_steps,
    flat_moments,
    prune,
    seal,
    sha256_of,
    step_folder,
)
from .schema import INDEX, LAYERS, MOMENTS, STATE

__all__ = ["CheckpointWriter", "Outcome", "Piece", "Save"]

# Limit of host copies waiting to be written: the first save of a large model, which contains all
# layers, must not fill the host's memory.
_MAX_WAITING_BYTES = 2 * 2**30


@dataclass(frozen=True)
class Outcome:
    """The result of a save."""

    step: int
    folder: Path
    error: str = ""
    """Empty if committed."""
    bytes_written: int = 0
    seconds: float = 0.0
    """From the call of `save` to the commit."""


@dataclass
class Piece:
    """A layer's weights, or the moments of an inactive layer: an immutable file once written."""

    stem: str
    """<layer>.<step last trained>"""
    suffix: str
    tensors: dict[str, Tensor]

    def __post_init__(self) -> None:
        self.nbytes = sum(t.numel() * t.element_size() for t in self.tensors.values())


@dataclass
class Save:
    """A checkpoint to be written."""

    step: int
    position: Mapping[str, Any]
    extra: Mapping[str, Any]
    moments: dict[str, dict[str, Tensor]]
    """Of the active layer."""
    weights: dict[str, tuple[str, ...]]
    """Key of a piece -> the parameters in it."""
    parked: dict[str, str]
    """Inactive layer whose moments are kept -> key of their piece."""
    best_step: int
    started: float = field(default_factory=time.perf_counter)


class CheckpointWriter:
    """Writes pieces, then the checkpoint that refers to them, in the order of the calls.

    Args:
        model_files: writes config and tokenizer to a folder; called once.
        keep: how many of the newest checkpoints to keep, in addition to the best one.
        index: name of the file that maps parameters to files.
        may_write: called before every change to a checkpoint; raises LostRunError if another
            process has taken over the run.
    """

    def __init__(
        self,
        run: RunFolder,
        model_files: Callable[[Path], None],
        *,
        keep: int,
        index: str = INDEX,
        may_write: Callable[[], None] = lambda: None,
    ):
        self._run = run
        self._may_write = may_write
        self._model_files = model_files
        self._keep = keep
        self._index = index
        self._thread = ThreadPoolExecutor(1, "lwo-checkpoint-writer")
        self._queue: list[Future[Any]] = []
        # Only the writer thread changes these while anything is queued.
        self._unwritten: dict[str, Piece] = {}
        self._written: dict[str, tuple[str, str]] = {}  # key -> name in the run's folder, sha256
        self._committed: list[int] = []
        # Config and tokenizer: name -> name of a copy in the run's folder, sha256.
        self._model: dict[str, tuple[str, str]] = {}
        self._bytes = 0

    def remember(self, written: Mapping[str, tuple[str, str]], step: int) -> None:
        """Mark files of the checkpoint that training resumes from as already written.

        Args:
            written: key of a piece -> (name in the run's folder, sha256).
            step: the step of that checkpoint; later ones are forgotten.
        """
        self._written |= written
        self._committed = [known for known in committed_steps(self._run) if known <= step]

    def put(self, key: str, piece: Piece) -> None:
        """Queue a piece. Waits while the queued pieces take too much memory."""
        self._unwritten[key] = piece
        self._queue.append(self._thread.submit(self._write, key, piece))
        while sum(p.nbytes for p in list(self._unwritten.values())) > _MAX_WAITING_BYTES:
            busy = next((future for future in self._queue if not future.done()), None)
            if busy is None:  # the pieces in memory could not be written
                return
            busy.exception()

    def commit(self, job: Save) -> None:
        """Queue the checkpoint that refers to the pieces queued before it."""
        self._queue.append(self._thread.submit(self._commit, job))

    @property
    def is_done(self) -> bool:
        return all(future.done() for future in self._queue)

    def outcome(self) -> Outcome:
        """Wait until the last queued checkpoint is written or has failed.

        Raises:
            LostRunError: another process has taken over the run; the save does not count.
        """
        queue = self._queue
        self._queue = []
        outcome: Outcome = [future.result() for future in queue][-1]
        return outcome

    def _write(self, key: str, piece: Piece) -> str:
        """Write a piece; return the error or "". After an error, keep it for the next save."""
        if self._unwritten.get(key) is not piece:
            return ""
        try:
            data = save(
                {name: t.contiguous() for name, t in piece.tensors.items()}, {"format": "pt"}
            )
            digest = hashlib.sha256(data).hexdigest()
            name = f"{LAYERS}/{piece.stem}.{digest[:8]}{piece.suffix}"
            path = self._run.path(name)
            make_folder(path.parent)
            self._may_write()
            if not (path.exists() and sha256_of(path) == digest):  # overwrite a damaged file
                write_whole(path, data)
                self._bytes += len(data)
            self._run.push([name])
        except (OSError, DamagedError) as error:
            return f"{piece.stem}{piece.suffix}: {_reason(error)}"
        self._written[key] = name, digest
        del self._unwritten[key]
        return ""

    def _commit(self, job: Save) -> Outcome:
        folder = self._run.local / step_folder(job.step)
        # Pieces of this save, or of an earlier one that failed.
        for key, piece in list(self._unwritten.items()):
            if error := self._write(key, piece):
                return Outcome(job.step, folder, error)
        try:
            self._write_checkpoint(job, folder)
        except (OSError, DamagedError) as error:
            return Outcome(job.step, folder, _reason(error))
        self._committed.append(job.step)
        kept = {*self._committed[-self._keep :], *({job.best_step} & {*self._committed})}
        try:
            prune(self._run, kept, may_remove=self._may_write)
            self._committed = [step for step in self._committed if step in kept]
        except (OSError, DamagedError) as error:
            print(
                f"warning: old checkpoints in {self._run} could not be removed:"
                f" {first_line(error)}",
                flush=True,
            )
        written = self._bytes
        self._bytes = 0
        return Outcome(job.step, folder, "", written, time.perf_counter() - job.started)

    def _write_checkpoint(self, job: Save, folder: Path) -> None:
        here = step_folder(job.step)
        if folder.exists() or self._run.files(here):
            # It is damaged, left over from an interrupted save, or another process's: then there
            # is a later claim by now.
            self._may_write()
            self._run.remove_folder(here, first=STATE)
        self._may_write()
        make_folder(self._run.path(here).parent)
        folder.mkdir()
        sync(folder.parent)
        digests = self._add_model_files(folder)

        def reference(key: str) -> str:
            name, digest = self._written[key]
            relative = posixpath.relpath(name, here)
            digests[relative] = digest
            return relative

        weight_map = {name: reference(key) for key, names in job.weights.items() for name in names}
        total = sum((folder / name).stat().st_size for name in set(weight_map.values()))
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        parked = {layer: reference(key) for layer, key in job.parked.items()}
        for name, data in (
            (MOMENTS, save(flat_moments(job.moments))),
            (self._index, json.dumps(index, indent=1).encode()),
        ):
            self._may_write()
            write_new(folder / name, data)
            digests[name] = hashlib.sha256(data).hexdigest()
            self._bytes += len(data)
        sync(folder)
        self._run.push(f"{here}/{path.name}" for path in sorted(folder.iterdir()))
        self._run.push_small()
        # Written last, because it commits the checkpoint. Created, never overwritten: a process
        # that has lost the run may be at the same point.
        state = seal(
            {"format": FORMAT, **job.position, **job.extra, "moments": parked, "sha256": digests}
        )
        self._may_write()
        if not self._run.create(f"{here}/{STATE}", state):
            raise OSError(f"another process has committed {here}")
        # A process that took over during this write may not have seen the commit.
        self._may_write()
        self._bytes += len(state)

    def _add_model_files(self, folder: Path) -> dict[str, str]:
        """Add config and tokenizer, written once and then linked. Returns name -> sha256."""
        copies = {
            name: (self._run.local / copy, digest) for name, (copy, digest) in self._model.items()
        }
        if copies and all(copy.is_file() for copy, _ in copies.values()):
            for name, (copy, _) in copies.items():
                _link(copy, folder / name)
            found = {name: digest for name, (_, digest) in copies.items()}
        else:
            self._model_files(folder)
            found = {path.name: sha256_of(path) for path in folder.iterdir() if path.is_file()}
            for name in found:
                sync(folder / name)
            self._bytes += sum((folder / name).stat().st_size for name in found)
        here = folder.relative_to(self._run.local).as_posix()
        self._model = {name: (f"{here}/{name}", digest) for name, digest in found.items()}
        return found


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # the file system does not support links
        shutil.copyfile(source, target)
        sync(target)


def _reason(error: OSError | DamagedError) -> str:
    return (isinstance(error, OSError) and error.strerror) or first_line(error)
