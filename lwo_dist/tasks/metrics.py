"""Scores of predicted against reference texts, 0 to 100.

Exact match and edit similarity are those of line completion in CodeXGLUE (Lu et al., 2021): lines
equal except for surrounding whitespace, and the `fuzz.ratio` of the two. Its evaluator also ignores
how much whitespace is within a line, and rounds each ratio to a whole number. BLEU is sacrebleu's
corpus BLEU (Papineni et al., 2002; Post, 2018) with its default smoothing. `smoothed_bleu4` and
`codexglue_bleu` are the two other BLEUs that CodeXGLUE's evaluators report; they differ in tokens,
smoothing and brevity penalty, and none is comparable with another.

CodeBLEU (Ren et al., 2020) is not here: its only package, `codebleu` 0.7, needs tree-sitter below
0.23, which has no grammars of today.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from rapidfuzz import fuzz
from rapidfuzz.distance import LCSseq
from sacrebleu.metrics import BLEU, CHRF

from .scores import Column

__all__ = [
    "accuracy",
    "bleu",
    "chrf",
    "codexglue_bleu",
    "edit_similarities",
    "edit_similarity",
    "exact_match",
    "exact_matches",
    "f1",
    "rouge_l",
    "smoothed_bleu4",
]

_TOKEN = re.compile(r"\w+|[^\w\s]")
_ROUGE_TOKEN = re.compile(r"[a-z0-9]+")
_SUMMARY_TOKEN = re.compile(r"[^\W_]+|[^\w\s]|_")


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


def accuracy(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Percentage of right labels, without regard to surrounding whitespace."""
    return exact_match(predictions, references)


def f1(predictions: Sequence[str], references: Sequence[str], positive: str = "yes") -> float:
    """F1 of the label `positive`: 2 TP / (2 TP + FP + FN), without regard to surrounding
    whitespace; 0 where it is undefined, as no label is positive, predicted or true.
    """
    pairs = [
        (prediction.strip() == positive, reference.strip() == positive)
        for prediction, reference in zip(predictions, references, strict=True)
    ]
    right = sum(predicted and true for predicted, true in pairs)
    marked = sum(predicted + true for predicted, true in pairs)
    return 200 * right / marked if marked else 0.0


def rouge_l(predictions: Sequence[str], references: Sequence[str]) -> Column:
    """[texts], ROUGE-L (Lin, 2004): F1 of the longest common subsequence of tokens.

    Tokens are runs of ASCII letters and digits in lower case, as in the package rouge-score without
    stemming; 0 where a side has none.
    """
    pairs = zip(predictions, references, strict=True)
    return np.array([_rouge_l(prediction, reference) for prediction, reference in pairs])


def chrf(predictions: Sequence[str], references: Sequence[str]) -> Column:
    """[texts], sacrebleu's chrF2 of each (Popovic, 2015): F-score of character 6-grams."""
    scorer = CHRF()
    pairs = zip(predictions, references, strict=True)
    return np.array(
        [scorer.sentence_score(prediction, [reference]).score for prediction, reference in pairs]
    )


def smoothed_bleu4(predictions: Sequence[str], references: Sequence[str]) -> Column:
    """[texts], the smoothed BLEU-4 of CodeXGLUE's code-to-text; their mean is its score.

    Tokens are those of its evaluator: runs of letters and digits in lower case, or a single other
    character. One is added to the counts of 2- to 4-grams (Lin and Och, 2004), and to both lengths
    in the brevity penalty. An empty prediction therefore has exp(-length of the reference).
    """
    tiny = sys.float_info.min
    column = []
    for prediction, reference in zip(predictions, references, strict=True):
        found = _ngrams(
            *([" ".join(_SUMMARY_TOKEN.findall(text.lower()))] for text in (prediction, reference))
        )
        logs = [
            math.log(right + (n > 0) + tiny) - math.log(total + (n > 0) + tiny)
            for n, (right, total) in enumerate(zip(found.counts, found.totals, strict=True))
        ]
        penalty = min(0.0, 1 - (found.ref_len + 1) / (found.sys_len + 1))
        column.append(100 * math.exp(sum(logs) / len(logs) + penalty))
    return np.array(column)


def codexglue_bleu(predictions: Sequence[str], references: Sequence[str]) -> float:
    """BLEU-4 of the whole corpus as CodeXGLUE reports it for translation, refinement and
    generation: tokens between whitespace, and one added to the counts of 1- to 4-grams.

    sacrebleu's `add-k` is not the same: it leaves out the 1-grams. 0 if all predictions are empty.
    """
    found = _ngrams(predictions, references)
    if not found.sys_len:
        return 0.0
    precisions = [(a + 1) / (b + 1) for a, b in zip(found.counts, found.totals, strict=True)]
    penalty = min(0.0, 1 - found.ref_len / found.sys_len)
    return 100 * math.exp(float(np.log(precisions).mean()) + penalty)


def _rouge_l(prediction: str, reference: str) -> float:
    tokens = [_ROUGE_TOKEN.findall(text.lower()) for text in (prediction, reference)]
    common = LCSseq.similarity(*tokens)
    return 200 * common / sum(map(len, tokens)) if common else 0.0


def _ngrams(predictions: Sequence[str], references: Sequence[str]) -> Any:
    """For n from 1 to 4: `counts` of the n-grams that match, and their `totals`; `sys_len` and
    `ref_len`, the tokens of both sides.
    """
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references")
    return BLEU(tokenize="none", force=True).corpus_score(predictions, [references])
