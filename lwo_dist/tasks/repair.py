"""From a function with a bug to the function without it."""

from __future__ import annotations

from pathlib import Path

from lwo_dist.config import DataConfig
from lwo_dist.data.pairs import Pair, Pairs

from .languages import function_in, line_comment
from .pairs import CODE_SCORES, PairTask

__all__ = ["Repair"]


class Repair(PairTask):
    """`task: repair`."""

    name = "repair"
    formats = ("code", "jsonl", "code-refinement")
    example = ("fix", "fixes")
    scores = CODE_SCORES

    def read_code(self, config: DataConfig, cache: Path) -> Pairs:
        from lwo_dist.data.private import read_repair

        return read_repair(config, cache)

    def prompt(self, pair: Pair) -> str:
        mark = line_comment(pair.language)
        return f"{mark} buggy\n{pair.source}\n{mark} fixed\n"

    def request(self, pair: Pair) -> str:
        function = function_in(pair.language)
        return f"Fix the bug in this {function}. Answer with the code only.\n\n{pair.source}"
