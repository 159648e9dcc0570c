"""Who else on a machine may read what a run writes: nobody, or its group if `access: group`.

New files get their mode from the umask. What other libraries make narrower than that, such as
safetensors' files and SQLite's, `share` opens to the group afterwards. Folders that were there
before keep their modes.
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


@contextmanager
def umask_of(access: Access) -> Iterator[None]:
    """The process's umask while a run or a command writes; the caller's again afterwards."""
    before = os.umask(_UMASKS[access])
    try:
        yield
    finally:
        os.umask(before)


def access_of(folder: Path) -> Access:
    """How `folder` was made: for commands that write into a run's folder without its config."""
    try:
        mode = folder.stat().st_mode
    except OSError:
        return "private"
    return "group" if mode & _OTHERS == 0o070 else "private"


def share(path: Path) -> None:
    """Give the group what the owner may do, with this file, or this folder and all below it.

    New files in these folders then belong to the folder's group. What is not ours is left as it
    is; links are not followed.
    """
    for folder, _, names in os.walk(path):
        _give(Path(folder), stat.S_ISGID)
        for name in names:
            _give(Path(folder, name))
    if path.is_file():
        _give(path)


def share_as_made(folder: Path) -> None:
    """`share` what is in `folder` if the umask has made that for the group."""
    if access_of(folder) == "group":
        share(folder)


def _give(path: Path, more: int = 0) -> None:
    with suppress(FileNotFoundError):  # removed meanwhile
        found = path.lstat()
        wanted = stat.S_IMODE(found.st_mode) | (found.st_mode & 0o700) >> 3 | more
        ours = found.st_uid == os.getuid() and not stat.S_ISLNK(found.st_mode)
        if ours and wanted != stat.S_IMODE(found.st_mode):
            path.chmod(wanted)


def private_folder(path: Path) -> Path:
    """`path`, made for this user alone, or there already as such.

    Raises:
        UserError: somebody else's, a link, open to others, or it cannot be made. Whoever made such
            a folder could read and exchange what is in it.
    """
    remedy = "set LWO_SCRATCH_DIR to a folder of your own"
    try:
        with suppress(FileExistsError):
            path.mkdir(mode=0o700)
        found = path.lstat()
    except OSError as error:
        raise UserError(f"{path} cannot be made: {error.strerror}; {remedy}") from None
    mode = stat.S_IMODE(found.st_mode)
    if not stat.S_ISDIR(found.st_mode):
        kind = "a link" if stat.S_ISLNK(found.st_mode) else "no folder"
        why = f"is {kind} of user {_name(found.st_uid)}"
    elif found.st_uid != os.getuid():
        why = f"belongs to user {_name(found.st_uid)}"
    elif mode & _OTHERS:
        why = f"is open to others (mode {mode:04o})"
        remedy = f"make it private (chmod 700 {path}) if all in it is yours, or {remedy}"
    else:
        return path
    raise UserError(f"{path} {why}, so nothing private can be kept there; {remedy}")


def scratch_folder() -> Path:
    """A folder on this machine for this user alone, at `scratch_path`, made if it is not there.

    Raises: UserError, as `private_folder`.
    """
    return private_folder(scratch_path())


def scratch_path() -> Path:
    """`lwo_dist-<uid>` in the temporary folder."""
    return Path(tempfile.gettempdir(), f"lwo_dist-{os.getuid()}")


def _name(uid: int) -> str:
    import pwd  # not on Windows, where the plugin is imported, too

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
