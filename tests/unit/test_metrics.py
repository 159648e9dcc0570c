"""Metrics against values worked out by hand, and the interval against samples whose mean is
known.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from lwo_dist.tasks.intervals import paired_interval
from lwo_dist.tasks.metrics import (
    bleu,
    edit_similarities,
    edit_similarity,
    exact_match,
    exact_matches,
)


def test_exact_match_ignores_only_white_space_around() -> None:
    predictions = ["x = 1", "  x = 1\t", "x  = 1", "", "X = 1"]
    references = ["    x = 1", "x = 1", "x = 1", "  ", "x = 1"]
    assert exact_matches(predictions, references).tolist() == [100, 100, 0, 100, 0]
    assert exact_match(predictions, references) == 60


def test_edit_similarity() -> None:
    # kitten -> sitting: common subsequence ittn, so 2 deletions and 3 insertions among 13
    # characters.
    predictions = ["kitten", "  same ", "abc", "", ""]
    references = ["sitting", "same", "xyz", "abc", " "]
    expected = [100 * (1 - 5 / 13), 100, 0, 0, 100]
    assert edit_similarities(predictions, references) == pytest.approx(expected)
    assert edit_similarity(predictions, references) == pytest.approx(np.mean(expected))


def test_bleu_by_hand() -> None:
    # Tokens: a . b ( c ) against a . b ( d ): precisions 5/6, 3/5, 2/4, 1/3; equal lengths, so no
    # brevity penalty.
    by_hand = 100 * math.exp(sum(math.log(p) for p in (5 / 6, 3 / 5, 2 / 4, 1 / 3)) / 4)
    assert bleu(["a.b(c)"], ["a.b(d)"]) == pytest.approx(by_hand)
    # Half of the reference: every n-gram is right, the brevity penalty is exp(1 - 8/4).
    assert bleu(["a b c d"], ["a b c d e f g h"]) == pytest.approx(100 * math.exp(-1))


def test_bleu_of_code() -> None:
    lines = ["return self.value_of[x]", "x += 1", "}", "é = 'ü'"]
    assert bleu(lines, [f"    {line}" for line in lines]) == 100
    assert bleu(["}"], ["}"]) == 100
    assert bleu([""], ["x = 1"]) == 0
    assert bleu(["return self . value_of [ x ]"], lines[:1]) == 100
    assert bleu(["return self.valueof[x]"], lines[:1]) < 60
    assert bleu(lines[::-1], lines) < 30  # line by line, not as one bag


@pytest.mark.parametrize("metric", [exact_match, edit_similarity, bleu])
def test_unequal_numbers_of_lines(metric: object) -> None:
    with pytest.raises(ValueError):
        metric(["a"], ["a", "b"])  # type: ignore[operator]


def test_paired_interval_is_that_of_the_differences() -> None:
    random = np.random.RandomState(3)
    before = random.normal(50, 30, 400)
    after = before + random.normal(2, 5, 400)
    mean, low, high = paired_interval(before, after)
    difference = after - before
    half = 1.96 * difference.std(ddof=1) / 20
    assert mean == pytest.approx(difference.mean())
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.1 * half)
    assert paired_interval(before, after) == (mean, low, high)
    assert paired_interval(after, before) == pytest.approx((-mean, -high, -low), abs=0.1 * half)


def test_paired_interval_covers_the_truth_as_often_as_it_says() -> None:
    random = np.random.RandomState(0)
    hits = 0
    for _ in range(60):
        after = 100.0 * (random.rand(100) < 0.3)  # as exact match: 0 or 100
        _, low, high = paired_interval(np.zeros(100), after)
        hits += low <= 30 <= high
    assert 50 <= hits < 60


@pytest.mark.parametrize("scores", [[], [1.0], [[1.0, 2.0], [3.0, 4.0]]])
def test_no_interval_from_less_than_two_lines(scores: list[float]) -> None:
    with pytest.raises(ValueError, match="at least 2 lines"):
        paired_interval(scores, scores)
