"""The two things asked of git: which files it tracks, and a clone of a URL."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
from pathlib import Path

from lwo_dist.errors import UserError
from lwo_dist.redaction import without_credentials

from .cache import build_once

__all__ = ["clone_repository", "is_repository_url", "tracked_files"]

# Set while git runs a hook; they would point git at the repository of the hook instead of ours.
_HOOK_VARIABLES = (
    "GIT_DIR",
    "GIT_WORK_TREE",
    "GIT_INDEX_FILE",
    "GIT_PREFIX",
    "GIT_COMMON_DIR",
    "GIT_OBJECT_DIRECTORY",
)


def is_repository_url(source: str) -> bool:
    """Whether `source` has to be cloned: a URL, `user@host:path`, or the folder of a bare
    repository, `*.git`.
    """
    if re.match(r"(https?|ssh|git|file)://", source) or re.match(r"[\w.-]+@[\w.-]+:(?!//)", source):
        return True
    return source.endswith(".git") and (Path(source) / "HEAD").is_file()


def tracked_files(folder: Path) -> list[str] | None:
    """Paths, relative to `folder`, that git tracks below it; None if it is in no work tree.

    Raises:
        UserError: the folder is in a work tree, but git is missing or refuses.
    """
    inside = folder.resolve()
    if not any((parent / ".git").exists() for parent in (inside, *inside.parents)):
        return None
    listed = _git(
        "-C",
        str(inside),
        "ls-files",
        "-z",
        "--cached",
        source=str(folder),
        instead="data.use_git=false",
    )
    if listed.returncode:
        raise UserError(
            f"data.source = {folder}: git ls-files failed: {_reason(listed.stderr)}; "
            "mend it, or read all files with data.use_git=false"
        )
    return [os.fsdecode(name) for name in listed.stdout.split(b"\0") if name]


def clone_repository(url: str, cache: Path) -> Path:
    """Clone the newest commit of `url` into `cache`, or return the clone that is there. Nothing
    half-made is left.

    Raises:
        UserError: git is missing, the clone failed (no network, no such repository, no access), or
            `cache` cannot be written.
    """
    name = re.sub(
        r"[^\w.-]+",
        "-",
        without_credentials(url).removesuffix(".git").rstrip("/").rpartition("/")[2],
    )
    target = cache / "sources" / f"{name[-50:]}-{hashlib.sha256(url.encode()).hexdigest()[:16]}"
    shown = without_credentials(url)

    def clone(folder: Path) -> None:
        # Not a byte for 30 s: give up, rather than keep all workers waiting.
        slow = ("-c", "http.lowSpeedLimit=1", "-c", "http.lowSpeedTime=30")
        command = (*slow, "clone", "--quiet", "--depth", "1", "--no-tags", "--", url, str(folder))
        cloned = _git(*command, source=shown, instead="a folder")
        if cloned.returncode:
            raise UserError(
                f"data.source = {shown}: git clone failed:"
                f" {without_credentials(_reason(cloned.stderr))}; check the URL, the network and"
                " your access, or give a folder"
            )

    return build_once(target, clone)


def _git(*arguments: str, source: str, instead: str) -> subprocess.CompletedProcess[bytes]:
    environment = {key: value for key, value in os.environ.items() if key not in _HOOK_VARIABLES}
    environment.setdefault("GIT_SSH_COMMAND", "ssh -o BatchMode=yes -o ConnectTimeout=30")
    # No question that nobody can answer, messages in the language of ours, no download of large
    # binary files.
    environment |= {"GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C", "GIT_LFS_SKIP_SMUDGE": "1"}
    try:
        return subprocess.run(
            ["git", *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
        )
    except FileNotFoundError:
        raise UserError(
            f"data.source = {source} needs git, which is not installed; install git, or use"
            f" {instead}"
        ) from None


def _reason(stderr: bytes) -> str:
    lines = [line for line in stderr.decode("utf-8", "replace").splitlines() if line.strip()]
    told = next(
        (line for line in lines if line.startswith(("fatal:", "error:"))),
        lines[-1] if lines else "no message",
    )
    return " ".join(told.removeprefix("fatal:").removeprefix("error:").split())
