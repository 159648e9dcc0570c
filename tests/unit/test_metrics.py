"""Metrics against values worked out by hand, and the interval against samples whose mean is
known.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from lwo_dist.tasks.intervals import paired_interval
from lwo_dist.tasks.metrics import (
    accuracy,
    bleu,
    chrf,
    codexglue_bleu,
    edit_similarities,
    edit_similarity,
    exact_match,
    exact_matches,
    f1,
    rouge_l,
    smoothed_bleu4,
)

CODEXGLUE = json.loads((Path(__file__).parents[1] / "data" / "codexglue.json").read_text())
"""The predictions and references beside CodeXGLUE's evaluators, each token as a number, with the
scores that its pages give for them."""


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


def test_edit_similarity_of_codexglue() -> None:
    """The example on the page of its line completion: 43.8, of whole numbers."""
    pairs = [
        ("owner )", "owner , final Point location )"),
        ("> openToxModels ;", "> models ;"),
        ("= string . length ( ) ;", "= 0 ;"),
        ('"" ) ;', "CallHierarchyMessages . SearchScopeActionGroup_workspace_tooltip ) ;"),
        ("? > in ;", "Ex1 > in1 ;"),
    ]
    predictions, references = zip(*pairs, strict=True)
    assert edit_similarities(predictions, references).round().mean() == pytest.approx(43.8)
    assert exact_match(predictions, references) == 0


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


def test_rouge_l_of_published_examples() -> None:
    # Lin (2004), section 3.1: 3 and 2 of 4 words, in order.
    predictions = ["police kill the gunman", "the gunman kill police"]
    assert rouge_l(predictions, ["police killed the gunman"] * 2).tolist() == [75, 50]
    # rouge-score's own tests, and the example of its page: 5 of 8 and of 9 words.
    assert rouge_l(["testing one", "testing two"], ["testing one two"] * 2) == pytest.approx(
        [80] * 2
    )
    brown = ("The quick brown dog jumps on the log.", "The quick brown fox jumps over the lazy dog")
    assert rouge_l([brown[0]], [brown[1]]) == pytest.approx([100 * 2 * 5 / 17])


def test_rouge_l_of_what_has_no_words() -> None:
    assert rouge_l(["", "!", "a_B c"], ["x", "!", "A, b_C"]).tolist() == [0, 0, 100]


def test_chrf_by_hand() -> None:
    # Equal lengths, so precision is recall: 2 of 3 characters, 1 of 2 pairs, 0 of 1 triple.
    assert chrf(["abd", "a b"], ["abc", "ab"]) == pytest.approx([100 * (2 / 3 + 1 / 2) / 3, 100])
    # Recall counts four times as much as precision: ab against abcd.
    recall = (2 / 4 + 1 / 3) / 2  # and all that is there is right
    assert chrf(["ab"], ["abcd"]) == pytest.approx([100 * 5 * recall / (4 + recall)])


def test_the_smoothed_bleu_of_summaries_is_that_of_codexglue() -> None:
    """The example on the page of its code-to-text: 9.554726113590661."""
    predictions = [
        "Prints a summary message",
        "Finds the output from the output file",
        "Verify that the given JSON element is present .",
        "Determines the specified compression compression .",
        "Creates a new project .",
    ]
    references = [
        "Outputs the deferred summary information saved via",
        "Inspect the file referenced in the kubectl stderr to make it easier for developer to"
        " understand what s going on",
        "make sure to never prune the ejson - keys secret",
        "Determine the best compressor for the current system . This method returns the class not"
        " an instance of the class .",
        "Create the bff file using + mkinstallp + .",
    ]
    assert smoothed_bleu4(predictions, references).mean() == pytest.approx(9.554726113590661)


def test_the_smoothed_bleu_of_summaries_by_hand() -> None:
    # Tokens: the _ id . against the _ name . : 3/4, (1+1)/(3+1), (0+1)/(2+1), (0+1)/(1+1).
    by_hand = 100 * (3 / 4 * 2 / 4 * 1 / 3 * 1 / 2) ** 0.25
    assert smoothed_bleu4(["The_ID."], ["the_name."]) == pytest.approx([by_hand])
    # Two of four: exp(1 - (4 + 1) / (2 + 1)); of n-grams that cannot be, 1 of 1 is right.
    assert smoothed_bleu4(["a b"], ["a b c d"]) == pytest.approx([100 * math.exp(-2 / 3)])
    assert smoothed_bleu4(["x", "", "A!"], ["a b", "a b", "a !"]) == pytest.approx(
        [0, 100 * math.exp(-2), 100]
    )


@pytest.mark.parametrize("task", CODEXGLUE)
def test_bleu_and_accuracy_of_codexglue(task: str) -> None:
    """The numbers on the pages of its code-to-code-trans and code-refinement."""
    example = CODEXGLUE[task]
    sides = (example["predictions"], example["references"])
    assert round(codexglue_bleu(*sides), 2) == example["bleu"]
    assert accuracy(*sides) == example["accuracy"]


def test_codexglue_bleu_by_hand() -> None:
    # Of 5 + 1 tokens: 4 + 1 right; pairs (3 + 1) / (4 + 1), then (2 + 1) / 4 and (1 + 1) / 3;
    # 6 tokens in the references.
    by_hand = 100 * (5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25 * math.exp(1 - 6 / 5)
    assert codexglue_bleu(["a(b) c d\te f", ""], ["a(b) c d e g", "h"]) == pytest.approx(by_hand)
    assert codexglue_bleu(["", " "], ["a", "b"]) == 0


def test_accuracy_and_f1() -> None:
    # The example on the page of CodeXGLUE's defect detection.
    assert accuracy(["0", "1", "1", "0", "0"], ["0", "1", "0", "0", "1"]) == 60
    predictions = ["yes", "yes ", "no", "yes", "no", "maybe"]
    references = ["yes", "no", "yes", "yes", "no", "no"]
    assert accuracy(predictions, references) == 50
    # Two of three that are said to be, two of three that are.
    assert f1(predictions, references) == pytest.approx(100 * 2 / 3)
    # One of two, one of three: 2 x 1/2 x 1/3 / (1/2 + 1/3).
    assert f1(predictions, references, positive="no") == pytest.approx(40)
    assert f1(["no"], ["no"]) == f1(["no"], ["yes"]) == f1(["yes"], ["no"]) == 0


@pytest.mark.parametrize(
    "metric",
    [
        exact_match,
        edit_similarity,
        bleu,
        rouge_l,
        chrf,
        smoothed_bleu4,
        codexglue_bleu,
        accuracy,
        f1,
    ],
)
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
