"""Training pairs that resemble a pair, to stand before its prompt with their answers."""

from __future__ import annotations

from collections.abc import Sequence

from lwo_dist.config import DataConfig
from lwo_dist.data.pairs import Pair
from lwo_dist.data.retrieval import Retriever

__all__ = ["WorkedExamples"]


class WorkedExamples:
    """The `data.retrieval` distinct training pairs whose sources resemble that of a pair most, the
    best one last.

    Never the pair itself or an equal one. With `data.format: code` none from its file either: the
    files of held-out pairs are not trained on.
    """

    def __init__(self, train: Sequence[Pair], config: DataConfig):
        self._k = config.retrieval
        self._by_file = config.format == "code"
        distinct = {pair.sha256: pair for pair in train}
        self._retriever = Retriever(list(distinct.values()), lambda pair: pair.source)

    def __call__(self, pair: Pair) -> list[Pair]:
        def is_near(other: Pair) -> bool:
            return other.sha256 == pair.sha256 or (self._by_file and other.name == pair.name)

        return self._retriever.nearest(pair.source, self._k, is_near)[::-1]
