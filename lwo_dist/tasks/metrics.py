"""Scores of predicted against reference lines, 0 to 100, and intervals of paired differences.

Exact match and edit similarity are those of line completion in CodeXGLUE (Lu et al., 2021): lines
equal except for surrounding whitespace, and the `fuzz.ratio` of the two. BLEU is sacrebleu's corpus
BLEU (Papineni et al., 2002; Post, 2018) with its default smoothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from rapidfuzz import fuzz
from sacrebleu.metrics import BLEU

from .scores import Column

__all__ = [
    "bleu",
    "edit_similarities",
    "edit_similarity",
    "exact_match",
    "exact_matches",
    "paired_interval",
]

_TOKEN = re.compile(r"\w+|[^\w\s]")
_RESAMPLES = 10_000
_CHUNK = 1_000_000


def exact_matches(predictions: Sequence[str], references: Sequence[str]) -> Column:
    """[lines], 100 if prediction and reference are equal without surrounding whitespace, else 0."""
    pairs = zip(predictions, references, strict=True)
    return np.array(
        [100.0 * (prediction.strip() == reference.strip()) for prediction, reference in pairs]
    )


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Percentage of correct lines: the "accuracy" of line completion."""
    return float(exact_matches(predictions, references).mean())


def edit_similarities(predictions: Sequence[str], references: Sequence[str]) -> Column:
    """[lines], 100 x (1 - insertions and deletions / characters of both).

    Ignores surrounding whitespace.
    """
    pairs = zip(predictions, references, strict=True)
    return np.array(
        [fuzz.ratio(prediction.strip(), reference.strip()) for prediction, reference in pairs]
    )


def edit_similarity(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Mean of `edit_similarities`."""
    return float(edit_similarities(predictions, references).mean())


def bleu(predictions: Sequence[str], references: Sequence[str]) -> float:
    """BLEU-4 of the whole corpus of lines.

    A token is a run of letters, digits and underscores, or a single other character: sacrebleu's
    own tokenisers are made for prose and keep `a.b(c)` as one token.
    """
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references")
    tokenised = [
        [" ".join(_TOKEN.findall(line)) for line in lines] for lines in (predictions, references)
    ]
    # effective_order: if all lines have fewer than four tokens, a perfect score is 100, not 0.
    scorer = BLEU(tokenize="none", force=True, effective_order=True)
    return min(float(scorer.corpus_score(tokenised[0], [tokenised[1]]).score), 100.0)


def paired_interval(
    before: Sequence[float] | Column,
    after: Sequence[float] | Column,
    weights: Sequence[float] | npt.NDArray[Any] | None = None,
) -> tuple[float, float, float]:
    """Mean of `after - before` over lines, and its 95 % percentile bootstrap interval.

    Args:
        weights: [lines], such as their tokens, for a weighted mean; None: all alike.

    Bootstrap: Efron (1979). Resamples are drawn with a fixed seed, so that the same scores give the
    same interval.

    Returns:
        mean difference, lower bound, upper bound.
    """
    difference = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    if difference.ndim != 1 or len(difference) < 2:
        raise ValueError(
            f"an interval needs scores of at least 2 lines, got shape {difference.shape}"
        )
    weight = np.ones_like(difference) if weights is None else np.asarray(weights, dtype=np.float64)
    random = np.random.RandomState(0)
    # A few rows of resamples at a time: all at once would take 80 kB per line.
    rows = max(1, _CHUNK // len(difference))
    means = []
    for first in range(0, _RESAMPLES, rows):
        size = (min(rows, _RESAMPLES - first), len(difference))
        lines = random.randint(0, len(difference), size)
        sums = (weight * difference)[lines].sum(axis=1)
        means.append(sums / weight[lines].sum(axis=1))
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return float(np.average(difference, weights=weight)), float(low), float(high)
