"""Short examples packed to a row, so that little of a batch is padding.

Tokens of one example never attend to another's: their position ids restart (`global_batch`), from
which transformers makes a block-diagonal attention mask.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["pack"]


def pack(lengths: npt.NDArray[np.int32], room: int) -> list[list[int]]:
    """Divide examples among rows of at most `room` tokens, by best fit decreasing.

    The longest example comes first, ties in order, and each goes where it leaves the least room.
    The number of rows is at most 11/9 of the optimum, plus 4 (Johnson et al., "Worst-Case
    Performance Bounds for Simple One-Dimensional Packing Algorithms", 1974).

    Args:
        lengths: [examples], tokens of each. One longer than `room` gets a row of its own.

    Returns:
        The examples of each row; each example is in exactly one.
    """
    rows: list[list[int]] = []
    rows_with: list[list[int]] = [[] for _ in range(room + 1)]
    rooms = 0  # bit r is set where a row has room for r more tokens
    for example in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[example])
        fitting = rooms >> length
        if fitting:
            left = length + (fitting & -fitting).bit_length() - 1
            row = rows_with[left].pop()
            if not rows_with[left]:
                rooms ^= 1 << left
            rows[row].append(example)
        else:
            row, left = len(rows), room
            rows.append([example])
        left = max(left - length, 0)
        rows_with[left].append(row)
        rooms |= 1 << left
    return rows
