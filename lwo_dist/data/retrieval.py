"""Passages of the training files, or whole training examples, that resemble a text: by BM25
(Robertson et al., 1994), in the `lucene` variant of the library bm25s.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import islice, takewhile
from types import ModuleType
from typing import Generic, TypeVar

import numpy as np

__all__ = ["QUERY_LINES", "Passage", "Retriever", "passages_of", "query_of"]

QUERY_LINES = 10
"""The last lines of a context that are looked up."""
_LINES = 20
_STRIDE = 10
_WORD = re.compile(r"[^\W_]+")

_Item = TypeVar("_Item")


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


class Retriever(Generic[_Item]):
    """Finds items by their texts. Words are runs of letters and digits, in lower case: `read_file`
    is two.

    The same items and queries give the same answer.
    """

    def __init__(self, items: Sequence[_Item], text_of: Callable[[_Item], str]):
        self._items = list(items)
        self._index = _bm25s().BM25()
        words = [_words(text_of(item)) for item in self._items]
        self._known = {word for text in words for word in text}
        if self._known:
            self._index.index(words, show_progress=False)

    def nearest(
        self, query: str, k: int, leave_out: Callable[[_Item], bool] = lambda item: False
    ) -> list[_Item]:
        """Up to `k` items that share words with `query`, best first, of equal ones the earlier."""
        words = [word for word in _words(query) if word in self._known]
        if not words:
            return []
        scores = self._index.get_scores(words)
        order = np.argsort(-scores, kind="stable")
        sharing = takewhile(lambda index: scores[index] > 0, order)
        found = (self._items[index] for index in sharing)
        return list(islice((item for item in found if not leave_out(item)), k))


def _lines(text: str) -> list[str]:
    # Not splitlines(), which knows other line ends.
    *lines, last = text.split("\n")
    return [*(f"{line}\n" for line in lines), *([last] if last else [])]


def _words(text: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(text)]


def _bm25s() -> ModuleType:
    """The library, without JAX. Where JAX is installed, bm25s computes with it as it is imported,
    and JAX then holds three quarters of the GPU's memory.
    """
    missing = object()
    jax = sys.modules.get("jax", missing)
    sys.modules["jax"] = None  # type: ignore[assignment]
    try:
        return import_module("bm25s")
    finally:
        if jax is missing:
            del sys.modules["jax"]
        else:
            sys.modules["jax"] = jax  # type: ignore[assignment]
