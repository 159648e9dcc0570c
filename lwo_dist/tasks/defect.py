"""Whether a function has a bug."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lwo_dist.config import DataConfig
from lwo_dist.data.pairs import Pair, Pairs

from . import metrics
from .base import LOSS, LOSS_PER_BYTE
from .choice import ChoiceTask
from .languages import function_in, line_comment
from .scores import Score, Scores

__all__ = ["DefectDetection"]


class DefectDetection(ChoiceTask):
    """`task: defect`."""

    name = "defect"
    formats = ("code", "jsonl", "devign")
    example = ("function", "functions")
    answers = ("no", "yes")
    scores = (
        Score("accuracy", "accuracy", "%", headline=True, count_label="functions judged rightly"),
        Score("f1", "F1 of yes", "%", headline=True, per_example=False),
        LOSS,
        LOSS_PER_BYTE,
    )

    def read_code(self, config: DataConfig, cache: Path) -> Pairs:
        from lwo_dist.data.private import read_defect

        return read_defect(config, cache)

    def prompt(self, pair: Pair) -> str:
        mark = line_comment(pair.language)
        return f"{pair.source}\n{mark} Does this function have a bug, yes or no?\n"

    def request(self, pair: Pair) -> str:
        function = function_in(pair.language)
        return f"Does this {function} have a bug? Answer with yes or no alone.\n\n{pair.source}"

    def compare(self, predictions: Sequence[str], references: Sequence[str]) -> Scores:
        accuracy = metrics.exact_matches(predictions, references)
        return Scores(
            {"accuracy": float(accuracy.mean()), "f1": metrics.f1(predictions, references)},
            {"accuracy": accuracy},
        )
