"""Scores of predicted against reference lines, 0 to 100.

Exact match and edit similarity are those of line completion in CodeXGLUE (Lu et al., 2021): lines
equal except for surrounding whitespace, and the `fuzz.ratio` of the two. BLEU is sacrebleu's corpus
BLEU (Papineni et al., 2002; Post, 2018) with its default smoothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from rapidfuzz import fuzz
from sacrebleu.metrics import BLEU

from .scores import Column

__all__ = [
    "bleu",
    "edit_similarities",
    "edit_similarity",
    "exact_match",
    "exact_matches",
]

_TOKEN = re.compile(r"\w+|[^\w\s]")


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
