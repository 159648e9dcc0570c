"""Merges our settings and the user's DeepSpeed JSON into one DeepSpeed config.

Settings that cannot be honoured are refused by name. DeepSpeed itself is not imported here, so a
wrong setting is found on the driver, before any worker starts.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lwo_dist import distributed
from lwo_dist.config import Config, LWOConfig
from lwo_dist.errors import UserError

__all__ = ["DEFAULT_STAGE", "precision", "read_config", "refuse_settings", "resolve"]

DEFAULT_STAGE = 3
_MAX_BYTES = 2**20
_MAX_DEPTH = 20
_ADAMS = ("adam", "adamw", "fusedadam", "deepspeedcpuadam")
_NVME = "swapping to NVMe is not supported; set device: cpu or none"
_PLAIN = "leave it out: one layer at a time has not been tested with it"
# Path in the config -> (allowed values, remedy for any other value).
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "fp16.enabled": ((False, None, "auto"), "use bf16, or fp32: there is no loss scaling here"),
    "amp.enabled": ((False, None), "use bf16, or fp32: there is no loss scaling here"),
    "torch_autocast.enabled": ((False, None), "use bf16, or fp32"),
    "zero_optimization.offload_optimizer.device": (("none", "cpu", None), _NVME),
    "zero_optimization.offload_optimizer.ratio": (
        (1, 1.0, None),
        "leave it out: offload the optimizer wholly or not",
    ),
    "zero_optimization.offload_optimizer.super_offload": ((False, None), _PLAIN),
    "zero_optimization.offload_param.device": (
        ("none", None),
        "offload the optimizer (offload_optimizer) instead",
    ),
    "zero_optimization.zenflow": ((None,), _PLAIN),
    "zero_optimization.zero_hpz_partition_size": ((1, None), _PLAIN),
    "zero_optimization.zero_quantized_weights": ((False, None), _PLAIN),
    "zero_optimization.zero_quantized_gradients": ((False, None), _PLAIN),
    "zero_optimization.zero_quantized_nontrainable_weights": ((False, None), _PLAIN),
    "zero_optimization.mics_shard_size": ((-1, None), _PLAIN),
    "bf16.bf16_master_weights_and_grads": ((False, None), "masters stay fp32: leave it out"),
    "bf16.bf16_optimizer_states": ((False, None), "moments stay fp32: leave it out"),
    "tensor_parallel.autotp_size": ((0, 1, None), _PLAIN),
    "sparse_gradients": ((False, None), _PLAIN),
    "compile.deepcompile": ((False, None), _PLAIN),
    "managed_gradient_accumulation": ((True, None), "leave it out: the hook owns the boundary"),
}


def read_config(value: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """The user's DeepSpeed config, from a JSON file or a mapping; "auto" values are dropped.

    Raises:
        UserError: an unreadable file, malformed JSON, or JSON that is not a mapping.
    """
    if isinstance(value, str):
        name = f"deepspeed = {value}"
        try:
            with Path(value).expanduser().open("rb") as file:
                data = file.read(_MAX_BYTES + 1)
            if len(data) > _MAX_BYTES:
                raise UserError(f"{name} is larger than {_MAX_BYTES} bytes")
            value = json.loads(data)
            _refuse_nesting(value, 0)
        except OSError as error:
            raise UserError(f"{name}: {error.strerror}; give a JSON file, or a mapping") from None
        except RecursionError:
            raise UserError(f"{name} is nested more than {_MAX_DEPTH} levels deep") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{name} is not JSON: {error}") from None
        if not isinstance(value, dict):
            raise UserError(
                f"the deepspeed config holds a {type(value).__name__}; it must be a mapping of keys"
                " to values"
            )
    return _without_auto(dict(value or {}))


def _refuse_nesting(value: Any, depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise RecursionError
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            _refuse_nesting(item, depth + 1)


def refuse_settings(settings: Mapping[str, Any]) -> None:
    """Refuse DeepSpeed settings that layer-wise optimisation cannot honour.

    Raises:
        UserError: naming the first such setting.
    """
    for key in ("zero_optimization", "bf16", "fp16", "optimizer", "data_types"):
        if not isinstance(settings.get(key) or {}, Mapping):
            raise UserError(f"deepspeed config: {key} = {settings[key]!r} must be a mapping")
    for path, (fine, remedy) in _REFUSED.items():
        value = _at(settings, path)
        if value not in fine:
            raise UserError(
                f"deepspeed config: {path} = {value!r} cannot be used with layer-wise optimisation;"
                f" {remedy}"
            )
    stage = _at(settings, "zero_optimization.stage")
    if stage is not None and stage not in (1, 2, 3):
        raise UserError(f"deepspeed config: zero_optimization.stage = {stage!r} must be 1, 2 or 3")
    optimizer = _at(settings, "optimizer.type")
    if optimizer is not None and str(optimizer).lower() not in _ADAMS:
        raise UserError(
            f"deepspeed config: optimizer.type = {optimizer} cannot be used; layers are trained"
            " with AdamW: set AdamW, or leave optimizer out"
        )


def resolve(config: Config, world_size: int) -> dict[str, Any]:
    """The DeepSpeed config of a run with `strategy: deepspeed`.

    The user's settings are kept and missing ones filled in. `optimizer` is removed: LWOConfig
    defines the optimizer.

    Raises:
        UserError: a setting that cannot be honoured or contradicts ours.
    """
    settings = copy.deepcopy(read_config(config.deepspeed))
    refuse_settings(settings)
    if "scheduler" in settings:
        raise UserError(
            "deepspeed config: scheduler cannot be used in a run, which resumes without it; set"
            " lwo.lr_scheduler_type, lwo.warmup_steps and lwo.lr_schedule_over"
        )
    lwo = config.lwo
    train = config.train
    accumulation = lwo.gradient_accumulation_steps
    zero = settings.setdefault("zero_optimization", {})
    _agree(zero, "stage", config.zero_stage, "zero_stage", DEFAULT_STAGE)
    _agree(settings, "gradient_accumulation_steps", accumulation, "lwo.gradient_accumulation_steps")
    _agree(settings, "train_batch_size", train.global_batch_size, "train.global_batch_size")
    micro = train.global_batch_size // (world_size * accumulation)
    _agree(settings, "train_micro_batch_size_per_gpu", micro, "the size of a micro-batch")
    bf16 = settings.setdefault("bf16", {})
    if train.precision != "auto":  # auto: unknown until the workers have their devices
        _agree(
            bf16,
            "enabled",
            train.precision == "bf16",
            f"train.precision = {train.precision}, so bf16.enabled",
        )
    if train.precision == "bf16":  # as train.precision promises: reductions stay fp32
        settings.setdefault("communication_data_type", "fp32")
        settings.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    # 0.19.8 clips at 1.0 if this is absent.
    settings.setdefault("gradient_clipping", lwo.max_grad_norm)
    settings.setdefault("steps_per_print", 2**31)
    _warn_overruled((settings.pop("optimizer", None) or {}).get("params") or {}, lwo)
    return settings


def precision(config: Config) -> str:
    """`train.precision`, or what the DeepSpeed config says instead of auto."""
    if config.train.precision != "auto":
        return config.train.precision
    enabled = _at(read_config(config.deepspeed), "bf16.enabled")
    return "auto" if enabled is None else "bf16" if enabled else "fp32"


def _warn_overruled(theirs: Mapping[str, Any], lwo: LWOConfig) -> None:
    ours = {
        "lr": "by method and width" if lwo.lr is None else lwo.lr,
        "betas": list(lwo.betas),
        "eps": lwo.eps,
        "weight_decay": lwo.weight_decay,
    }
    other = [
        f"{key} {theirs[key]} -> {value}"
        for key, value in ours.items()
        if theirs.get(key, value) != value
    ]
    if other and distributed.rank() == 0:
        warnings.warn(
            f"deepspeed config: lwo wins over optimizer.params: {', '.join(other)}", stacklevel=3
        )


def _agree(settings: dict[str, Any], key: str, ours: Any, name: str, default: Any = None) -> None:
    """Set `key` if it is missing, or refuse a value that contradicts ours."""
    theirs = settings.get(key)
    if theirs is not None and ours is not None and theirs != ours:
        raise UserError(
            f"deepspeed config: {key} = {theirs!r}, but {name} = {ours!r}; set them alike, or leave"
            " one out"
        )
    settings[key] = theirs if theirs is not None else ours if ours is not None else default


def _at(settings: Mapping[str, Any], path: str) -> Any:
    value: Any = settings
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _without_auto(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in settings.items()
        if not (isinstance(value, str) and value == "auto")
    }
