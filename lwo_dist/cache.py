"""Folders that are made once and then only read: whole or not there at all."""

from __future__ import annotations

import contextlib
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from lwo_dist.access import share_as_made
from lwo_dist.config import Config
from lwo_dist.errors import UserError
from lwo_dist.storage import storage_folder

__all__ = ["build_once", "cache_folder"]

_PREFIX = ".building-"
_ABANDONED_SECONDS = 24 * 3600


def cache_folder(config: Config) -> Path:
    """Where clones and tokenised data lie: `data.cache`, else `<storage>/cache`. All workers must
    see it.
    """
    return (
        Path(config.data.cache or storage_folder(config.storage) / "cache").expanduser().absolute()
    )


def build_once(target: Path, build: Callable[[Path], None]) -> Path:
    """Return `target`, after `build(folder)` filled it if it was not there yet.

    `build` gets an empty folder beside the target, which takes the target's name when it is whole,
    and is removed on any error. A killed process leaves it behind, under a name that nothing reads,
    until a later build clears it away. Of two processes that build the same target at once, one
    wins and both return it.

    Raises:
        UserError: the folder cannot be written. What `build` raises passes through, but for an
            OSError.
    """
    if target.is_dir():
        return target
    building = target.parent / f"{_PREFIX}{uuid.uuid4().hex}"
    try:
        building.mkdir(parents=True)
        _clear_abandoned(target.parent)
        build(building)
        share_as_made(building)
        try:
            building.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    except OSError as error:
        raise UserError(
            f"cannot write {target}: {error.strerror or error}; make room or set data.cache to"
            " another folder"
        ) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return target


def _clear_abandoned(folder: Path) -> None:
    for path in folder.glob(f"{_PREFIX}*"):
        with contextlib.suppress(FileNotFoundError):  # its builder, or another cleaner, was quicker
            if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(path, ignore_errors=True)
