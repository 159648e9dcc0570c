"""Which side of the split an example's file is on: a pure function of its content, or of its date.

By hash, a file neither moves when others come or go nor when it is renamed, and equal contents can
never be on two sides. By time, the newest are held out, as code is in use: a model is trained on
what was there and then asked about what is written next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from lwo_dist.config import DataConfig
from lwo_dist.errors import UserError
from lwo_dist.redaction import without_credentials

__all__ = ["Side", "Sides", "side_of_hash", "sides_by_hash", "sides_by_time", "split_by_hash"]

T = TypeVar("T")
U = TypeVar("U")
Side = Literal["train", "validation", "held_out"]


@dataclass(frozen=True)
class Sides(Generic[T]):
    """All three sides; without a `validation_fraction` the second is empty."""

    train: list[T]
    validation: list[T]
    held_out: list[T]

    def scored(self, config: DataConfig) -> list[T]:
        """Those that `evaluate_on` names."""
        return self.held_out if config.evaluate_on == "held_out" else self.validation

    @classmethod
    def of(cls, items: Iterable[T], side: Callable[[T], Side]) -> Sides[T]:
        """Each item on the side that it is on."""
        sides = cls([], [], [])
        for item in items:
            getattr(sides, side(item)).append(item)
        return sides

    def map(self, parts: Callable[[T], Iterable[U]]) -> Sides[U]:
        """Each item replaced by its parts, on the same side."""
        train, validation, held_out = (
            [part for item in items for part in parts(item)]
            for items in (self.train, self.validation, self.held_out)
        )
        return Sides(train, validation, held_out)

    def without_equals(self, key: Callable[[T], str]) -> tuple[Sides[T], int]:
        """Each key once: on the held-out side if it is there, else for validation, else in
        training; and how many items went."""
        seen: set[str] = set()
        sides: list[list[T]] = []
        for items in (self.held_out, self.validation, self.train):
            kept: list[T] = []
            for item in items:
                if key(item) not in seen:
                    seen.add(key(item))
                    kept.append(item)
            sides.append(kept)
        held_out, validation, train = sides
        dropped = len(self.held_out) + len(self.validation) + len(self.train) - len(seen)
        return Sides(train, validation, held_out), dropped


def split_by_hash(
    items: Sequence[T], sha256: Callable[[T], str], config: DataConfig
) -> tuple[list[T], list[T]]:
    """The items to train on, and those to score: of `sides_by_hash` those that `evaluate_on` names.
    The other scored side is not used at all.
    """
    sides = sides_by_hash(items, sha256, config)
    return sides.train, sides.scored(config)


def sides_by_hash(items: Sequence[T], sha256: Callable[[T], str], config: DataConfig) -> Sides[T]:
    """Each item's side by its hash.

    An item is held out if its hash, read as a number in [0, 1), is below `held_out_fraction`, and
    for validation if it is in the next `validation_fraction`. Only where that leaves a side empty,
    which takes few items, does the item nearest to that side move over.

    Args:
        items: at least two, or three with a `validation_fraction`.
        sha256: the hash of an item's content, in hex.
    """
    by_hash = sorted(items, key=sha256)
    positions = [_position(sha256(item)) for item in by_hash]
    return _cut(by_hash, positions, config)


def side_of_hash(sha256: str, config: DataConfig) -> Side:
    """The side of an item by its hash alone, in hex, as in `sides_by_hash`."""
    position = _position(sha256)
    if position < config.held_out_fraction:
        return "held_out"
    both = config.held_out_fraction + config.validation_fraction
    return "validation" if position < both else "train"


def _position(sha256: str) -> float:
    return int(sha256[:13], 16) / 16**13


def sides_by_time(
    items: Sequence[T],
    time: Callable[[T], int],
    sha256: Callable[[T], str],
    config: DataConfig,
) -> Sides[T]:
    """The newest `held_out_fraction` of the items held out, the next ones for validation; of equal
    times the side is by hash.

    Args:
        items: at least two, or three with a `validation_fraction`.
        time: of an item, such as the date of its commit, in seconds.
        sha256: the hash of an item's content, in hex.

    Raises:
        UserError: all have the same time.
    """
    if len({time(item) for item in items}) < 2:
        raise UserError(
            f"data.source = {without_credentials(str(config.source))}: one commit has all there is,"
            " so data.split = time has no older and newer part; give a repository with more"
            " history, or set data.split=hash"
        )
    newest_first = sorted(items, key=lambda item: (-time(item), sha256(item)))
    positions = [index / len(items) for index in range(len(items))]
    return _cut(newest_first, positions, config)


def _cut(ordered: list[T], positions: list[float], config: DataConfig) -> Sides[T]:
    first = sum(position < config.held_out_fraction for position in positions)
    first = max(first, 1)
    both = config.held_out_fraction + config.validation_fraction
    second = first
    if config.validation_fraction:
        second = max(sum(position < both for position in positions), first + 1)
    second = min(second, len(ordered) - 1)
    first = min(first, second - 1 if config.validation_fraction else second)
    return Sides(ordered[second:], ordered[first:second], ordered[:first])
