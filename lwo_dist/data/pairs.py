"""Pairs of texts: what a task from text to text learns, whatever it was read from."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lwo_dist.config import DataConfig
from lwo_dist.errors import UserError

from .duplicates import NEAR_DUPLICATE, near_duplicates
from .split import Sides, sides_by_hash

__all__ = ["Pair", "Pairs", "settle_pairs", "split_pairs"]


@dataclass(frozen=True)
class Pair:
    """One example of a task from text to text."""

    source: str
    """What the model is given, without the task's prompt around it."""
    target: str
    """What it should write; for a choice, one of the task's answers."""
    name: str
    """Where it comes from: a file below the source, or of a data set."""
    line: int
    """From 1."""
    language: str = ""
    """Programming language of the target, such as "python"; of the source where the target is
    prose. "" where it is not known."""
    source_language: str = ""
    """That of the source, where it is another."""
    messages: tuple[tuple[str, str], ...] = ()
    """Role and text of each message before the target, if the pair is the end of a chat; `source`
    then holds the texts."""

    @property
    def sha256(self) -> str:
        return hashlib.sha256(f"{self.source}\0{self.target}".encode()).hexdigest()


@dataclass(frozen=True)
class Pairs:
    """The usable pairs of a source, neither side empty; a `tasks.base.Source`."""

    source: str
    """As the user gave it, without a password."""
    train: tuple[Pair, ...]
    held_out: tuple[Pair, ...]
    skipped: Mapping[str, int]
    """Reason -> number of examples (or files) that are not used."""

    @property
    def identity(self) -> list[list[str]]:
        """Side, name, line, languages and content of every pair."""
        sides = {"train": self.train, "held_out": self.held_out}
        return [
            [
                side,
                pair.name,
                str(pair.line),
                pair.language,
                pair.source_language,
                *(role for role, _ in pair.messages),
                pair.sha256,
            ]
            for side, pairs in sides.items()
            for pair in pairs
        ]

    @property
    def counts(self) -> dict[str, Any]:
        """Numbers of pairs, for people."""
        return {
            "train_pairs": len(self.train),
            "held_out_pairs": len(self.held_out),
            "skipped": dict(self.skipped),
        }


def split_pairs(
    config: DataConfig, source: str, pairs: Sequence[Pair], skipped: Mapping[str, int]
) -> Pairs:
    """Split by the hash of the file that a pair comes from (`name`), so that neighbours from one
    file are never on two sides; by that of the pair where all come from one file.

    Raises:
        UserError: fewer than two usable pairs, or three with a `validation_fraction`.
    """
    least = 3 if config.validation_fraction else 2
    if len(pairs) < least:
        shown = ", ".join(f"{n} {reason}" for reason, n in sorted(skipped.items()))
        raise UserError(
            f"data.source = {source}: {len(pairs) or 'no'} usable"
            f" example{'' if len(pairs) == 1 else 's'} (skipped: {shown or 'none'}); give a source"
            f" with at least {least}"
        )
    names = sorted({pair.name for pair in pairs})
    if len(names) >= least:
        by_name = sides_by_hash(names, _hash_of, config)
        sides = by_name.map(lambda name: [pair for pair in pairs if pair.name == name])
    else:
        sides = sides_by_hash(pairs, lambda pair: pair.sha256, config)
    return settle_pairs(config, source, sides, skipped)


def settle_pairs(
    config: DataConfig, source: str, sides: Sides[Pair], skipped: Mapping[str, int]
) -> Pairs:
    """The pairs to train on and those to score. Training pairs equal to a scored one, or nearly so
    (`data.near_duplicates`), are left out; both scored sides count.

    Raises:
        UserError: a side is empty.
    """
    scored = [*sides.held_out, *sides.validation]
    equal = {pair.sha256 for pair in scored}
    train = [pair for pair in sides.train if pair.sha256 not in equal]
    copies = near_duplicates(map(_text, train), map(_text, scored), config)
    kept = [pair for index, pair in enumerate(train) if index not in copies]
    counts = Counter(skipped)
    counts["also held out"] += len(sides.train) - len(train)
    counts[NEAR_DUPLICATE] += len(copies)
    counts = +counts
    chosen = sides.scored(config)
    for pairs, use in ((kept, "train on"), (chosen, "score")):
        if not pairs:
            shown = ", ".join(f"{n} {reason}" for reason, n in sorted(counts.items()))
            raise UserError(
                f"data.source = {source}: no usable example to {use} (skipped: {shown or 'none'});"
                " give a larger source, or another data.held_out_fraction"
            )
    return Pairs(source, _in_order(kept), _in_order(chosen), dict(sorted(counts.items())))


def _text(pair: Pair) -> str:
    return f"{pair.source}\n{pair.target}"


def _hash_of(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def _in_order(pairs: Sequence[Pair]) -> tuple[Pair, ...]:
    return tuple(sorted(pairs, key=lambda pair: (pair.name, pair.line, pair.sha256)))
