"""Training texts that are nearly copies of scored ones, which would inflate the scores.

Two texts are compared by the sets of their 5-grams of tokens (Jaccard similarity), as Lee et al. do
(2022, "Deduplicating Training Data Makes Language Models Better"); 0.85 is the threshold of The
Stack (Kocetkov et al., 2022, arXiv:2211.15533). Candidates come from MinHash and
locality-sensitive hashing; the exact similarity then decides, so it depends on the two texts alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from zlib import crc32

import numpy as np
import numpy.typing as npt

from lwo_dist.config import DataConfig

__all__ = ["NEAR_DUPLICATE", "near_duplicates", "similarity"]

NEAR_DUPLICATE = "near-duplicate of a held-out example"
"""Why a training file or pair is left out."""

_GRAM = 5
_PERMUTATIONS = 128
_SEED = 1
_TOKEN = re.compile(r"\w+|[^\w\s]")

Grams = npt.NDArray[np.uint64]


def near_duplicates(texts: Iterable[str], scored: Iterable[str], config: DataConfig) -> set[int]:
    """Indexes of the `texts` whose similarity to one of `scored` is at least
    `config.near_duplicates`; none if that is None, and then nothing is read.
    """
    threshold = config.near_duplicates
    if threshold is None:
        return set()
    # Its import takes as long as those of all the rest here.
    from datasketch import MinHash, MinHashLSH

    def sketch(grams: Grams) -> MinHash:
        hashed = MinHash(num_perm=_PERMUTATIONS, seed=_SEED, hashfunc=int)
        hashed.update_batch((grams & np.uint64(0xFFFFFFFF)).tolist())
        return hashed

    rows = _rows(threshold)
    index = MinHashLSH(num_perm=_PERMUTATIONS, params=(_PERMUTATIONS // rows, rows))
    known: list[Grams] = []
    for text in scored:
        grams = _grams(text)
        index.insert(len(known), sketch(grams), check_duplication=False)
        known.append(grams)
    return {
        number
        for number, text in enumerate(texts)
        if len(grams := _grams(text))
        and any(_jaccard(grams, known[key]) >= threshold for key in index.query(sketch(grams)))
    }


def _rows(threshold: float) -> int:
    """Hashes in a band of the index: the most that still find 99 of 100 pairs whose similarity is
    just the threshold, and so nearly all above it. A missed pair is a copy that is trained on; a
    false candidate costs one exact comparison. (Leskovec, Rajaraman, Ullman, "Mining of Massive
    Datasets", section 3.4.)
    """
    found = {r: 1 - (1 - threshold**r) ** (_PERMUTATIONS // r) for r in range(1, 65)}
    return max((rows for rows, share in found.items() if share >= 0.99), default=1)


def similarity(one: str, other: str) -> float:
    """The Jaccard similarity of the sets of token 5-grams, from 0 to 1."""
    return _jaccard(_grams(one), _grams(other))


def _jaccard(one: Grams, other: Grams) -> float:
    if not len(one) or not len(other):
        return 0.0
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared / (len(one) + len(other) - shared)


def _grams(text: str) -> Grams:
    """Unique hashes of the 5-grams; a text of fewer tokens has one, of them all."""
    tokens = [crc32(token.encode()) for token in _TOKEN.findall(text)]
    if not tokens:
        return np.empty(0, np.uint64)
    hashes = np.array(tokens, np.uint64)
    size = min(_GRAM, len(tokens))
    mixed = np.zeros(len(tokens) - size + 1, np.uint64)
    for offset in range(size):  # a polynomial modulo 2^64, then mixed as in splitmix64
        mixed = mixed * np.uint64(0x9E3779B97F4A7C15) + hashes[offset : offset + len(mixed)]
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return np.unique(mixed ^ (mixed >> np.uint64(31)))
