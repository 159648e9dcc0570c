"""How a global batch is divided among workers and micro-batches."""

from __future__ import annotations

import math

from lwo_dist.errors import UserError

from .run import Config

__all__ = ["check_world_sizes", "micro_batch_size"]


def micro_batch_size(global_batch_size: int, world_size: int, accumulation: int) -> int:
    """Sequences of one rank in one micro-batch.

    Raises:
        UserError: the global batch cannot be divided evenly.
    """
    parts = world_size * accumulation
    if global_batch_size % parts:
        raise UserError(
            f"train.global_batch_size = {global_batch_size} must be divisible by {parts} ="
            f" {world_size} workers x {accumulation} lwo.gradient_accumulation_steps; for example"
            f" {-(-global_batch_size // parts) * parts}"
        )
    return global_batch_size // parts


def check_world_sizes(config: Config) -> None:
    """Refuse a global batch that cannot be divided evenly at every number of workers that can come.

    Raises:
        UserError: naming the numbers of workers at which it cannot.
    """
    global_batch_size = config.train.global_batch_size
    world_sizes = config.cluster.world_sizes
    accumulation = config.lwo.gradient_accumulation_steps
    if len(world_sizes) == 1:
        micro_batch_size(global_batch_size, world_sizes[0], accumulation)
    uneven = [size for size in world_sizes if global_batch_size % (size * accumulation)]
    if uneven:
        multiple = math.lcm(*world_sizes) * accumulation
        raise UserError(
            f"cluster.num_workers = {[world_sizes[0], world_sizes[-1]]}: train.global_batch_size ="
            f" {global_batch_size} cannot be divided evenly among {' or '.join(map(str, uneven))}"
            f" workers (with lwo.gradient_accumulation_steps = {accumulation}); set it to a"
            f" multiple of {multiple}, or other numbers of workers"
        )
