"""Pairs of texts from one's own code: its functions, and the fixes in its git history.

A pair is on the side of the file that it comes from, which is the same for every task. A function
that is in several files, even in another layout, is used once: on the held-out side if it is there.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

from lwo_dist.config import DataConfig
from lwo_dist.errors import UserError
from lwo_dist.redaction import without_credentials

from .functions import Function, find_functions, language_of, summary_of
from .history import Fix, read_fixes
from .pairs import Pair, Pairs, settle_pairs
from .source_tree import SourceFile, file_sides, find_files, source_text
from .split import Side, Sides, side_of_hash, sides_by_time

__all__ = ["read_defect", "read_generation", "read_repair", "read_summarisation"]

_EMPTY_BODY = re.compile(r"(?:\}|;|pass|\.\.\.|\s)*")


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


def read_repair(config: DataConfig, cache: Path) -> Pairs:
    """From a function before a fix to the same after it, both without their documentation.

    Raises:
        UserError: as `find_files`, `read_fixes` and `settle_pairs`.
    """
    sides, skipped = _read_fixes(config, cache, "repair")
    once, copies = sides.without_equals(lambda fix: _layout_free(fix.before))
    skipped["duplicate function"] += copies
    pairs = once.map(lambda fix: [_pair(fix.before, fix.before.code, fix.after.code)])
    return settle_pairs(config, without_credentials(str(config.source)), pairs, skipped)


def read_defect(config: DataConfig, cache: Path) -> Pairs:
    """From a function to "yes" if a fix changed it, or to "no" if it is what the fix made of it.

    So there are about as many of each. A function that one fix made and a later one changed is
    neither, and is left out.

    Raises:
        UserError: as `find_files`, `read_fixes` and `settle_pairs`.
    """
    sides, skipped = _read_fixes(config, cache, "defect")
    labelled = sides.map(lambda fix: [(fix.before, "yes"), (fix.after, "no")])
    answers: dict[str, set[str]] = {}
    for function, answer in (*labelled.train, *labelled.validation, *labelled.held_out):
        answers.setdefault(_layout_free(function), set()).add(answer)

    def decided(item: tuple[Function, str]) -> list[tuple[Function, str]]:
        if len(answers[_layout_free(item[0])]) == 1:
            return [item]
        skipped["function both before and after a fix"] += 1
        return []

    once, copies = labelled.map(decided).without_equals(lambda item: _layout_free(item[0]))
    skipped["duplicate function"] += copies
    pairs = once.map(lambda item: [_pair(item[0], item[0].code, item[1])])
    return settle_pairs(config, without_credentials(str(config.source)), pairs, skipped)


def _read_fixes(config: DataConfig, cache: Path, task: str) -> tuple[Sides[Fix], Counter[str]]:
    """The fixes by side: of the file as it is now, or by the hash of its name if it is no more; by
    commit with `data.split` time.
    """
    root, files, skips = find_files(config, cache, history=True)
    fixes, skipped = read_fixes(config, root, task)
    if not fixes:
        shown = ", ".join(f"{n} {reason}" for reason, n in sorted(skipped.items()))
        raise UserError(
            f"data.source = {without_credentials(str(config.source))}: no function was changed by a"
            f" fix among the newest {config.max_commits} commits (skipped: {shown or 'none'}); give"
            " a repository with fixes, or raise data.max_commits"
        )
    if config.split == "time":
        commits: dict[str, list[Fix]] = {}
        for fix in fixes:
            commits.setdefault(fix.commit, []).append(fix)
        by_commit = sides_by_time(list(commits), lambda id_: commits[id_][0].time, str, config)
        return by_commit.map(commits.__getitem__), skipped
    by_file = file_sides(config, files, skips)
    known: dict[str, Side] = dict.fromkeys((file.name for file in by_file.train), "train")
    known |= dict.fromkeys((file.name for file in by_file.validation), "validation")
    known |= dict.fromkeys((file.name for file in by_file.held_out), "held_out")

    def side(fix: Fix) -> Side:
        name = fix.after.file
        return known.get(name) or side_of_hash(sha256(name.encode()).hexdigest(), config)

    return Sides.of(fixes, side), skipped


def _pair(function: Function, source: str, target: str) -> Pair:
    return Pair(source, target, function.file, function.line, function.language)


def _layout_free(function: Function) -> str:
    return " ".join(function.code.split())


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
        found, why = find_functions(source_text(file), file.name)
        skipped.update(why)
        return found

    once, copies = sides.map(functions).without_equals(_layout_free)
    skipped["duplicate function"] += copies

    def pairs(function: Function) -> list[Pair]:
        source, target, reason = pair(function)
        if reason:
            skipped[reason] += 1
            return []
        return [_pair(function, source, target)]

    shown = without_credentials(str(config.source))
    return settle_pairs(config, shown, once.map(pairs), skipped)
