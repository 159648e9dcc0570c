"""From one programming language to another."""

from __future__ import annotations

from pathlib import Path

from lwo_dist.config import DataConfig
from lwo_dist.data.pairs import Pair, Pairs

from .languages import language_name, line_comment
from .pairs import CODE_SCORES, PairTask

__all__ = ["Translation"]


class Translation(PairTask):
    """`task: translation`."""

    name = "translation"
    formats = ("jsonl", "code-to-code-trans")
    example = ("translation", "translations")
    scores = CODE_SCORES

    def read_code(self, config: DataConfig, cache: Path) -> Pairs:
        raise AssertionError("refused by check()")

    def prompt(self, pair: Pair) -> str:
        source, target = pair.source_language, pair.language
        return (
            f"{line_comment(source)} {language_name(source) or 'original'}\n{pair.source}\n"
            f"{line_comment(target)} {language_name(target) or 'translation'}\n"
        )

    def request(self, pair: Pair) -> str:
        target = f" to {language_name(pair.language)}" if pair.language else ""
        source = f"{language_name(pair.source_language)} code".strip()
        return f"Translate this {source}{target}. Answer with the code only.\n\n{pair.source}"
