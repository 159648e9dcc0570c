"""Counts collectives where every one of them passes: at the dispatcher, in forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["CountCollectives"]

# Operator -> what it is, and which argument is the whole tensor (the larger side of the
# collective).
KINDS = {
    "_allgather_base_": ("all_gather", 0),
    "allgather_into_tensor_coalesced_": ("all_gather", 0),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1),
    "allreduce_": ("all_reduce", 0),
    "broadcast_": ("broadcast", 0),
    "allgather_": ("all_gather", 0),
    "reduce_scatter_": ("reduce_scatter", 1),
    "reduce_": ("reduce", 0),
    "scatter_": ("scatter", 0),
    "gather_": ("gather", 0),
    "alltoall_": ("all_to_all", 0),
    "alltoall_base_": ("all_to_all", 0),
    "send": ("send", 0),
}


class CountCollectives(TorchDispatchMode):
    """`calls` lists (kind, bytes of the whole tensor) in order; an unknown collective raises."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional", "c10d_functional"):
            operator = func._schema.name.split("::")[1]
            if operator not in ("barrier", "wait_tensor", "monitored_barrier_"):
                kind, position = KINDS[operator]
                self.calls.append((kind, _bytes(args[position])))
        return func(*args, **(kwargs or {}))

    def bytes(self, *kinds: str) -> int:
        return sum(size for kind, size in self.calls if kind in kinds)

    def number(self, kind: str) -> int:
        return sum(1 for other, _ in self.calls if other == kind)


def _bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(_bytes(item) for item in value)
