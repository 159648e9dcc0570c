"""Runs git so that a hostile repository cannot run programs, and a silent server cannot block us.

A repository's configuration can name programs: a file system monitor, hooks, filters, transport
helpers. It is never used: git gets a private directory with our own configuration, which shares
only the index, the objects and the refs with the repository.
"""

from __future__ import annotations

import os
import re
import selectors
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

__all__ = ["Commit", "GitError", "Repository", "clone", "is_repository_url"]

_LOCAL_SECONDS = 120
_SILENT_SECONDS = 300
"""A clone that reports no progress for this long is cancelled."""
_CLONE_SECONDS = 3600
_TICK_SECONDS = 0.2

# Inherited in a git hook, and would point git at another repository.
_REDIRECTIONS = (
    "GIT_DIR",
    "GIT_WORK_TREE",
    "GIT_INDEX_FILE",
    "GIT_PREFIX",
    "GIT_COMMON_DIR",
    "GIT_OBJECT_DIRECTORY",
    "GIT_ALTERNATE_OBJECT_DIRECTORIES",
    "GIT_NAMESPACE",
)
_OPTIONS = {
    "core.fsmonitor": "false",
    "core.hooksPath": os.devnull,
    "submodule.recurse": "false",
    # Give up below 1 byte/s for 30 s.
    "http.lowSpeedLimit": "1",
    "http.lowSpeedTime": "30",
}
_SHARED = ("refs", "packed-refs", "info", "shallow")
_POINTER_BYTES = 4096
_REPOSITORY_URL = re.compile(
    r"[A-Za-z][A-Za-z0-9+.-]*://|[^\s/:@-][^\s/:@]*@(?:[^\s/:@\[]+|\[[\da-fA-F:]+\]):(?!//)"
)


class GitError(Exception):
    """Git failed, or the named repository does not exist; the message is one line."""


def is_repository_url(source: str) -> bool:
    """Whether git would clone `source` from a URL, or from `user@host:path`."""
    return _REPOSITORY_URL.match(source) is not None


def clone(source: str, folder: Path, *, history: bool = False) -> None:
    """Clone the newest commit of `source` into `folder`, which is empty or missing.

    Without submodules and Git LFS files.

    Args:
        source: a URL, or the folder of a repository.
        history: whether the commits before it come too.

    Raises:
        GitError: no such repository, no network, no access, or no progress for 5 minutes.
        FileNotFoundError: git is not installed.
    """
    local = source if not is_repository_url(source) else _path_of(source)
    if local is None:
        _clone(source, folder, history)
    else:
        repository = Repository.at(Path(local))
        repository._refuse_borrowed_objects()
        with repository._private_dir() as private:
            _clone(str(private), folder, history)


