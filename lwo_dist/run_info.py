"""What is known of a run besides its points, and the forms in which others keep it.

`RunInfo` is the one description. A checkpoint keeps `checkpoint_record`; MLflow keeps
`run_parameters` and `run_tags`; a job of a Ray cluster carries `job_metadata`. None of what leaves
the run's own folder holds a secret.
"""

from __future__ import annotations

import getpass
import json
import os
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .config import Config
from .git import GitError, Repository
from .redaction import redact, redact_values
from .secret_rule import is_secret_name
from .versions import version_of, versions

__all__ = [
    "LORA_RANK",
    "RunInfo",
    "base_name",
    "checkpoint_record",
    "dataset_record",
    "flatten",
    "git_commit",
    "job_metadata",
    "model_name",
    "public_config",
    "run_parameters",
    "run_tags",
    "source_name",
]


LORA_RANK = 16
"""The rank of the LoRA that a run's memory is compared with."""


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """What is known of a run before its first step."""

    config: Config
    """The resolved configuration."""
    run_dir: Path
    """The run's folder, <storage>/<run_name>, on this machine."""
    world_size: int
    start_step: int
    """0, or the step that a resumed run continues from."""
    layers: tuple[str, ...]
    """Names of the trained layers, in model order; `lwo/active_layer` is an index into it."""
    layer_sizes: tuple[int, ...]
    """Parameters of each layer; as long as `layers`."""
    parameters: int
    """Parameters of the whole model."""
    lora_parameters: int = 0
    """Parameters that LoRA of rank `LORA_RANK` on all linear layers would train; 0: unknown, or
    the run trains adapters itself."""
    device: str
    """The kind of device that the workers compute on: a GPU's name, or CPU."""
    host: str = field(default_factory=socket.gethostname)
    """The host of rank 0."""
    hosts: tuple[str, ...] = ()
    """The hosts of all ranks, each once."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """`PreparedData.counts`: examples, tokens, files read and skipped."""
    fingerprint: str = ""
    """`PreparedData.fingerprint`."""
    held_out_examples: int = 0
    task_record: Mapping[str, Any] = field(default_factory=dict)
    """How the task's scores are shown (`ScoreSheet.record`): keys `scores` and `example`."""
    versions: Mapping[str, str] = field(default_factory=versions)

    @property
    def trained_parameters(self) -> int:
        """Parameters in any layer."""
        return sum(self.layer_sizes)


def checkpoint_record(info: RunInfo) -> dict[str, Any]:
    """The entry `run` of a checkpoint's state.json, from which an export writes its model card.

    Checkpoints of earlier versions are read by the same keys: add keys, never rename one.
    """
    config = info.config
    return {
        "run_name": config.run_name,
        "method": config.method,
        "strategy": config.strategy,
        "task": config.task,
        "metric": config.eval.metric,
        **info.task_record,
        "base_model": config.model.name,
        "base_name": base_name(config.model.name),
        "revision": config.model.revision,
        "trust_remote_code": config.model.trust_remote_code,
        "source": source_name(config),
        "data": {name: count for name, count in info.data.items() if isinstance(count, int)},
        "lwo": config.lwo.model_dump(mode="json"),
        "lora": config.lora.model_dump(mode="json"),
        "train": config.train.model_dump(mode="json"),
        "versions": dict(info.versions),
    }


def base_name(model: str) -> str:
    """The public name of the base model `model.name`: a Hugging Face id, or the name of a folder or
    file without its path.

    >>> base_name("Qwen/Qwen2.5-0.5B"), base_name("/runs/cache/tiny-code-0123456789ab")
    ('Qwen/Qwen2.5-0.5B', 'tiny-code')
    """
    snapshot = re.search(r"/models--([^/]+)/snapshots/[0-9a-f]+/*$", model)
    if snapshot:  # in the cache of huggingface_hub
        return snapshot[1].replace("--", "/", 1)
    is_path = model.startswith((".", "~", "/")) or os.path.exists(model)  # noqa: PTH110  any text
    if is_path:
        # The folders that are made here end with a fingerprint.
        return re.sub(r"-([0-9a-f]{12}|[0-9a-f]{16})$", "", Path(model).absolute().name)
    return model


