"""From a signature and its documentation to the body."""

from __future__ import annotations

from pathlib import Path

from lwo_dist.config import DataConfig
from lwo_dist.data.pairs import Pair, Pairs

from .languages import function_in
from .pairs import CODE_SCORES, PairTask

__all__ = ["Generation"]


class Generation(PairTask):
    """`task: generation`."""

    name = "generation"
    formats = ("code", "jsonl", "concode")
    example = ("function", "functions")
    scores = CODE_SCORES

    def read_code(self, config: DataConfig, cache: Path) -> Pairs:
        from lwo_dist.data.private import read_generation

        return read_generation(config, cache)

    def prompt(self, pair: Pair) -> str:
        return f"{pair.source}\n"

    def request(self, pair: Pair) -> str:
        function = function_in(pair.language)
        return f"Continue this {function}. Answer with the code only.\n\n{pair.source}"