@dataclass(frozen=True)
class Commit:
    """A commit, and files that it changed against its parent: (name, blob before, blob after)."""

    id: str
    time: int
    """When it was committed, in seconds since 1970."""
    subject: str
    """The first paragraph of its message, on one line."""
    changes: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class Repository:
    """A repository on this machine. Only its index, objects and refs are read."""

    git_dir: Path
    """HEAD and index."""
    common_dir: Path
    """Objects and refs, shared by all work trees of the repository."""
    top: Path
    """The work tree; the repository itself if it is bare."""

    @classmethod
    def around(cls, folder: Path) -> Repository | None:
        """The repository whose work tree contains `folder`; None if there is none.

        Raises:
            GitError: a `.git` exists that does not lead to a repository.
        """
        inside = folder.resolve()
        top = next((path for path in (inside, *inside.parents) if (path / ".git").exists()), None)
        return None if top is None else cls.at(top)

    @classmethod
    def at(cls, folder: Path) -> Repository:
        """The repository with the work tree `folder`, or the bare one there. Raises: GitError."""
        folder = folder.resolve()
        entry = folder / ".git"
        git_dir = folder if not entry.exists() else entry
        if git_dir.is_file():
            git_dir = _pointed_at(git_dir, "gitdir:")
        common = git_dir / "commondir"
        common_dir = _pointed_at(common, "") if common.exists() else git_dir
        head = git_dir / "HEAD"
        is_head = head.is_file() and not head.is_symlink()
        if not is_head or not (common_dir / "objects").is_dir():
            raise GitError(f"{git_dir} is not a git repository")
        for entry in (git_dir / "index", *(common_dir / name for name in ("objects", *_SHARED))):
            if entry.is_symlink():
                raise GitError(f"{entry} is a symlink, which may lead anywhere")
        return cls(git_dir, common_dir, folder)

    def names(self, folder: Path, *, untracked: bool = False) -> list[str]:
        """The files that git tracks below `folder`, relative to it; sorted.

        The files may be missing, and parts of their paths may be symlinks. Paths that git itself
        never puts into an index are left out: with `..` or `.git` as a part.

        Args:
            untracked: also untracked files that are not ignored.

        Raises:
            GitError
            FileNotFoundError: git is not installed.
        """
        others = ("--others", "--exclude-standard") if untracked else ()
        listed = self._git("-C", str(folder.resolve()), "ls-files", "-z", "--cached", *others)
        names = {os.fsdecode(name) for name in listed.split(b"\0") if name}
        return sorted(name for name in names if not _leads_astray(name))

    def commit(self) -> str:
        """The commit checked out, followed by `-dirty` if tracked files differ from it.

        Raises:
            GitError
            FileNotFoundError: git is not installed.
        """
        where = ("-C", str(self.top))
        commit = self._git(*where, "rev-parse", "--verify", "HEAD").decode().strip()
        # To look for changes in a submodule, git would read the submodule's configuration.
        quick = ("--porcelain", "--untracked-files=no", "--ignore-submodules=dirty")
        return commit + ("-dirty" if self._git(*where, "status", *quick) else "")

    @property
    def is_shallow(self) -> bool:
        """Whether commits before some date are missing, as after `git clone --depth`."""
        shallow = self.common_dir / "shallow"
        return shallow.is_file() and shallow.stat().st_size > 0

    def commits(self, folder: Path, limit: int) -> list[Commit]:
        """The newest `limit` commits that changed files below `folder`, newest first, without
        merges. Their changes are the files that existed before and after, names relative to
        `folder`.

        Raises:
            GitError
            FileNotFoundError: git is not installed.
        """
        commits = []
        for header, files in self._log(folder, "--no-merges", f"--max-count={limit}"):
            id_, time_, subject = header.split(" ", 2)
            changes = []
            for raw, name in files:
                mode_before, mode_after, before, after, _ = raw.split(" ")
                # Neither new files nor links nor submodules.
                if mode_before.startswith(":100") and mode_after.startswith("100"):
                    changes.append((name, before, after))
            commits.append(Commit(id_, int(time_), subject, tuple(changes)))
        return commits

    def last_changes(self, folder: Path) -> dict[str, int]:
        """When each file below `folder` was last changed by a commit, in seconds since 1970, by its
        name relative to `folder`. A merge counts if it differs from all its parents.

        Raises:
            GitError
            FileNotFoundError: git is not installed.
        """
        changed: dict[str, int] = {}
        for header, files in self._log(folder, "-c"):
            time_ = int(header.split(" ", 2)[1])
            for _, name in files:
                changed[name] = max(time_, changed.get(name, time_))
        return changed

    def contents(self, blobs: Sequence[str], max_bytes: int) -> dict[str, bytes]:
        """What the `blobs` hold, but those that are larger than `max_bytes` or missing.

        Raises:
            GitError
            FileNotFoundError: git is not installed.
        """
        asked = "".join(f"{blob}\n" for blob in blobs).encode()
        checked = self._git("cat-file", "--batch-check", given=asked).decode().splitlines()
        known = [line.split(" ") for line in checked]
        fits = [line[0] for line in known if line[1] == "blob" and int(line[2]) <= max_bytes]
        asked = "".join(f"{blob}\n" for blob in fits).encode()
        out = self._git("cat-file", "--batch", given=asked) if fits else b""
        held, position = {}, 0
        for blob in fits:
            header_end = out.index(b"\n", position)
            size = int(out[position:header_end].split(b" ")[2])
            position = header_end + 1 + size + 1
            held[blob] = out[header_end + 1 : position - 1]
        return held

    def _log(self, folder: Path, *options: str) -> Iterator[tuple[str, list[tuple[str, str]]]]:
        """Of each commit "id time subject", and its changed files as git's raw format has them."""
        # What the user's own configuration may add to a log.
        plain = ("--no-show-signature", "--no-ext-diff", "--no-textconv", "--no-color")
        shape = ("--raw", "-z", "--no-abbrev", "--no-renames", "--relative", "--encoding=UTF-8")
        arguments = ("log", *plain, *shape, *options, "--format=%H %ct %s", "--", ".")
        out = self._git("-C", str(folder.resolve()), *arguments, limit_s=_CLONE_SECONDS)
        words = iter(out.split(b"\0"))
        header, files = "", list[tuple[str, str]]()
        for word in words:
            word = word.lstrip(b"\n")
            if word.startswith(b":"):
                files.append((word.decode("ascii"), os.fsdecode(next(words))))
            elif word:
                if header:
                    yield header, files
                header, files = word.decode("utf-8", "replace"), []
        if header:
            yield header, files

    def _git(
        self, *arguments: str, given: bytes | None = None, limit_s: float = _LOCAL_SECONDS
    ) -> bytes:
        """What git writes. `given` is its input."""
        with self._private_dir() as private:
            environment = {
                "GIT_DIR": str(private),
                "GIT_WORK_TREE": str(self.top),
                "GIT_INDEX_FILE": str(self.git_dir / "index"),
                "GIT_OPTIONAL_LOCKS": "0",
                "GIT_NO_LAZY_FETCH": "1",
                "GIT_ALLOW_PROTOCOL": "none",
            }
            try:
                return _run(
                    arguments, environment, silent_s=_LOCAL_SECONDS, limit_s=limit_s, given=given
                )
            except GitError as error:
                raise GitError(str(error).replace(str(private), str(self.git_dir))) from None

    @contextmanager
    def _private_dir(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="lwo-dist-git-") as name:
            private = Path(name)
            (private / "HEAD").write_bytes(_beginning(self.git_dir / "HEAD"))
            (private / "config").write_text(
                "[core]\nrepositoryformatversion = 1\nbare = false\n"
                f"[extensions]\nobjectFormat = {self._object_format()}\n"
            )
            for shared in _SHARED:
                if (self.common_dir / shared).exists():
                    (private / shared).symlink_to(self.common_dir / shared)
            # Some commands write objects: an empty tree, for an index that names folders.
            (private / "objects" / "info").mkdir(parents=True)
            (private / "objects" / "info" / "alternates").write_text("../shared\n")
            (private / "shared").symlink_to(self.common_dir / "objects")
            for part in self.git_dir.glob("sharedindex.*"):
                (private / part.name).symlink_to(part)
            yield private

    def _refuse_borrowed_objects(self) -> None:
        """Raise GitError if some objects are those of another repository, which may be private; a
        clone would hold them.
        """
        objects = self.common_dir / "objects"
        borrows = (objects / "info" / "alternates").exists()
        is_inside = objects.resolve().is_relative_to(self.top)
        entries = (
            Path(folder) / name
            for folder, folders, files in os.walk(objects)
            for name in (*folders, *files)
        )
        if borrows or not is_inside or any(entry.is_symlink() for entry in entries):
            raise GitError(
                f"{objects} has objects of another repository; read a folder with its files instead"
            )

    def _object_format(self) -> str:
        config = self.common_dir / "config"
        if config.is_symlink() or not config.is_file():
            return "sha1"
        asked = ("--file", str(config), "--no-includes", "--default", "sha1")
        known = _run(
            ["config", *asked, "--get", "extensions.objectformat"],
            {"GIT_DIR": os.devnull},
            silent_s=_LOCAL_SECONDS,
            limit_s=_LOCAL_SECONDS,
        )
        return "sha256" if known.strip().lower() == b"sha256" else "sha1"


