"""Training data without a source tree: examples of given lengths."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from datasets import Dataset

from lwo_dist.data.dataset import PreparedData
from lwo_dist.data.examples import TrainExample

PAD = 999


def prepared(
    lengths: list[int],
    sequence_length: int = 30,
    *,
    vocabulary: int | None = None,
    packs: list[list[int]] | None = None,
) -> PreparedData:
    """Examples of these lengths, a third of them context; the tokens of example i are
    1000 (i + 1) and up, modulo `vocabulary` if given.

    Args:
        packs: the examples of each sequence; None: one each.
    """
    examples = []
    for i, length in enumerate(lengths):
        tokens = [1000 * (i + 1) + t for t in range(length)]
        if vocabulary is not None:
            tokens = [token % vocabulary for token in tokens]
        examples.append(TrainExample(tokens, length // 3))
    labels = [example.label_tokens for example in examples]
    sequences = packs or [[i] for i in range(len(lengths))]
    return PreparedData(
        train=Dataset.from_list([vars(e) for e in examples]),
        lengths=np.array([sum(lengths[i] for i in row) for row in sequences], dtype=np.int32),
        label_tokens=np.array([sum(labels[i] for i in row) for row in sequences], dtype=np.int32),
        target_starts=np.array([example.target_start for example in examples], dtype=np.int32),
        held_out=(),
        counts={},
        fingerprint="",
        folder=Path(),
        pad_id=PAD if vocabulary is None else 0,
        sequence_length=sequence_length,
        packs=None if packs is None else Dataset.from_list([{"examples": row} for row in packs]),
    )
