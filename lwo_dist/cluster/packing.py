"""Select what a job takes from its working directory: the code, without data and secrets."""

from __future__ import annotations

import fnmatch
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

from lwo_dist.errors import UserError
from lwo_dist.redaction import credentials_in, holds_private_key, looks_secret

__all__ = ["CONFIG_NAME", "pack", "refuse_credentials"]

CONFIG_NAME = "lwo-dist-job.yaml"

MAX_FILE_BYTES = 10 * 2**20
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
        UserError: there is more than Ray accepts, or a file holds a credential of the environment.
    """
    left_out: list[str] = []
    total = 0
    credentials = credentials_in(os.environ)
    for name in _files(folder):
        path = folder / name
        reason = _reason(folder, path)
        if reason is None:
            data = path.read_bytes()
            if holds_private_key(data):
                reason = "a private key"
            else:
                _refuse(data, name, credentials)
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
        shutil.copyfile(path, target / name)
        shutil.copymode(path, target / name)
    _refuse(config.encode(), "the config", credentials)
    (target / CONFIG_NAME).write_text(config)
    return left_out


def refuse_credentials(texts: Mapping[str, str]) -> None:
    """Refuse texts that hold a credential of the environment.

    Args:
        texts: name for the message -> text.

    Raises:
        UserError
    """
    for name, text in texts.items():
        _refuse(text.encode(), name, credentials_in(os.environ))


def _files(folder: Path) -> Iterator[str]:
    """Names relative to `folder`, sorted; none outside a git work tree."""
    command = [
        "git",
        "-C",
        str(folder),
        "ls-files",
        "-z",
        "--cached",
        "--others",
        "--exclude-standard",
    ]
    try:
        done = subprocess.run(command, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return
    for name in sorted({os.fsdecode(name) for name in done.stdout.split(b"\0") if name}):
        if (folder / name).is_file():  # Not a submodule, nor what was deleted since.
            yield name


def _reason(folder: Path, path: Path) -> str | None:
    if not path.resolve().is_relative_to(folder.resolve()):
        return "a link to elsewhere"
    if looks_secret(path.name):
        return "looks like a secret"
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
