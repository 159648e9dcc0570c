"""From a function to the first sentence of its documentation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lwo_dist.config import DataConfig
from lwo_dist.data.pairs import Pair, Pairs

from . import metrics
from .base import LOSS, LOSS_PER_BYTE
from .languages import function_in, line_comment
from .pairs import PairTask
from .scores import Score, Scores

__all__ = ["Summarisation"]


class Summarisation(PairTask):
    """`task: summarisation`."""

    name = "summarisation"
    formats = ("code", "jsonl", "code-to-text")
    example = ("summary", "summaries")
    scores = (
        Score("smoothed_bleu4", "smoothed BLEU-4", headline=True),
        Score("rouge_l", "ROUGE-L", headline=True),
        Score("chrf", "chrF"),
        LOSS,
        LOSS_PER_BYTE,
    )

    def read_code(self, config: DataConfig, cache: Path) -> Pairs:
        from lwo_dist.data.private import read_summarisation

        return read_summarisation(config, cache)

    def prompt(self, pair: Pair) -> str:
        return f"{pair.source}\n{line_comment(pair.language)} summary:\n"

    def request(self, pair: Pair) -> str:
        function = function_in(pair.language)
        return f"Summarise this {function} in one sentence.\n\n{pair.source}"

    def compare(self, predictions: Sequence[str], references: Sequence[str]) -> Scores:
        columns = {
            "smoothed_bleu4": metrics.smoothed_bleu4(predictions, references),
            "rouge_l": metrics.rouge_l(predictions, references),
            "chrf": metrics.chrf(predictions, references),
        }
        return Scores({name: float(column.mean()) for name, column in columns.items()}, columns)
