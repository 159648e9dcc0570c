"""Passages of the training files that resemble a text, by BM25 (Robertson et al., 1994), in the
`lucene` variant of the library bm25s.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import bm25s
import numpy as np

__all__ = ["QUERY_LINES", "Passage", "Retriever", "passages_of", "query_of"]

QUERY_LINES = 10
"""The last lines of a context that are looked up."""
_LINES = 20
_STRIDE = 10
_WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True)
class Passage:
    """Some lines of a file."""

    name: str
    """Of the file, below the source."""
    line: int
    """The first, from 1."""
    text: str
    """Whole lines, with their line ends."""


def passages_of(name: str, text: str) -> list[Passage]:
    """A text in windows of 20 lines, each of which begins 10 lines after the one before."""
    lines = _lines(text)
    starts = range(0, max(len(lines) - _STRIDE, 1), _STRIDE)
    found = (Passage(name, i + 1, "".join(lines[i : i + _LINES])) for i in starts)
    return [passage for passage in found if passage.text.strip()]


def query_of(text: str) -> str:
    """The end of a context that is looked up."""
    return "".join(_lines(text)[-QUERY_LINES:])


class Retriever:
    """Finds passages. Words are runs of letters and digits, in lower case: `read_file` is two.

    The same passages and queries give the same answer.
    """

    def __init__(self, passages: Sequence[Passage]):
        self._passages = list(passages)
        self._names = np.array([passage.name for passage in self._passages])
        self._index = bm25s.BM25()
        words = [_words(passage.text) for passage in self._passages]
        self._known = {word for text in words for word in text}
        if self._known:
            self._index.index(words, show_progress=False)

    def nearest(self, query: str, k: int, not_from: str | None = None) -> list[Passage]:
        """Up to `k` passages that share words with `query`, best first, of equal ones the earlier.

        Args:
            not_from: name of a file whose passages are left out.
        """
        words = [word for word in _words(query) if word in self._known]
        if not words:
            return []
        scores = self._index.get_scores(words)
        scores = np.where(self._names == not_from, 0.0, scores)
        best = np.argsort(-scores, kind="stable")[:k]
        return [self._passages[i] for i in best if scores[i] > 0]


def _lines(text: str) -> list[str]:
    # Not splitlines(), which knows other line ends.
    *lines, last = text.split("\n")
    return [*(f"{line}\n" for line in lines), *([last] if last else [])]


def _words(text: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(text)]
