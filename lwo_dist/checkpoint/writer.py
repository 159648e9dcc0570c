"""The thread of rank 0 that puts host copies on the disk, or into an object store, while the loop
goes on.

Nothing is lost by a save that fails (a full disk): its layers stay on the host and are written with
the next one.
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

from lwo_dist.storage import RunFolder, write_whole

from .format import (
    FORMAT,
    INDEX,
    LAYERS,
    MOMENTS,
    STATE,
    committed_steps,
    flat_moments,
    prune,
    seal,
    sha256_of,
    step_folder,
)

__all__ = ["CheckpointWriter", "Outcome", "Piece", "Save"]

# Host copies that wait for the disk at once; a whole first save of a large model must not fill the
# host.
_MAX_WAITING_BYTES = 2 * 2**30


@dataclass(frozen=True)
class Outcome:
    """What became of a save."""

    step: int
    folder: Path
    error: str = ""
    """Empty: committed."""
    bytes_written: int = 0
    seconds: float = 0.0
    """From the call of `save` to the commit."""


@dataclass
class Piece:
    """A layer's weights, or the moments of one that waits: a file that never changes once it is
    there.
    """

    stem: str
    """<layer>.<step last trained>"""
    suffix: str
    tensors: dict[str, Tensor]

    def __post_init__(self) -> None:
        self.nbytes = sum(t.numel() * t.element_size() for t in self.tensors.values())


@dataclass
class Save:
    """One checkpoint on its way to the disk."""

    step: int
    position: Mapping[str, Any]
    extra: Mapping[str, Any]
    moments: dict[str, dict[str, Tensor]]
    """Of the active layer."""
    weights: dict[str, tuple[str, ...]]
    """Key of a piece -> the parameters in it."""
    parked: dict[str, str]
    """Layer whose moments wait -> key of their piece."""
    best_step: int
    started: float = field(default_factory=time.perf_counter)


class CheckpointWriter:
    """Pieces first, then the checkpoint that names them; one at a time, in the order of the calls.

    Args:
        model_files: fills a folder with config and tokenizer; called once.
        keep: how many of the newest checkpoints stay, the best one besides.
    """

    def __init__(self, run: RunFolder, model_files: Callable[[Path], None], *, keep: int):
        self._run, self._model_files, self._keep = run, model_files, keep
        self._thread = ThreadPoolExecutor(1, "lwo-checkpoint-writer")
        self._queue: list[Future[Any]] = []
        # In the thread's hands while anything is queued.
        self._unwritten: dict[str, Piece] = {}
        self._written: dict[str, tuple[str, str]] = {}  # key -> name in the run's folder, sha256
        self._committed: list[int] = []
        self._model: dict[
            str, tuple[str, str]
        ] = {}  # config and tokenizer: name -> name of a copy, sha256
        self._bytes = 0

    def remember(self, written: Mapping[str, tuple[str, str]], step: int) -> None:
        """Files that are there already, and the checkpoint that training goes on from."""
        self._written |= written
        self._committed = [known for known in committed_steps(self._run) if known <= step]

    def put(self, key: str, piece: Piece) -> None:
        """Queue a piece; waits while too much of what is queued is still in memory."""
        self._unwritten[key] = piece
        self._queue.append(self._thread.submit(self._write, key, piece))
        while sum(p.nbytes for p in list(self._unwritten.values())) > _MAX_WAITING_BYTES:
            busy = next((future for future in self._queue if not future.done()), None)
            if busy is None:  # what is left could not be written
                return
            busy.exception()

    def commit(self, job: Save) -> None:
        """Queue the checkpoint whose pieces were put before."""
        self._queue.append(self._thread.submit(self._commit, job))

    @property
    def is_done(self) -> bool:
        return all(future.done() for future in self._queue)

    def outcome(self) -> Outcome:
        """Wait for the checkpoint that was queued last."""
        queue, self._queue = self._queue, []
        return [future.result() for future in queue][-1]

    def _write(self, key: str, piece: Piece) -> str:
        """Returns why it could not be written; the piece then waits for the next save."""
        if self._unwritten.get(key) is not piece:
            return ""
        try:
            data = save(
                {name: t.contiguous() for name, t in piece.tensors.items()}, {"format": "pt"}
            )
            digest = hashlib.sha256(data).hexdigest()
            name = f"{LAYERS}/{piece.stem}.{digest[:8]}{piece.suffix}"
            path = self._run.local / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if not (path.exists() and sha256_of(path) == digest):  # a damaged one is written anew
                write_whole(path, data)
                self._bytes += len(data)
            self._run.push([name])
        except OSError as error:
            return f"{piece.stem}{piece.suffix}: {error.strerror or error}"
        self._written[key] = name, digest
        del self._unwritten[key]
        return ""

    def _commit(self, job: Save) -> Outcome:
        folder = self._run.local / step_folder(job.step)
        for key, piece in list(
            self._unwritten.items()
        ):  # of a save that failed before, or has just failed
            if error := self._write(key, piece):
                return Outcome(job.step, folder, error)
        try:
            self._write_checkpoint(job, folder)
        except OSError as error:
            return Outcome(job.step, folder, error.strerror or str(error))
        self._committed.append(job.step)
        kept = {*self._committed[-self._keep :], *({job.best_step} & {*self._committed})}
        try:
            prune(self._run, kept)
            self._committed = [step for step in self._committed if step in kept]
        except (OSError, ValueError) as error:
            print(
                f"warning: old checkpoints in {self._run} could not be removed: {error}", flush=True
            )
        written, self._bytes = self._bytes, 0
        return Outcome(job.step, folder, "", written, time.perf_counter() - job.started)

    def _write_checkpoint(self, job: Save, folder: Path) -> None:
        here = step_folder(job.step)
        self._run.remove_folder(
            here, first=STATE
        )  # of a save that was cut short, or one that is damaged
        folder.mkdir(parents=True)
        digests = self._place_model_files(folder)

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
            (INDEX, json.dumps(index, indent=1).encode()),
        ):
            write_whole(folder / name, data)
            digests[name] = hashlib.sha256(data).hexdigest()
            self._bytes += len(data)
        self._run.push(f"{here}/{path.name}" for path in sorted(folder.iterdir()))
        self._run.push_small()
        # Last, because it is what makes the folder a checkpoint.
        state = seal(
            {"format": FORMAT, **job.position, **job.extra, "moments": parked, "sha256": digests}
        )
        write_whole(folder / STATE, state)
        self._run.push([f"{here}/{STATE}"])
        self._bytes += len(state)

    def _place_model_files(self, folder: Path) -> dict[str, str]:
        """Config and tokenizer: written once, and linked into every later checkpoint; returns their
        sha256.
        """
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
            self._bytes += sum((folder / name).stat().st_size for name in found)
        here = folder.relative_to(self._run.local).as_posix()
        self._model = {name: (f"{here}/{name}", digest) for name, digest in found.items()}
        return found


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)
