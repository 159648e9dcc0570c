"""Counts the bytes of tensors while operations run: exactly, on any device, also without memory."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["LiveBytes"]


class LiveBytes(TorchDispatchMode):
    """While active: the bytes of all storages that operations have made and that still exist.

    Every operation is followed, those of backward and the buffers of collectives included. A
    kernel's own workspace is not seen. Tensors may be fake.

    Args:
        held: tensors whose storages are counted from the start.
        ignored: tensors whose storages are never counted.

    Attributes:
        now, peak: bytes; set `peak` to `now` to measure a part.
        largest: of one storage.
    """

    def __init__(self, held: Iterable[Tensor] = (), ignored: Iterable[Tensor] = ()):
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self.largest = 0
        self._sizes: dict[int, int] = {}
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        for tensor in ignored:
            self._watch(_storage(tensor), 0)
        for tensor in held:
            self.count(tensor)

    def count(self, tensor: Tensor) -> None:
        """Count the storage of `tensor`, unless it is known."""
        storage = _storage(tensor)
        self._watch(storage, storage.nbytes())
        self.peak = max(self.peak, self.now)

    def add(self, size: int) -> None:
        """Count `size` bytes that no operation makes; negative: no longer."""
        self.now += size
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.count(leaf)
        return result

    def __enter__(self) -> Self:
        # FSDP2 frees and allocates the storages of gathered weights in place.
        self._resize = resize = torch.UntypedStorage.resize_
        live = self

        def counted(storage: Any, size: int) -> Any:
            result = resize(storage, size)
            known = live._sizes.get(storage._cdata)
            if known is not None:
                live._sizes[storage._cdata] = size
                live.add(size - known)
            return result

        torch.UntypedStorage.resize_ = counted  # type: ignore[method-assign,assignment]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def _watch(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = size
        self.now += size
        self.largest = max(self.largest, size)
        self._alive[key] = weakref.ref(storage, lambda _: self._forget(key))

    def _forget(self, key: int) -> None:
        del self._alive[key]
        self.now -= self._sizes.pop(key)


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    local = getattr(tensor, "_local_tensor", tensor)  # of a DTensor
    return local.untyped_storage()
