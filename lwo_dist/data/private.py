"""Pairs of texts from one's own code: its functions, and the fixes in its git history.

A pair is on the side of the file that it comes from, which is the same for every task. A function
that is in several files, but for its layout, is used once: on the held-out side if it is there.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from lwo_dist.config import DataConfig
from lwo_dist.redaction import without_credentials

from .functions import Function, find_functions, language_of, summary_of
from .pairs import Pair, Pairs, settle_pairs
from .source_tree import SourceFile, file_sides, find_files, read_text

__all__ = ["read_generation", "read_summarisation"]

_EMPTY_BODY = re.compile(r"(?:\{\s*\}|pass|\.\.\.|\s)*;?")


def read_generation(config: DataConfig, cache: Path) -> Pairs:
    """From signature and documentation, as written, to the body of a function.

    Raises:
        UserError: as `find_files` and `settle_pairs`; the extra `code` is not installed.
    """

    def pair(function: Function) -> tuple[str, str, str]:
        if not function.docstring:
            return "", "", "no docstring"
        reason = "empty body" if _EMPTY_BODY.fullmatch(function.body) else ""
        return function.head, function.body, reason

    return _read_functions(config, cache, pair)


def read_summarisation(config: DataConfig, cache: Path) -> Pairs:
    """From a function without its documentation to the first sentence of that (`summary_of`).

    Raises:
        UserError: as `find_files` and `settle_pairs`; the extra `code` is not installed.
    """

    def pair(function: Function) -> tuple[str, str, str]:
        if not function.docstring:
            return "", "", "no docstring"
        summary, reason = summary_of(function.docstring)
        return function.code, summary, reason

    return _read_functions(config, cache, pair)


def _read_functions(
    config: DataConfig, cache: Path, pair: Callable[[Function], tuple[str, str, str]]
) -> Pairs:
    """Args: pair: a function's source, target, and "" or why it is not used."""
    _, files, skips = find_files(config, cache)
    sides = file_sides(config, files, skips)
    skipped = Counter(skip.reason for skip in skips)

    def functions(file: SourceFile) -> list[Function]:
        if language_of(file.name) is None:
            skipped["no grammar"] += 1
            return []
        found, why = find_functions(read_text(file.path) or "", file.name)
        skipped.update(why)
        return found

    once, copies = sides.map(functions).without_equals(lambda found: " ".join(found.code.split()))
    skipped["duplicate function"] += copies

    def pairs(function: Function) -> list[Pair]:
        source, target, reason = pair(function)
        if reason:
            skipped[reason] += 1
            return []
        return [Pair(source, target, function.file, function.line, function.language)]

    shown = without_credentials(str(config.source))
    return settle_pairs(config, shown, once.map(pairs), skipped)
