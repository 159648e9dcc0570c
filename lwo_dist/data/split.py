"""Which side of the split an example's file is on: a pure function of its content.

A file neither moves when others come or go nor when it is renamed, and equal contents can never be
on two sides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from lwo_dist.config import DataConfig

__all__ = ["split_by_hash"]

T = TypeVar("T")


def split_by_hash(
    items: Sequence[T], sha256: Callable[[T], str], config: DataConfig
) -> tuple[list[T], list[T]]:
    """The items to train on, and those to score, each by hash.

    An item is held out if its hash, read as a number in [0, 1), is below `held_out_fraction`, and
    for validation if it is in the next `validation_fraction`. The items to score are those that
    `evaluate_on` names; the other scored side is not used at all. Only where that leaves a side
    empty, which takes few items, does the item nearest to that side move over.

    Args:
        items: at least two, or three with a `validation_fraction`.
        sha256: the hash of an item's content, in hex.
    """
    by_hash = sorted(items, key=sha256)
    positions = [int(sha256(item)[:13], 16) / 16**13 for item in by_hash]
    first = sum(position < config.held_out_fraction for position in positions)
    first = max(first, 1)
    both = config.held_out_fraction + config.validation_fraction
    second = first
    if config.validation_fraction:
        second = max(sum(position < both for position in positions), first + 1)
    second = min(second, len(by_hash) - 1)
    first = min(first, second - 1 if config.validation_fraction else second)
    scored = by_hash[:first] if config.evaluate_on == "held_out" else by_hash[first:second]
    return by_hash[second:], scored
