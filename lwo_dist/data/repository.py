"""The uses of git: listing the tracked files, cloning a URL, and the history of a repository."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from lwo_dist.cache import build_once
from lwo_dist.config.data import NO_PASSWORD
from lwo_dist.errors import UserError
from lwo_dist.git import Commit, GitError, Repository, clone
from lwo_dist.redaction import holds_password, redact, refuse_password, without_credentials

__all__ = ["clone_repository", "last_changes", "read_commits", "read_contents", "tracked_files"]

T = TypeVar("T")


def tracked_files(folder: Path) -> list[str] | None:
    """Paths that git tracks below `folder`, relative to it; None outside a work tree.

    Raises:
        UserError: the folder is in a work tree, but git is missing or fails.
    """

    def ask() -> list[str] | None:
        repository = Repository.around(folder)
        return None if repository is None else repository.names(folder)

    try:
        return _needs_git(ask, str(folder), instead="data.use_git=false")
    except GitError as error:
        raise UserError(
            f"data.source = {folder}: git ls-files failed: {error}; fix it, or read all files with"
            " data.use_git=false"
        ) from None


def last_changes(folder: Path) -> dict[str, int]:
    """When a commit last changed each file below `folder`, in seconds since 1970.

    Raises:
        UserError: there is no git history, it is cut short, or git is missing or fails.
    """
    need, instead = "data.split = time", "data.split=hash"
    return _ask_history(folder, need, instead, lambda found: found.last_changes(folder))


def read_commits(folder: Path, limit: int, task: str) -> list[Commit]:
    """The newest `limit` commits below `folder`, without merges.

    Args:
        task: what they are for, for the message.

    Raises:
        UserError: there is no git history, it is cut short, or git is missing or fails.
    """
    need, instead = f"task = {task}", "another task or data.format"
    return _ask_history(folder, need, instead, lambda found: found.commits(folder, limit))


def read_contents(folder: Path, blobs: Sequence[str], max_bytes: int) -> dict[str, bytes]:
    """What blobs of the repository around `folder` hold, but large and missing ones. Raises:
    UserError.
    """
    need, instead = "what commits changed", "another source"
    return _ask_history(folder, need, instead, lambda found: found.contents(blobs, max_bytes))


def _ask_history(folder: Path, need: str, instead: str, ask: Callable[[Repository], T]) -> T:
    def find() -> T:
        repository = Repository.around(folder)
        if repository is None:
            raise UserError(
                f"data.source = {folder} is not in a git repository, and {need} needs a git"
                f" history; give a repository, or use {instead}"
            )
        if repository.is_shallow:
            raise UserError(
                f"data.source = {folder} is a shallow clone, and {need} needs the whole history;"
                f" run `git fetch --unshallow` there, or use {instead}"
            )
        return ask(repository)

    try:
        return _needs_git(find, str(folder), instead)
    except GitError as error:
        raise UserError(
            f"data.source = {folder}: git log failed: {error}; {need} needs a git history: mend the"
            f" repository, or use {instead}"
        ) from None


def clone_repository(source: str, cache: Path, *, history: bool = False) -> Path:
    """Clone the newest commit of `source` into `cache`, or return the existing clone. An incomplete
    clone is removed.

    Args:
        source: a URL, or the folder of a bare repository.
        history: whether the commits before it come too, which makes another clone.

    Raises:
        UserError: the URL holds a password, git is missing, the clone failed (no network, no such
            repository, no access, no progress), or `cache` cannot be written.
    """
    refuse_password("data.source", source, NO_PASSWORD)
    _scrub(cache / "sources")
    name = re.sub(r"[^\w.-]+", "-", source.removesuffix(".git").rstrip("/").rpartition("/")[2])
    hashed = hashlib.sha256(source.encode()).hexdigest()[:16]
    target = cache / "sources" / f"{name[-50:]}-{hashed}{'-history' if history else ''}"

    def build(folder: Path) -> None:
        try:
            _needs_git(
                lambda: clone(source, folder, history=history),
                without_credentials(source),
                "a folder",
            )
        except GitError as error:
            raise UserError(
                f"data.source = {without_credentials(source)}: git clone failed:"
                f" {redact(str(error))}; check the URL, the network and your access, or give a"
                " folder"
            ) from None

    return build_once(target, build)


def _scrub(sources: Path) -> None:
    """Remove passwords from clones that earlier versions made from URLs with one."""
    for config in sources.glob("*/.git/config"):
        with suppress(OSError, UnicodeDecodeError):
            lines = config.read_text().splitlines(keepends=True)
            clean = [without_credentials(line) if holds_password(line) else line for line in lines]
            if clean != lines:
                config.write_text("".join(clean))


def _needs_git(ask: Callable[[], T], source: str, instead: str) -> T:
    try:
        return ask()
    except FileNotFoundError:
        raise UserError(
            f"data.source = {source} needs git, which is not installed; install git, or use"
            f" {instead}"
        ) from None
