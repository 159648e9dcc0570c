"""Functions before and after the fixes in a git history.

A commit is a fix if its subject has a word for one (Ray et al., 2014, "A large scale study of
programming languages and code quality in GitHub", after Mockus and Votta, 2000). Commits that
change more than five source files are left out, as in Tufano et al. (2019, "An empirical study on
learning bug-fixing patches in the wild", arXiv:1812.08693): their changes are rarely all part of
the fix. So are merges, and functions that only moved, or changed in layout and comments.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from lwo_dist.config import DataConfig
from lwo_dist.errors import UserError
from lwo_dist.redaction import without_credentials

from .functions import Function, code_tokens, find_functions, language_of
from .repository import read_commits, read_contents
from .source_tree import refused_name, usable_text

__all__ = ["MOST_FILES", "Fix", "is_fix", "read_fixes"]

MOST_FILES = 5
"""Source files that a fix may change."""

_FIX = re.compile(
    r"\b(?:(?:bug|hot)?[ -]?fix(?:e[sd]|ing)?|(?:bug|defect|error|fault|flaw|issue|mistake)s?"
    r"|incorrect(?:ly)?)\b",
    re.IGNORECASE,
)
_FILES_AT_ONCE = 300


@dataclass(frozen=True)
class Fix:
    """One function that a fix changed."""

    before: Function
    after: Function
    commit: str
    time: int
    """When it was committed, in seconds since 1970."""


def is_fix(subject: str) -> bool:
    """Whether the subject of a commit says that it fixes something."""
    return _FIX.search(subject) is not None


def read_fixes(config: DataConfig, root: Path, task: str) -> tuple[list[Fix], Counter[str]]:
    """The functions that fixes changed among the newest `max_commits` commits, newest first, and
    why commits, changed files and functions are skipped (reason -> number).

    Args:
        root: the folder of `config.source`, or its clone.
        task: what the fixes are for, for messages.

    Raises:
        UserError: there is no git history, it is cut short or has one commit, git is missing or
            failed, or the extra `code` is not installed.
    """
    commits = read_commits(root, config.max_commits, task)
    if len(commits) < 2:
        raise UserError(
            f"data.source = {without_credentials(str(config.source))} has {len(commits) or 'no'}"
            f" commit{'' if len(commits) == 1 else 's'} with source files, and task = {task} needs"
            " a git history of fixes; give a repository with its history"
        )
    skipped: Counter[str] = Counter()
    changes = []
    for commit in commits:
        known = [change for change in commit.changes if language_of(change[0])]
        if not is_fix(commit.subject):
            skipped["not a fix"] += 1
        elif len(known) > MOST_FILES:
            skipped["large commit"] += 1
        else:
            skipped["no grammar"] += len(commit.changes) - len(known)
            changes += [(commit, *change) for change in known]
    fixes: list[Fix] = []
    for start in range(0, len(changes), _FILES_AT_ONCE):
        part = changes[start : start + _FILES_AT_ONCE]
        blobs = list(dict.fromkeys(blob for *_, before, after in part for blob in (before, after)))
        held = read_contents(root, blobs, config.max_file_bytes)
        versions = _Versions(config, held)
        for commit, name, before, after in part:
            found = [versions(name, blob) for blob in (before, after)]
            reason = next((why for _, why in found if why), "")
            if reason:
                skipped[reason] += 1
                continue
            pairs = _changed(found[0][0], found[1][0])
            fixes += [Fix(old, new, commit.id, commit.time) for old, new in pairs]
    return fixes, +skipped


class _Versions:
    """The functions of a version of a file, or why it is not used."""

    def __init__(self, config: DataConfig, held: dict[str, bytes]):
        self._config = config
        self._held = held
        self._read = lru_cache(maxsize=256)(self._read_version)

    def __call__(self, name: str, blob: str) -> tuple[list[Function], str]:
        return self._read(name, blob)

    def _read_version(self, name: str, blob: str) -> tuple[list[Function], str]:
        if reason := refused_name(name, self._config):
            return [], reason
        if blob not in self._held:
            return [], "huge or missing"
        text, reason, _ = usable_text(self._held[blob], name)
        # Arrow cannot store a name that is not UTF-8.
        printable = name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        return ([], reason) if reason else (find_functions(text, printable)[0], "")


def _changed(before: list[Function], after: list[Function]) -> Iterator[tuple[Function, Function]]:
    """The functions with other tokens than before. They are known by their names; where several
    share one, as overloads do, by their signatures too.
    """
    new_by_name, new_by_signature = _index(after)
    old_by_name, old_by_signature = _index(before)
    for old in before:
        name, signature = old.name, (old.name, old.signature)
        new = None
        if len(old_by_name[name]) == len(new_by_name.get(name, ())) == 1:
            [new] = new_by_name[name]
        elif len(old_by_signature[signature]) == len(new_by_signature.get(signature, ())) == 1:
            [new] = new_by_signature[signature]
        if new is not None and old.code != new.code and _tokens(old) != _tokens(new):
            yield old, new


def _index(
    functions: list[Function],
) -> tuple[dict[str, list[Function]], dict[tuple[str, str], list[Function]]]:
    by_name: dict[str, list[Function]] = {}
    by_signature: dict[tuple[str, str], list[Function]] = {}
    for function in functions:
        by_name.setdefault(function.name, []).append(function)
        by_signature.setdefault((function.name, function.signature), []).append(function)
    return by_name, by_signature


def _tokens(function: Function) -> list[str]:
    return code_tokens(function.code, function.language)
