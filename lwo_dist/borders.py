"""Hidden states kept between visits: in host memory first, then in files without a name."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .access import scratch_folder
from .units import human_bytes

__all__ = ["Border", "BorderStore", "spill_folder"]


@dataclass(frozen=True)
class Border:
    """The input of a layer, for one micro-batch of this rank."""

    index: int
    """Of the layer in the stack, from 0."""
    hidden: Tensor
    """Such as [sequences, tokens, hidden size], in the dtype it was computed in; on the host."""
    device: torch.device
    """Where it was computed."""
    on_disk: bool

    def take(self) -> Tensor:
        """A copy on its device: the stored one may be replaced at any time."""
        if self.device == self.hidden.device:
            return self.hidden.clone()
        return self.hidden.to(self.device, non_blocking=self.hidden.is_pinned())


class BorderStore:
    """At most one border for each key, within two bounds; a border that fits neither is left out.

    There is no eviction: a cycle uses its batches in the same order again and again, and whatever
    had been evicted would be the next one wanted. A file loses its name as soon as it is mapped, so
    nothing is left of it when the process ends, in whatever way.

    Args:
        host_bytes: the most that is kept in host memory.
        disk_bytes: the most that is kept in files.
        folder: where the files are made; called at the first of them.
    """

    def __init__(self, host_bytes: int, disk_bytes: int, folder: Callable[[], Path]):
        self._bounds = {False: host_bytes, True: disk_bytes}
        self._used = {False: 0, True: 0}
        self._folder = folder
        self._borders: dict[bytes, Border] = {}
        self._warned = False

    def __len__(self) -> int:
        return len(self._borders)

    @property
    def host_bytes(self) -> int:
        return self._used[False]

    @property
    def disk_bytes(self) -> int:
        return self._used[True]

    def get(self, key: bytes) -> Border | None:
        return self._borders.get(key)

    def put(self, key: bytes, index: int, hidden: Tensor) -> None:
        """Keep a copy of `hidden` in the place of what is kept for `key`, if there is room."""
        old = self._borders.get(key)
        strides = torch.empty_like(hidden, device="meta").stride()  # it may be transposed
        like = (hidden.shape, strides, hidden.dtype)
        if old and (old.hidden.shape, old.hidden.stride(), old.hidden.dtype) == like:
            slot, on_disk = old.hidden, old.on_disk
        else:
            self.drop(key)
            found = self._allocate(hidden)
            if found is None:
                self._warn(hidden)
                return
            flat, on_disk = found
            slot = flat.as_strided(hidden.shape, strides)
            self._used[on_disk] += hidden.nbytes
        slot.copy_(hidden, non_blocking=slot.is_pinned())
        self._borders[key] = Border(index, slot, hidden.device, on_disk)

    def drop(self, key: bytes) -> None:
        """Forget what is kept for `key`, if anything."""
        border = self._borders.pop(key, None)
        if border is not None:
            self._used[border.on_disk] -= border.hidden.nbytes

    def drop_above(self, index: int) -> None:
        """Forget the borders of layers above `index`: a layer below them is going to change."""
        for key in [key for key, border in self._borders.items() if border.index > index]:
            self.drop(key)

    def clear(self) -> None:
        self._borders = {}
        self._used = {False: 0, True: 0}

    def _allocate(self, hidden: Tensor) -> tuple[Tensor, bool] | None:
        """Room for `hidden`, and whether it is on disk; None if there is none."""
        if self._used[False] + hidden.nbytes <= self._bounds[False]:
            flat = torch.empty(hidden.numel(), dtype=hidden.dtype, pin_memory=hidden.is_cuda)
            return flat, False
        if self._used[True] + hidden.nbytes <= self._bounds[True]:
            mapped = _mapped_file(hidden.numel(), hidden.dtype, self._folder())
            return None if mapped is None else (mapped, True)
        return None

    def _warn(self, hidden: Tensor) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"lwo.batches: cycle: only {len(self)} micro-batches of a visit are stored, in"
                f" {human_bytes(self.host_bytes)} of host memory and {human_bytes(self.disk_bytes)}"
                f" of disk a worker; for each further one the prefix is computed. One takes"
                f" {human_bytes(hidden.nbytes)}: raise lwo.prefix_host_gb or lwo.prefix_disk_gb (on"
                " a disk that has the room), or lower lwo.steps_per_layer",
                stacklevel=2,
            )


def spill_folder() -> Path:
    """LWO_SCRATCH_DIR, or this user's private folder in the temporary folder."""
    given = os.environ.get("LWO_SCRATCH_DIR")
    if not given:
        return scratch_folder()
    folder = Path(given).expanduser().absolute()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _mapped_file(numel: int, dtype: torch.dtype, folder: Path) -> Tensor | None:
    """A tensor in a file of its own that has no name; None if the disk has no room for it."""
    descriptor, path = tempfile.mkstemp(prefix="border-", dir=folder)
    try:
        tensor = torch.from_file(path, shared=True, size=numel, dtype=dtype)
        Path(path).unlink()
        # Now, not at a write: that would kill the process.
        os.posix_fallocate(descriptor, 0, max(1, tensor.nbytes))
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return tensor
