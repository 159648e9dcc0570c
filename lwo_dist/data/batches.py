"""The batch of a step is a pure function of (seed, step).

The global batch does not depend on the number of ranks; each rank computes which part of it is its
own, and how many label tokens the whole has, without asking the others.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch

from lwo_dist.config import Config
from lwo_dist.errors import UserError

from .dataset import PreparedData

__all__ = [
    "IGNORED_LABEL",
    "check_world_sizes",
    "global_batch_indices",
    "label_tokens",
    "micro_batch_size",
    "micro_batches",
]

IGNORED_LABEL = -100
_PAD_TO_MULTIPLE_OF = 8


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
    global_batch_size, world_sizes = config.train.global_batch_size, config.cluster.world_sizes
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


def global_batch_indices(
    num_examples: int, batch_size: int, seed: int, step: int
) -> npt.NDArray[np.int64]:
    """Which examples make up the batch of `step` (from 0).

    Each epoch is a new permutation; epochs follow each other without a gap, so a batch may span two
    or more and no example is ever left out.

    Returns:
        [batch_size] indices below `num_examples`.
    """
    if num_examples < 1:
        raise ValueError("there are no examples to draw a batch from")
    position, end = step * batch_size, (step + 1) * batch_size
    parts = []
    while position < end:
        epoch, offset = divmod(position, num_examples)
        part = _permutation(num_examples, seed, epoch)[offset : offset + end - position]
        parts.append(part)
        position += len(part)
    return np.concatenate(parts)


@lru_cache(maxsize=4)
def _permutation(num_examples: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    # RandomState: numpy keeps its stream the same for ever (NEP 19), so a run resumed under another
    # numpy goes on.
    state = np.random.RandomState(np.random.SeedSequence([seed, epoch]).generate_state(8))
    permutation = state.permutation(num_examples).astype(np.int64)
    permutation.flags.writeable = False
    return permutation


def label_tokens(data: PreparedData, *, seed: int, step: int, global_batch_size: int) -> int:
    """Label positions that count in the loss over the global batch of `step`: the divisor of its
    summed loss.
    """
    indices = global_batch_indices(len(data.lengths), global_batch_size, seed, step)
    return int(data.label_tokens[indices].sum(dtype=np.int64))


def micro_batches(
    data: PreparedData,
    *,
    seed: int,
    step: int,
    global_batch_size: int,
    world_size: int,
    rank: int,
    accumulation: int,
) -> list[dict[str, torch.Tensor]]:
    """This rank's part of the global batch of `step`, as `accumulation` micro-batches.

    Rows are padded on the right to the longest of all ranks' rows of the same micro-batch (and to a
    multiple of 8 within `sequence_length`), so a row is computed in the same shape at every world
    size.

    Returns:
        `input_ids`, `attention_mask` (1 real, 0 padding) and `labels` (-100: not learned), each
        [sequences, tokens], int64, on the CPU. The model shifts the labels.

    Raises:
        UserError: see `micro_batch_size`.
    """
    size = micro_batch_size(global_batch_size, world_size, accumulation)
    indices = global_batch_indices(len(data.lengths), global_batch_size, seed, step)
    batches = []
    for shared in indices.reshape(accumulation, world_size, size):
        longest = int(data.lengths[shared].max())
        rounded = -(-longest // _PAD_TO_MULTIPLE_OF) * _PAD_TO_MULTIPLE_OF
        batches.append(_batch(data, shared[rank], max(longest, min(rounded, data.sequence_length))))
    return batches


def _batch(
    data: PreparedData, indices: npt.NDArray[np.int64], width: int
) -> dict[str, torch.Tensor]:
    input_ids = torch.full((len(indices), width), data.pad_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORED_LABEL)
    rows = data.train[indices.tolist()]
    for i, (tokens, start) in enumerate(zip(rows["input_ids"], rows["target_start"], strict=True)):
        row = torch.tensor(tokens)
        input_ids[i, : len(row)] = row
        attention_mask[i, : len(row)] = 1
        labels[i, start : len(row)] = row[start:]
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
