"""What is wrong with the values of a group of settings, in one line with the remedy."""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import BaseModel, ValidationError

__all__ = ["HF_NAMES", "MAX_SHOWN", "all_keys", "one_line"]

MAX_SHOWN = 200
"""Characters of a value that a message shows."""

# What people type who know Hugging Face's TrainingArguments -> what to set here.
HF_NAMES = {
    "adam_beta1": "lwo.betas",
    "adam_beta2": "lwo.betas",
    "adam_epsilon": "lwo.eps",
    "bf16": "train.precision=bf16",
    "block_size": "train.sequence_length",
    "dataset_name": "data.source",
    "eval_steps": "eval.steps",
    "eval_strategy": "eval.steps",
    "fp16": "train.precision, bf16 or fp32",
    "learning_rate": "lwo.lr",
    "load_best_model_at_end": "eval.metric; the best checkpoint is always exported",
    "max_length": "train.sequence_length",
    "max_seq_length": "train.sequence_length",
    "max_steps": "train.steps",
    "metric_for_best_model": "eval.metric",
    "model_name_or_path": "model.name",
    "num_epochs": "train.epochs",
    "num_processes": "cluster.num_workers",
    "num_train_epochs": "train.epochs",
    "output_dir": "storage and run_name",
    "per_device_eval_batch_size": "eval.batch_size",
    "per_device_train_batch_size": "train.global_batch_size, sequences over all workers",
    "report_to": "tracking.enabled",
    "resume_from_checkpoint": "checkpoint.resume",
    "save_steps": "checkpoint.steps",
    "save_total_limit": "checkpoint.keep",
    "torch_dtype": "train.precision",
    "train_batch_size": "train.global_batch_size, sequences over all workers",
    "train_file": "data.source",
    "warmup_ratio": "lwo.warmup_steps",
}


def one_line(error: ValidationError, model: type[BaseModel]) -> str:
    """The first thing that is wrong with the values of `model`; unknown keys come first."""
    errors = error.errors()
    unknown = [each for each in errors if each["type"] in ("extra_forbidden", "invalid_key")]
    first, *_ = unknown or errors
    path = [str(part) for part in first["loc"]]
    location = ".".join(part[:MAX_SHOWN] for part in path)
    if unknown:
        return f"unknown key {location}; {_mend_key(path, model)}"
    message = first["msg"].removeprefix("Value error, ").replace("Input should", "must")
    if first["type"] == "value_error":
        return f"{location}: {message}" if location else message
    shown = f"{location} = {repr(first['input'])[:MAX_SHOWN]}"
    kind, description = _field(path, model)
    if first["type"] == "model_type" and _is_group(kind):
        return f"{shown} must be a group of keys: {', '.join(kind.model_fields)}"
    return f"{shown}: {message} ({description})" if description else f"{shown}: {message}"


def all_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """The dotted path of every setting of `model`."""
    keys = []
    for name, field in model.model_fields.items():
        kind: Any = field.annotation
        if _is_group(kind):
            keys += all_keys(kind, f"{prefix}{name}.")
        else:
            keys.append(f"{prefix}{name}")
    return keys


def _is_group(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _field(path: list[str], model: type[BaseModel]) -> tuple[Any, str | None]:
    """Annotation and description of the field at `path`, or of the one that holds it."""
    kind: Any = model
    description = None
    for part in path:
        if not _is_group(kind) or part not in kind.model_fields:
            break
        field = kind.model_fields[part]
        kind, description = field.annotation, field.description
    return kind, description


def _mend_key(path: list[str], model: type[BaseModel]) -> str:
    *groups, key = path
    group, _ = _field(groups, model)
    own_name = HF_NAMES.get(key) and _seen_from(model, HF_NAMES[key])
    if own_name:
        return f"here it is {own_name}"
    near = _nearest_key(groups, key, group, model)
    return f"did you mean {near}?" if near else f"known here: {', '.join(group.model_fields)}"


def _seen_from(model: type[BaseModel], name: str) -> str | None:
    """`lwo.lr` is `lr` to LWOConfig, and nothing to other groups."""
    group, dot, own = name.partition(".")
    if dot and model.__name__.lower() == f"{group}config":
        return own
    needed = {group} if dot else set(name.split(" and "))
    return name if needed <= model.model_fields.keys() else None


def _nearest_key(
    groups: list[str], key: str, group: type[BaseModel], model: type[BaseModel]
) -> str | None:
    by_name: dict[str, str] = {}
    for path in all_keys(model):
        by_name.setdefault(path.rpartition(".")[2], path)
    if key in by_name:  # At the wrong depth: `lr` for `lwo.lr`.
        return by_name[key]
    here = difflib.get_close_matches(key, group.model_fields, n=1)
    elsewhere = difflib.get_close_matches(key, by_name, n=1, cutoff=0.75)
    return ".".join([*groups, here[0]]) if here else by_name[elsewhere[0]] if elsewhere else None
