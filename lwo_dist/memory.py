"""Memory in bytes: some formulas, and what a rank actually holds. What a run needs: `plan/`."""

from __future__ import annotations

import resource
from collections.abc import Iterable, Sequence

import torch
from torch.distributed.tensor import DTensor

__all__ = [
    "full_fine_tuning_bytes",
    "local_bytes",
    "lora_bytes",
    "lora_numel",
    "optimizer_state_bytes",
    "padded_numel",
    "park_bytes",
    "peak_bytes",
]


def padded_numel(numel: int, multiple: int) -> int:
    """`numel` rounded up to a multiple, for a buffer that is split evenly across ranks."""
    return -(-numel // multiple) * multiple


def optimizer_state_bytes(numel: int, world_size: int, *, master: bool = False) -> int:
    """AdamW's two fp32 moments of a layer of `numel` parameters on one of `world_size` ranks.

    Includes padding. With `master`, adds 4 bytes per element for an fp32 copy of the weights;
    without it, the fp32 weights are the shards themselves. The optimizer's step scalars, 4 bytes
    per tensor, are not counted.
    """
    return (12 if master else 8) * padded_numel(numel, world_size) // world_size


def park_bytes(numel: int, *, moments: bool, masters: bool) -> int:
    """Host memory of the parks of layers with `numel` elements on this rank, in bytes.

    Args:
        moments: with `state: keep`, AdamW's two fp32 moments: 8 bytes per element.
        masters: with 16-bit storage and `inactive_master: host`, the bits lost in rounding to bf16:
            2 bytes per element. Not counted: 8 bytes for each element halfway between two bf16
            numbers, about one in 65,536.
    """
    return (8 * moments + 2 * masters) * numel


def lora_bytes(numel: int, adapter_numel: int, world_size: int) -> dict[str, int]:
    """LoRA, the usual way: the base frozen in bf16 and sharded, fp32 adapters with AdamW."""
    return {
        "parameter_bytes": (2 * numel + 4 * adapter_numel) // world_size,
        "gradient_bytes": 4 * adapter_numel // world_size,
        "optimizer_state_bytes": optimizer_state_bytes(adapter_numel, world_size),
    }


# ---- what full fine-tuning would need, and what is measured


def full_fine_tuning_bytes(
    peak: float, gradient: float, state: float, active_numel: int, numel: int
) -> float:
    """Lower bound for full fine-tuning of `numel` parameters, derived from a rank's `peak`.

    Gradients and optimizer state, measured for the active layer of `active_numel` parameters, scale
    with the number of parameters under any strategy. Activations, which full fine-tuning keeps for
    all layers, are counted as measured.
    """
    return peak + (gradient + state) * (numel / active_numel - 1)


def lora_numel(shapes: Iterable[Sequence[int]], rank: int) -> int:
    """Parameters of LoRA adapters of `rank` (Hu et al., 2022) on every matrix of these shapes."""
    return sum(rank * sum(shape) for shape in shapes if len(shape) == 2)


def local_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages behind `tensors` on this rank, each once; for a DTensor, its local
    shard.
    """
    sizes: dict[int, int] = {}
    for tensor in tensors:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        storage = local.detach().untyped_storage()
        if storage.data_ptr():
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def peak_bytes(device: torch.device) -> int:
    """Peak memory so far: allocated on the GPU, or resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
