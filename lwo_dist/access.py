"""File modes: only the owner can read what a run writes, or also its group with `access: group`.

New files get their mode from the umask. Some libraries, such as safetensors and SQLite, create
files with a narrower mode; `share` opens those to the group afterwards. Existing folders keep their
mode.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from .errors import UserError

__all__ = [
    "Access",
    "access_of",
    "private_folder",
    "scratch_folder",
    "scratch_path",
    "share",
    "share_as_made",
    "umask_of",
]

Access = Literal["private", "group"]
_UMASKS: dict[Access, int] = {"private": 0o077, "group": 0o007}
_OTHERS = 0o077
_GROUP = 0o070


@contextmanager
def umask_of(access: Access) -> Iterator[None]:
    """Set the process's umask while a run or a command writes, and restore it afterwards."""
    before = os.umask(_UMASKS[access])
    try:
        yield
    finally:
        os.umask(before)


def access_of(folder: Path) -> Access:
    """The access with which `folder` was created, for commands without the run's config."""
    try:
        mode = folder.stat().st_mode
    except OSError:
        return "private"
    return "group" if mode & _OTHERS == _GROUP else "private"


def share(path: Path) -> None:
    """Give the group the owner's permissions on a file, or on a folder and everything below it.

    Folders become setgid, so that new files belong to the folder's group. Files of other users are
    left alone; symlinks are not followed.
    """
    for folder, _, names in os.walk(path):
        _give(Path(folder), _GROUP, stat.S_ISGID)
        for name in names:
            _give(Path(folder, name), _GROUP)
    if path.is_file():
        _give(path, _GROUP)


def share_as_made(folder: Path) -> None:
    """Open the contents of a folder that this process has just created to those whom the folder's
    own mode admits, as the umask says.
    """
    if access_of(folder) == "group":
        share(folder)
        return
    admitted = stat.S_IMODE(folder.stat().st_mode) & _OTHERS
    for path in folder.rglob("*"):
        _give(path, admitted)


def _give(path: Path, admitted: int, more: int = 0) -> None:
    """Give the owner's permissions also to others, but at most those in `admitted`."""
    with suppress(FileNotFoundError):  # removed meanwhile
        found = path.lstat()
        owner = found.st_mode & 0o700
        wanted = stat.S_IMODE(found.st_mode) | (owner >> 3 | owner >> 6) & admitted | more
        ours = found.st_uid == os.getuid() and not stat.S_ISLNK(found.st_mode)
        if ours and wanted != stat.S_IMODE(found.st_mode):
            path.chmod(wanted)


def private_folder(path: Path) -> Path:
    """Create `path` with mode 0700, or check that it is a private folder of this user.

    Raises:
        UserError: it belongs to another user, who could read and replace its contents; it is a
            symlink or not a folder, is open to others, or cannot be created.
    """
    remedy = "set LWO_SCRATCH_DIR to a folder of your own"
    try:
        with suppress(FileExistsError):
            path.mkdir(mode=0o700)
        found = path.lstat()
    except OSError as error:
        raise UserError(f"{path} cannot be created: {error.strerror}; {remedy}") from None
    mode = stat.S_IMODE(found.st_mode)
    if not stat.S_ISDIR(found.st_mode):
        kind = "a symlink" if stat.S_ISLNK(found.st_mode) else "not a folder"
        why = f"is {kind} (owner: {_name(found.st_uid)})"
    elif found.st_uid != os.getuid():
        why = f"belongs to user {_name(found.st_uid)}"
    elif mode & _OTHERS:
        why = f"is open to others (mode {mode:04o})"
        remedy = f"run chmod 700 {path} if all its contents are yours, or {remedy}"
    else:
        return path
    raise UserError(f"{path} {why}, so it is not safe for private files; {remedy}")


def scratch_folder() -> Path:
    """This user's private folder on this machine, `scratch_path`; created if missing.

    Raises: UserError, as `private_folder`.
    """
    return private_folder(scratch_path())


def scratch_path() -> Path:
    """`lwo_dist-<uid>` in the temporary folder."""
    return Path(tempfile.gettempdir(), f"lwo_dist-{os.getuid()}")


def _name(uid: int) -> str:
    import pwd  # missing on Windows, where the plugin can be imported too

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
