"""What is worth knowing about a run besides its points, as flat parameters and tags without any
secret.
"""

from __future__ import annotations

import getpass
import importlib.metadata
import json
import os
import re
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lwo_dist.callback import RunInfo
from lwo_dist.config import Config

__all__ = [
    "flatten",
    "git_commit",
    "holds_password",
    "public_config",
    "redact",
    "run_parameters",
    "run_tags",
]

_CREDENTIALS = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "HF_TOKEN")
_PACKAGES = ("lwo-dist", "torch", "transformers", "deepspeed", "ray", "mlflow")
_SECRET_NAME = re.compile(r"token|secret|passw|credential|key", re.IGNORECASE)
_USERINFO = re.compile(r"(?<=://)[^/\s]+@|(?<=[?&]password=)[^&\s]+")
_PASSWORD = re.compile(r"://[^/\s]*:[^/\s]*@|[?&]password=[^&\s]")


def holds_password(uri: str) -> bool:
    return _PASSWORD.search(uri) is not None


def redact(text: str) -> str:
    """Strip `user:password@` from every URL in `text`, and the credentials that the environment
    holds.
    """
    text = _USERINFO.sub("", text)
    for name in _CREDENTIALS:
        value = os.environ.get(name, "")
        if len(value) >= 4:  # a shorter one would blank out ordinary words
            text = text.replace(value, "***")
    return text


def public_config(config: Config) -> dict[str, Any]:
    """The resolved configuration as plain values, with nothing in it that must not be shown."""
    values = _redacted(config.model_dump(mode="json"))
    for name in values["cluster"]["env"]:
        if _SECRET_NAME.search(name):
            values["cluster"]["env"][name] = "***"
    return values


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested mappings as one, keys joined by dots, values as text."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = (
                value if isinstance(value, str) else json.dumps(value, default=str)
            )
    return flat


def run_parameters(info: RunInfo) -> dict[str, str]:
    """The configuration, `RunInfo.parameters`, the world size and the layers, as MLflow
    parameters.
    """
    facts = {
        "world_size": info.world_size,
        "layers": ", ".join(info.layers),
        **_redacted(dict(info.parameters)),
    }
    return flatten(public_config(info.config)) | flatten(facts)


def run_tags(config: Config, hosts: Sequence[str] = ()) -> dict[str, str]:
    """Tags to find a run by: what it is, where it ran (this host where none are given), which code
    it ran.
    """
    job = _job_metadata()
    tags = {
        "method": config.method,
        "strategy": config.strategy,
        "task": config.task,
        "model": config.model.name,
        "hosts": ", ".join(hosts or [socket.gethostname()]),
        **{f"version.{package}": _version(package) for package in _PACKAGES},
        "ray_job_id": os.environ.get("RAY_JOB_ID"),
        "ray_submission_id": job.get("job_submission_id"),
        # The two below are MLflow's own names: its pages show them in columns of their own.
        "mlflow.source.git.commit": job.get("git_commit") or git_commit(),
        "mlflow.user": _user(),
    }
    return {name: redact(value) for name, value in tags.items() if value}


def _redacted(value: Any) -> Any:
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {str(key): _redacted(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_redacted(item) for item in value]
    return value


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # an extra, or a plain checkout of ours
        return None


def _job_metadata() -> dict[str, str]:
    """What `lwo-dist submit` said of this job, and its id; Ray puts it into the entry point's
    environment only.
    """
    try:
        metadata: dict[str, str] = json.loads(os.environ["RAY_JOB_CONFIG_JSON_ENV_VAR"])["metadata"]
    except (KeyError, ValueError, TypeError):
        return {}
    return metadata


def git_commit(folder: Path | None = None) -> str | None:
    """The commit checked out in `folder` (the working directory), `-dirty` after it where tracked
    files differ.
    """
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=5, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _user() -> str | None:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        return None
