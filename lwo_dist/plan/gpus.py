"""GPUs by their vendors' data sheets, and how a cluster of them is named."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lwo_dist.errors import UserError

__all__ = ["GPUS", "NETWORK", "USABLE", "UTILISATION", "GPU", "Cluster", "read_cluster"]

USABLE = 0.9
"""Share of a GPU's memory that tensors may take; CUDA, NCCL and fragmentation take the rest."""
UTILISATION = 0.4
"""Share of the data sheet's FLOP/s that a step is assumed to reach."""
NETWORK = 50e9
"""Bytes per second that a GPU sends to other machines: one 400 Gbit/s port each, assumed."""


@dataclass(frozen=True)
class GPU:
    name: str
    memory: float
    """Bytes, decimal as on the label."""
    flops: float
    """Per second in bf16 with fp32 accumulation, dense (without sparsity)."""
    link: float
    """Bytes per second that it sends to GPUs of the same machine: half of the data sheet's NVLink
    or PCIe figure, which is for both directions."""


# NVIDIA's data sheets of each card (SXM where there are several forms).
GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("B200-180GB", 180e9, 2250e12, 900e9),
        GPU("H200-141GB", 141e9, 989e12, 450e9),
        GPU("H100-80GB", 80e9, 989e12, 450e9),
        GPU("A100-80GB", 80e9, 312e12, 300e9),
        GPU("L40S-48GB", 48e9, 362e12, 32e9),
        GPU("A100-40GB", 40e9, 312e12, 300e9),
        GPU("RTX4090-24GB", 24e9, 165e12, 32e9),
        GPU("L4-24GB", 24e9, 121e12, 32e9),
    )
}


@dataclass(frozen=True)
class Cluster:
    gpu: GPU
    per_machine: int
    world_size: int

    @property
    def rate(self) -> float:
        """Bytes per second that a rank sends at most: the slowest link of a ring of all ranks."""
        if self.world_size > self.per_machine:
            return min(self.gpu.link, NETWORK)
        return self.gpu.link


def read_cluster(text: str, world_size: int | None) -> Cluster:
    """`8xH100-80GB`: a machine's GPUs; with one rank for each, or `world_size` in all.

    Raises:
        UserError: not of this form, or a GPU that is not in the table.
    """
    match = re.fullmatch(r"(?i)(?:(\d{1,3})x)?([a-z0-9]+-\d+gb)", text)
    count = int(match[1] or 1) if match else 0
    if match is None or not count:
        raise UserError(
            f"--gpus {text!r} must be GPUs of one machine, such as 8xH100-80GB; known are"
            f" {', '.join(GPUS)}"
        )
    gpu = {name.lower(): gpu for name, gpu in GPUS.items()}.get(match[2].lower())
    if gpu is None:
        raise UserError(f"--gpus {text!r}: {match[2]} is not known; give one of {', '.join(GPUS)}")
    return Cluster(gpu, count, world_size or count)