def run_parameters(info: RunInfo) -> dict[str, str]:
    """The configuration and the facts of `info`, flat, as MLflow parameters."""
    facts = {
        "model.name": model_name(info.config),
        "world_size": info.world_size,
        "layers": ", ".join(info.layers),
        "device": info.device,
        "host": info.host,
        "parameters": info.parameters,
        "trained_parameters": info.trained_parameters,
        "data": dict(info.data),
        "versions": dict(info.versions),
    }
    return flatten(public_config(info.config)) | flatten(redact_values(facts))


def run_tags(
    config: Config, hosts: Sequence[str] = (), device: str | None = None
) -> dict[str, str]:
    """MLflow tags to find a run by: what it is, where it runs, which code it runs.

    Args:
        hosts: the hosts of all ranks; empty: this host.
        device: `RunInfo.device`, once it is known.
    """
    job = _job_metadata()
    tags = {
        "method": config.method,
        "strategy": config.strategy,
        "task": config.task,
        "model": model_name(config),
        "device": device,
        "hosts": ", ".join(hosts or [socket.gethostname()]),
        "ray_job_id": os.environ.get("RAY_JOB_ID"),
        "ray_submission_id": job.get("job_submission_id"),
        # The rest are MLflow's own names: its pages show them in columns of their own.
        "mlflow.parentRunId": config.tracking.parent_run_id,
        "mlflow.source.name": "lwo-dist train",
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": job.get("git_commit") or git_commit(),
        "mlflow.user": _user(),
    }
    return {name: redact(value) for name, value in tags.items() if value}


def dataset_record(info: RunInfo) -> dict[str, Any]:
    """The data of a run: `name`, `digest` (the first digits of the fingerprint, as in the name of
    the cache's folder), `source` without a password, and `counts`.
    """
    return {
        "name": source_name(info.config),
        "digest": info.fingerprint[:16],
        "source": redact(str(info.config.data.source)),
        "counts": {name: count for name, count in info.data.items() if isinstance(count, int)},
    }


def model_name(config: Config) -> str:
    """The model for people: `base_name` of `model.name`."""
    return base_name(config.model.name)


def source_name(config: Config) -> str:
    """The last part of `data.source`: the name of a folder or repository."""
    return redact(str(config.data.source)).rstrip("/").rpartition("/")[2]


def job_metadata(config: Config, run_name: str, folder: Path) -> dict[str, str]:
    """What ties a Ray job, its code, its config and its MLflow run together.

    Args:
        folder: the working directory that the job is submitted from.
    """
    metadata = {
        "run_name": run_name,
        "storage": redact(config.storage),
        "lwo_dist_version": version_of("lwo-dist") or "unknown",
        "config": json.dumps(public_config(config)),
    }
    if commit := git_commit(folder):
        metadata["git_commit"] = commit
    return metadata


def public_config(config: Config) -> dict[str, Any]:
    """The resolved configuration as plain values, fit to be shown and sent: without secrets."""
    values: dict[str, Any] = redact_values(config.model_dump(mode="json"))
    environment = values["cluster"]["env"]
    for name in environment:
        if is_secret_name(name):
            environment[name] = "***"
    return values


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested mappings as one, with keys joined by dots and values as text.

    >>> flatten({"train": {"steps": 100}, "seed": 1})
    {'train.steps': '100', 'seed': '1'}
    """
    flat: dict[str, str] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{name}.")
        elif isinstance(value, str):
            flat[name] = value
        else:
            flat[name] = json.dumps(value, default=str)
    return flat


def git_commit(folder: Path | None = None) -> str | None:
    """The commit checked out in `folder` (None: the working directory).

    `-dirty` follows where tracked files differ from it. None without git or outside a work tree.
    """
    try:
        repository = Repository.around(folder or Path())
        return repository.commit() if repository else None
    except (OSError, GitError):
        return None


def _job_metadata() -> dict[str, str]:
    """The `job_metadata` of the Ray job that this process is part of, and the job's id.

    Ray puts it into the environment of the entry point only.
    """
    try:
        return dict(json.loads(os.environ["RAY_JOB_CONFIG_JSON_ENV_VAR"])["metadata"])
    except (KeyError, ValueError, TypeError):  # no Ray job, or one of another Ray version
        return {}


def _user() -> str | None:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        return None
