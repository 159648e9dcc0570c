"""Exact bytes: what DESIGN's formulas promise and what a rank really holds."""

from __future__ import annotations

import resource
from collections.abc import Iterable

import torch
from torch.distributed.tensor import DTensor

__all__ = [
    "full_fine_tuning_bytes",
    "local_bytes",
    "optimizer_state_bytes",
    "padded_numel",
    "park_bytes",
    "peak_bytes",
]


def padded_numel(numel: int, multiple: int) -> int:
    """`numel` rounded up to a multiple, as a buffer is that every rank gets an equal share of."""
    return -(-numel // multiple) * multiple


def optimizer_state_bytes(numel: int, world_size: int, *, master: bool = False) -> int:
    """AdamW's two fp32 moments of a layer of `numel` parameters on one of `world_size` ranks,
    padding included.

    With `master`, 4 bytes more for an fp32 copy of the weights; without, the fp32 weights are the
    shards themselves (DESIGN section 3). The step scalars of the optimizer, 4 bytes a tensor, are
    not counted.
    """
    return (12 if master else 8) * padded_numel(numel, world_size) // world_size


def park_bytes(numel: int, *, moments: bool, masters: bool) -> int:
    """Host memory that the parks of layers with `numel` elements on this rank take: 8 bytes an
    element, and 2.

    Args:
        moments: `state: keep` parks AdamW's two fp32 moments.
        masters: with 16-bit storage, `inactive_master: host` parks what the bf16 rounding lacks.
            Not counted: 8 bytes for each element that lies half-way between two bf16 numbers, one
            in 65,536.
    """
    return (8 * moments + 2 * masters) * numel


def full_fine_tuning_bytes(
    peak: float, gradient: float, state: float, active_numel: int, numel: int
) -> float:
    """What full fine-tuning of `numel` parameters with the same strategy would need at least, of a
    rank's `peak`.

    Gradients and optimizer state, here those of a layer of `active_numel` parameters, grow with the
    parameters they belong to, however a strategy lays them out. The activations, which full
    fine-tuning holds for all layers, are taken as they are.
    """
    return peak + (gradient + state) * (numel / active_numel - 1)


def local_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages behind `tensors` on this rank, each storage once; of a DTensor, its
    local shard.
    """
    sizes: dict[int, int] = {}
    for tensor in tensors:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        storage = local.detach().untyped_storage()
        if storage.data_ptr():
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def peak_bytes(device: torch.device) -> int:
    """The most memory used so far: allocated on the GPU, or resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
