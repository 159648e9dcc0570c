"""What of a working directory goes along with a job: code, and neither data nor secrets."""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

from lwo_dist.errors import UserError

__all__ = ["CONFIG_NAME", "pack", "refuse_credentials"]

CONFIG_NAME = "lwo-dist-job.yaml"

MAX_FILE_BYTES = 10 * 2**20
MAX_BYTES = 90 * 2**20  # Ray's server takes 100 MiB.
_SECRET_FILES = (
    ".env",
    ".env.*",
    "*.pem",
    "*.key",
    "*.p12",
    "*.pfx",
    "*.jks",
    "id_rsa*",
    "id_dsa*",
    "id_ecdsa*",
    "id_ed25519*",
    ".netrc",
    ".npmrc",
    ".pypirc",
    ".git-credentials",
    ".htpasswd",
    "auth_token",
    "credentials",
    "credentials.json",
    "kubeconfig",
    "*.kubeconfig",
    "service-account*.json",
)
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
_PRIVATE_KEY = re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----")
_CREDENTIAL = re.compile(r"token|secret|passw|credential|api_?key|access_key", re.IGNORECASE)
_SHORTEST_CREDENTIAL = 12


def pack(folder: Path, config: str, target: Path) -> list[str]:
    """Copy what git tracks or would track in `folder`, and `config` as CONFIG_NAME, into the empty
    folder `target`.

    Outside a git work tree nothing says what belongs to the code, and only `config` is copied.

    Returns:
        What was left out, `file (reason)` each.

    Raises:
        UserError: more than Ray takes, or a credential of the environment in what would be sent;
            nothing was sent.
    """
    left_out, total = list[str](), 0
    credentials = _credentials(os.environ)
    for name in _files(folder):
        path = folder / name
        reason = _reason(folder, path)
        if reason is None:
            data = path.read_bytes()
            if _PRIVATE_KEY.search(data):
                reason = "a private key"
            else:
                _refuse(data, name, credentials)
        if reason is not None:
            left_out.append(f"{name} ({reason})")
            continue
        total += len(data)
        if total > MAX_BYTES:
            raise UserError(
                f"{folder}: more than {MAX_BYTES >> 20} MiB to send, and Ray takes no more; put"
                " what the job does not need into .gitignore, or submit from a smaller folder"
            )
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target / name)
        shutil.copymode(path, target / name)
    _refuse(config.encode(), "the config", credentials)
    (target / CONFIG_NAME).write_text(config)
    return left_out


def refuse_credentials(texts: Mapping[str, str]) -> None:
    """Raise UserError where a text, by its name, holds a credential of the environment."""
    for name, text in texts.items():
        _refuse(text.encode(), name, _credentials(os.environ))


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
    if any(fnmatch.fnmatch(path.name.lower(), pattern) for pattern in _SECRET_FILES):
        return "looks like a secret"
    if any(fnmatch.fnmatch(path.name.lower(), pattern) for pattern in _DATA_FILES):
        return "data"
    if path.stat().st_size > MAX_FILE_BYTES:
        return f"over {MAX_FILE_BYTES >> 20} MiB"
    return None


def _credentials(environment: Mapping[str, str]) -> dict[str, bytes]:
    # Shorter values would be found in ordinary words; values that are paths are not credentials
    # themselves.
    return {
        name: value.encode()
        for name, value in environment.items()
        if _CREDENTIAL.search(name)
        and len(value) >= _SHORTEST_CREDENTIAL
        and not value.startswith("/")
    }


def _refuse(data: bytes, name: str, credentials: Mapping[str, bytes]) -> None:
    for variable, value in credentials.items():
        if value in data:
            raise UserError(
                f"{name} holds the value of {variable}, and everybody on the cluster could read it;"
                f" set {variable} in the cluster's own environment instead"
            )
