"""Select what a job takes from its working directory: the code, without data and secrets."""

from __future__ import annotations

import fnmatch
import os
import shutil
from collections.abc import Container, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from lwo_dist.errors import UserError
from lwo_dist.git import GitError, Repository
from lwo_dist.redaction import credentials_in
from lwo_dist.secret_rule import find_secret, is_secret_file

__all__ = ["CONFIG_NAME", "pack", "refuse_credentials"]

CONFIG_NAME = "lwo-dist-job.yaml"

MAX_FILE_BYTES = 10 * 2**20
_MAX_NAME_LENGTH = 1024
MAX_BYTES = 90 * 2**20  # Ray's server accepts 100 MiB.
_DATA_FILES = (
    "*.safetensors",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.gguf",
    "*.onnx",
    "*.npy",
    "*.npz",
    "*.h5",
    "*.parquet",
    "*.arrow",
    "*.jsonl",
    "*.sqlite",
    "*.db",
    "*.zip",
    "*.tar",
    "*.gz",
    "*.zst",
    "*.7z",
)


def pack(folder: Path, config: str, target: Path) -> list[str]:
    """Copy what git tracks or would track in `folder`, and `config` as CONFIG_NAME, into the empty
    folder `target`.

    Outside a git work tree only `config` is copied, because nothing says which files are code.

    Returns:
        What was left out: `file (reason)` each.

    Raises:
        UserError: there is more than Ray accepts, the config holds a secret, a file holds a
            credential of the environment, or git fails.
    """
    left_out: list[str] = []
    total = 0
    credentials = credentials_in(os.environ)
    names = frozenset(_files(folder))
    for name in sorted(names):
        path = folder / name
        reason = _reason(folder, name, names)
        if reason is None:
            try:
                data = path.read_bytes()
            except OSError as error:
                raise UserError(
                    f"{path}: {error.strerror}; make it readable, or add it to .gitignore"
                ) from None
            _refuse(data, name, credentials)
            if secret := find_secret(data):
                reason = f"secret: {secret}"
        if reason is not None:
            left_out.append(f"{name} ({reason})")
            continue
        total += len(data)
        if total > MAX_BYTES:
            raise UserError(
                f"{folder}: more than {MAX_BYTES >> 20} MiB to send, the most that Ray accepts;"
                " add what the job does not need to .gitignore, or submit from a smaller folder"
            )
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes(data)
        shutil.copymode(path, target / name)
    refuse_credentials({"the config": config})
    (target / CONFIG_NAME).write_text(config)
    return left_out


def refuse_credentials(texts: Mapping[str, str]) -> None:
    """Refuse texts that hold a secret, or a credential of the environment.

    Args:
        texts: name for the message -> text.

    Raises:
        UserError
    """
    credentials = credentials_in(os.environ)
    for name, text in texts.items():
        _refuse(text.encode(), name, credentials)
        if secret := find_secret(text.encode()):
            raise UserError(
                f"{name} holds a secret ({secret}), which everyone on the cluster could read; set"
                " it in the cluster's environment instead"
            )


def _files(folder: Path) -> Iterator[str]:
    """Names relative to `folder`; nothing outside a git work tree or without git."""
    try:
        repository = Repository.around(folder)
        names = repository.names(folder, untracked=True) if repository else []
    except FileNotFoundError:
        return
    except GitError as error:
        raise UserError(
            f"{folder}: git ls-files failed: {error}; fix it, or submit from another folder"
        ) from None
    for name in names:
        with suppress(OSError):  # a name that no file can have
            if (folder / name).is_file():  # Not a submodule, nor what was deleted since.
                yield name


def _reason(folder: Path, name: str, names: Container[str]) -> str | None:
    path = folder / name
    try:
        name.encode()
    except UnicodeEncodeError:
        return "name is not UTF-8"
    if len(name) > _MAX_NAME_LENGTH:
        return "name is too long"
    if name.partition("/")[0] == CONFIG_NAME:
        return "reserved for the config"
    # A link may lead to a file that is sent anyway, but not to git's own or to ignored ones.
    real = os.path.relpath(path.resolve(), folder.resolve())
    if real not in names:
        return "external symlink"
    if is_secret_file(name) or is_secret_file(real):
        return "secret: file name"
    if any(fnmatch.fnmatch(path.name.lower(), pattern) for pattern in _DATA_FILES):
        return "data"
    if path.stat().st_size > MAX_FILE_BYTES:
        return f"over {MAX_FILE_BYTES >> 20} MiB"
    return None


def _refuse(data: bytes, name: str, credentials: Mapping[str, str]) -> None:
    for variable, value in credentials.items():
        if value.encode() in data:
            raise UserError(
                f"{name} holds the value of {variable}, which everyone on the cluster could read;"
                f" set {variable} in the cluster's environment instead"
            )
