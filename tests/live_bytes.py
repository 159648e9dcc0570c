"""Counts the bytes of all tensors that are alive at once, exactly, as torch makes and frees them.

On the meta device tensors have sizes and no memory, so that steps of any size can be counted.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["LiveBytes"]


class LiveBytes(TorchDispatchMode):
    """`peak`: the most bytes alive at once among tensors made inside; `largest`: of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.largest = 0
        self._storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves(args) if _is_tensor(leaf)}
        for leaf in tree_leaves(result):
            if _is_tensor(leaf):
                self._see(leaf.untyped_storage(), given)
        return result

    def _see(self, storage: Any, given: set[int]) -> None:
        key = storage._cdata
        if key in given or key in self._storages:
            return
        size = storage.nbytes()
        self._storages.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        self.largest = max(self.largest, size)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._storages.discard(key)
        self.live -= size


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, Tensor)
