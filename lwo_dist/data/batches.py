"""The batch of a step is a pure function of (seed, step).

The global batch does not depend on the number of ranks; each rank computes which part of it is its
own, and how many label tokens the whole has, without asking the others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, islice

import numpy as np
import numpy.typing as npt
import torch

from lwo_dist.config.batch import micro_batch_size
from lwo_dist.losses import IGNORED_LABEL

from .dataset import PreparedData

__all__ = [
    "GlobalBatch",
    "global_batch",
    "global_batch_indices",
    "steps_of_epochs",
]

_PAD_TO_MULTIPLE_OF = 8


def steps_of_epochs(epochs: float, num_examples: int, global_batch_size: int) -> int:
    """Optimizer steps of `epochs` passes over the examples; the last one may begin another pass."""
    # Rounded first: 0.1 x 30 is slightly more than 3 in floating point.
    return max(1, math.ceil(round(epochs * num_examples / global_batch_size, 6)))


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
    position = step * batch_size
    end = position + batch_size
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


@dataclass(frozen=True)
class GlobalBatch:
    """The batch of one optimizer step, as one rank sees it."""

    indices: npt.NDArray[np.int64]
    """[global_batch_size] sequences of the whole global batch, in order."""
    micro_batches: list[dict[str, torch.Tensor]]
    """This rank's part, a dict for each micro-batch of an accumulation: `input_ids`, `labels`
    (-100: not learned), and `attention_mask` (1 real, 0 padding) or, of packed sequences,
    `position_ids` (from 0 in each example, and in the padding), each [sequences, tokens], int64, on
    the CPU. The model shifts the labels. For an encoder-decoder `input_ids` and `attention_mask`
    are the encoder's, and beside the labels, in their shape, are `decoder_input_ids`: the decoder's
    first token and then the labels' tokens.
    """
    label_tokens: int
    """Positions of the whole global batch that count in the loss: the divisor of its summed loss.
    """
    tokens: int
    """Tokens of the whole global batch, without padding."""


def global_batch(
    data: PreparedData,
    *,
    seed: int,
    step: int,
    global_batch_size: int,
    world_size: int,
    rank: int,
    accumulation: int,
) -> GlobalBatch:
    """The batch of `step` (from 0), with the rows of `rank` as `accumulation` micro-batches.

    Rows are padded on the right to the longest row of the same micro-batch on any rank (and to a
    multiple of 8 within `sequence_length`), so a row is computed in the same shape at every world
    size.

    Raises:
        UserError: the global batch cannot be divided evenly, see `micro_batch_size`.
    """
    size = micro_batch_size(global_batch_size, world_size, accumulation)
    indices = global_batch_indices(len(data.lengths), global_batch_size, seed, step)
    rows_of_all_ranks = indices.reshape(accumulation, world_size, size)
    return GlobalBatch(
        indices=indices,
        micro_batches=[_batch(data, rows, rank) for rows in rows_of_all_ranks],
        label_tokens=int(data.label_tokens[indices].sum(dtype=np.int64)),
        tokens=int(data.lengths[indices].sum(dtype=np.int64)),
    )


def _batch(
    data: PreparedData, rows_of_ranks: npt.NDArray[np.int64], rank: int
) -> dict[str, torch.Tensor]:
    indices = rows_of_ranks[rank]
    if data.decoder_start is not None:
        starts = data.target_starts[rows_of_ranks]
        targets = data.lengths[rows_of_ranks] - starts
        widths = (_width(data, starts), _width(data, targets + 1))
        return _encoded(data, indices, data.decoder_start, *widths)
    return _joined(data, indices, _width(data, data.lengths[rows_of_ranks]))


def _width(data: PreparedData, lengths: npt.NDArray[np.int32]) -> int:
    """Tokens that a row of a micro-batch with these rows is padded to."""
    longest = int(lengths.max())
    rounded = -(-longest // _PAD_TO_MULTIPLE_OF) * _PAD_TO_MULTIPLE_OF
    # An example is never cut, even if it is longer than `sequence_length`.
    return max(longest, min(rounded, data.sequence_length))


def _encoded(
    data: PreparedData,
    indices: npt.NDArray[np.int64],
    decoder_start: int,
    width: int,
    decoder_width: int,
) -> dict[str, torch.Tensor]:
    """For an encoder-decoder."""
    input_ids = torch.full((len(indices), width), data.pad_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    decoder_input_ids = torch.full((len(indices), decoder_width), data.pad_id, dtype=torch.int64)
    decoder_input_ids[:, 0] = decoder_start
    labels = torch.full_like(decoder_input_ids, IGNORED_LABEL)
    rows = data.train[indices.tolist()]
    examples = zip(rows["input_ids"], rows["target_start"], strict=True)
    for i, (tokens, start) in enumerate(examples):
        input_ids[i, :start] = torch.tensor(tokens[:start])
        attention_mask[i, :start] = 1
        learned = slice(1, 1 + len(tokens) - start)
        labels[i, learned] = decoder_input_ids[i, learned] = torch.tensor(tokens[start:])
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "decoder_input_ids": decoder_input_ids,
        "labels": labels,
    }


def _joined(
    data: PreparedData, indices: npt.NDArray[np.int64], width: int
) -> dict[str, torch.Tensor]:
    """For a decoder."""
    input_ids = torch.full((len(indices), width), data.pad_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    position_ids = torch.arange(width).repeat(len(indices), 1)
    labels = torch.full_like(input_ids, IGNORED_LABEL)
    chosen = indices.tolist()
    packs = [[i] for i in chosen] if data.packs is None else data.packs[chosen]["examples"]
    rows = data.train[list(chain(*packs))]
    examples = zip(rows["input_ids"], rows["target_start"], strict=True)
    for i, examples_of_row in enumerate(packs):
        begin = 0
        for tokens, target in islice(examples, len(examples_of_row)):
            end = begin + len(tokens)
            input_ids[i, begin:end] = torch.tensor(tokens)
            attention_mask[i, begin:end] = 1
            # Nothing predicts the first token of an example.
            learned = slice(begin + max(target, 1), end)
            labels[i, learned] = input_ids[i, learned]
            position_ids[i, end:] -= len(tokens)  # starts again at 0
            begin = end
    batch = {"input_ids": input_ids, "labels": labels}
    if data.packs is None:
        return batch | {"attention_mask": attention_mask}
    # transformers makes a block-diagonal mask of positions that start again, but only without an
    # attention_mask.
    return batch | {"position_ids": position_ids}