def _clone(source: str, folder: Path, history: bool) -> None:
    ssh = "ssh -o BatchMode=yes -o ConnectTimeout=30 -o ServerAliveInterval=30"
    environment = {
        "GIT_SSH_COMMAND": os.environ.get("GIT_SSH_COMMAND", ssh),
        "GIT_ALLOW_PROTOCOL": "https:http:ssh:git:file",
        # No prompt: nobody could answer it.
        "GIT_TERMINAL_PROMPT": "0",
        "GIT_LFS_SKIP_SMUDGE": "1",
    }
    depth = "--single-branch" if history else "--depth=1"
    options = ("--progress", depth, "--no-tags", "--no-local", "--no-recurse-submodules")
    _run(
        ["clone", *options, "--template=", "--", source, str(folder)],
        environment,
        silent_s=_SILENT_SECONDS,
        limit_s=_CLONE_SECONDS,
    )


def _path_of(url: str) -> str | None:
    """The folder of a file URL; None for other URLs."""
    parts = urlsplit(url)
    return unquote(parts.path) if parts.scheme == "file" else None


def _leads_astray(name: str) -> bool:
    path = f"/{name.lower()}/"
    return "/../" in path or "/.git/" in path or "//" in path


def _beginning(file: Path) -> bytes:
    """What a small file holds; OSError if it is a link, which may lead anywhere."""
    with os.fdopen(os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as opened:
        return opened.read(_POINTER_BYTES)


def _pointed_at(file: Path, prefix: str) -> Path:
    """The folder that a text file such as `.git` points to."""
    try:
        text = _beginning(file) if file.is_file() else b""
        name = os.fsdecode(text).strip()
        pointed = name.removeprefix(prefix).strip()
        target = (file.parent / pointed).resolve()
        is_there = target.is_dir()
    except OSError as error:
        raise GitError(f"{file}: {error.strerror}") from None
    except (RuntimeError, ValueError):  # a loop of symlinks; a null byte
        is_there = False
    if not name.startswith(prefix) or not pointed or not is_there:
        raise GitError(f"{file} does not point to a git repository")
    return target


def _run(
    arguments: Sequence[str],
    environment: Mapping[str, str],
    *,
    silent_s: float,
    limit_s: float,
    given: bytes | None = None,
) -> bytes:
    """What git writes to stdout. Raises: GitError, FileNotFoundError."""
    inherited = {key: value for key, value in os.environ.items() if key not in _REDIRECTIONS}
    options = [word for key, value in _OPTIONS.items() for word in ("-c", f"{key}={value}")]
    with tempfile.TemporaryFile() as file:  # a pipe could fill up while git waits to write
        file.write(given or b"")
        file.seek(0)
        process = subprocess.Popen(
            ["git", *options, *arguments],
            # English messages, as parsed by `_reason`.
            env={**inherited, "LC_ALL": "C", **environment},
            stdin=file,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # A process group, so that ssh and git's helpers can be killed too.
            start_new_session=True,
        )
    with process:
        try:
            out, err = _read(process, silent_s, limit_s)
        except BaseException:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
    if process.returncode:
        raise GitError(_reason(err))
    return out


def _read(process: subprocess.Popen[bytes], silent_s: float, limit_s: float) -> tuple[bytes, bytes]:
    """All that git writes to stdout and stderr."""
    assert process.stdout is not None and process.stderr is not None
    read: dict[int, list[bytes]] = {process.stdout.fileno(): [], process.stderr.fileno(): []}
    started = heard = time.monotonic()
    with selectors.DefaultSelector() as selector:
        for descriptor in read:
            selector.register(descriptor, selectors.EVENT_READ)
        while selector.get_map():
            # A background process of ssh may keep the pipes open.
            ended = process.poll() is not None
            ready = selector.select(0 if ended else _TICK_SECONDS)
            for key, _ in ready:
                if data := os.read(key.fd, 2**16):
                    read[key.fd].append(data)
                else:
                    selector.unregister(key.fd)
            now = time.monotonic()
            heard = now if ready else heard
            if ended and not ready:
                break
            if now - heard > silent_s:
                raise GitError(f"no progress for {silent_s:g} s")
            if now - started > limit_s:
                raise GitError(f"not finished after {limit_s:g} s")
    out, err = (b"".join(parts) for parts in read.values())
    return out, err


def _reason(stderr: bytes) -> str:
    lines = [line for line in stderr.decode("utf-8", "replace").splitlines() if line.strip()]
    told = next(
        (line for line in lines if line.startswith(("fatal:", "error:"))),
        lines[-1] if lines else "no message",
    )
    return " ".join(told.removeprefix("fatal:").removeprefix("error:").split())
