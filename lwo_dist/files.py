"""Local files: names confined to a folder, and atomic, durable writes."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path

from .errors import DamagedError, UserError

__all__ = [
    "absolute",
    "absolute_uri",
    "contained",
    "create_whole",
    "entries_of",
    "is_plain",
    "is_regular",
    "make_folder",
    "put_in_place",
    "refresh",
    "refuse_existing",
    "sync",
    "temporary_beside",
    "walk",
    "write_new",
    "write_whole",
]

_MAX_NAME_LENGTH = 1024
_MAX_NAME_PARTS = 16
_MAX_PART_BYTES = 255  # what file systems allow
# sqlite:///x.db is relative, sqlite:////x.db is not; so are file:x and file:///x.
_LOCAL_URI = re.compile(
    r"(?P<scheme>sqlite(?:\+\w+)?:///|file:(?://(?=/))?)?(?P<path>[^:]*|:memory:)"
)
_NO_FOLDERS = ("databricks", "databricks-uc", "uc")  # names that MLflow knows
_NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK)


def absolute(path: str) -> str:
    """A local path that means the same in any working folder."""
    return str(Path(path).expanduser().absolute())


def absolute_uri(uri: str) -> str:
    """A local folder, `file:` or `sqlite:` URI with an absolute path; any other URI as it is.

    >>> absolute_uri("sqlite:////x.db"), absolute_uri("https://host/"), absolute_uri("databricks")
    ('sqlite:////x.db', 'https://host/', 'databricks')
    """
    found = _LOCAL_URI.fullmatch(uri)
    if found is None:
        return uri
    scheme, path = found.group("scheme") or "", found.group("path")
    if path in ("", ":memory:") or (not scheme and path in _NO_FOLDERS):
        return uri
    return scheme + absolute(path)


def is_plain(name: str) -> bool:
    """Whether `name` is a printable relative path, with `/`, that stays in its folder.

    >>> is_plain("layers/embed.000003.safetensors"), is_plain("../run.json"), is_plain("/run.json")
    (True, False, False)
    """
    parts = name.split("/")
    return (
        len(name) <= _MAX_NAME_LENGTH
        and len(parts) <= _MAX_NAME_PARTS
        and name.isprintable()
        and "\\" not in name
        and all(part not in ("", ".", "..") for part in parts)
        and all(len(part.encode()) <= _MAX_PART_BYTES for part in parts)
    )


def contained(folder: Path, name: str, *, may_be_link: bool = False) -> Path:
    """The path of `name` in `folder`; it need not exist.

    Args:
        may_be_link: accept a symlink as the last part, in order to remove it.

    Raises:
        DamagedError: `name` is not plain, or a part of it is a symlink.
    """
    if not is_plain(name):
        raise DamagedError(f"{name[:100]!r} is not a valid name in a run's folder")
    path = folder
    parts = name.split("/")
    for number, part in enumerate(parts, 1):
        path = path / part
        if path.is_symlink() and not (may_be_link and number == len(parts)):
            where = path.relative_to(folder)
            raise DamagedError(f"{where} is a symlink; symlinks are not followed")
    return path


def walk(folder: Path) -> Iterator[Path]:
    """Everything below a folder. Symlinks are listed but not followed."""
    waiting = [folder]
    while waiting:
        for entry in entries_of(waiting.pop()):
            path = Path(entry.path)
            yield path
            is_shallow = len(path.relative_to(folder).parts) < _MAX_NAME_PARTS
            if is_shallow and entry.is_dir(follow_symlinks=False):
                waiting.append(path)


def entries_of(folder: Path) -> list[os.DirEntry[str]]:
    """The entries of a folder; none if it does not exist."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return []


def is_regular(path: Path) -> bool:
    """Whether `path` is a file and not a symlink."""
    return path.is_file() and not path.is_symlink()


def write_new(path: Path, data: bytes) -> None:
    """Create a file. Its bytes are on disk when this returns; its name is after a `sync` of the
    folder.

    Raises:
        FileExistsError: there is one of that name.
        OSError
    """
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_whole(path: Path, data: bytes) -> None:
    """Write a local file atomically; it is on disk when this returns.

    Raises:
        OSError: nothing was written; an older file of that name is unchanged.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # left by an interrupted write, or a planted symlink
        write_new(temporary, data)
        temporary.rename(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def temporary_beside(path: Path) -> Path:
    """A name in the same folder that no other process uses, also none of another machine."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def create_whole(path: Path, data: bytes) -> bool:
    """`write_whole` for a file that must not exist yet; False if it does."""
    temporary = temporary_beside(path)
    try:
        write_new(temporary, data)
        try:
            os.link(temporary, path)
        except FileExistsError:
            # NFS may repeat a request that succeeded: then the link is ours.
            if temporary.stat().st_nlink == 1:
                return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            try:
                write_new(path, data)
            except FileExistsError:
                return False
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)
    return True


def make_folder(path: Path) -> None:
    """Create a folder and its parents; their entries are on disk when this returns.

    Raises:
        OSError
    """
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)


def put_in_place(folder: Path, target: Path) -> None:
    """Rename `folder` to `target` once it is all on disk, and then remove the old `target`.

    Raises:
        OSError
    """
    for path in sorted(folder.rglob("*"), reverse=True):
        sync(path)
    sync(folder)
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    folder.rename(target)
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def refresh(folder: Path) -> None:
    """Ask the server of a network file system for the folder's current names.

    An NFS client that found a name missing assumes so for up to a minute, unless the folder is
    opened.

    Raises:
        OSError
    """
    os.close(os.open(folder, os.O_RDONLY | os.O_DIRECTORY))


def refuse_existing(target: Path, *, overwrite: bool) -> None:
    """Refuse to write a model to a folder with content.

    Args:
        overwrite: accept a folder with a model, to replace it.

    Raises:
        UserError
    """
    if not target.exists() or (target.is_dir() and not entries_of(target)):
        return
    if not any((target / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise UserError(f"--to = {target} exists and is not a model; give a new folder")
    if not overwrite:
        raise UserError(
            f"--to = {target} exists; give a new folder, or --overwrite to replace the model there"
        )


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's entries, are on disk.

    Raises:
        OSError: a file could not be written.
    """
    opened = os.open(path, os.O_RDONLY)
    try:
        # Some network file systems refuse fsync on folders but keep the order.
        with suppress(OSError) if path.is_dir() else nullcontext():
            os.fsync(opened)
    finally:
        os.close(opened)
