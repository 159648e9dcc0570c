"""What a run says of itself: facts for people and trackers, and the files that make a checkpoint a
model folder.
"""

from __future__ import annotations

import importlib.metadata
import platform
import socket
from pathlib import Path
from typing import Any

import torch

from lwo_dist.config import Config
from lwo_dist.data import PreparedData
from lwo_dist.hook import LWO
from lwo_dist.registry import TASKS

__all__ = ["about_run", "facts", "layer_sizes", "save_model_files"]


def about_run(config: Config, data: PreparedData) -> dict[str, Any]:
    """What a checkpoint says of its run, for the card of an exported model."""
    return {
        "run_name": config.run_name,
        "method": config.method,
        "strategy": config.strategy,
        "task": config.task,
        **TASKS.get(config.task).sheet.record(),
        "base_model": config.model.name,
        "revision": config.model.revision,
        "trust_remote_code": config.model.trust_remote_code,
        "source": str(config.data.source).rstrip("/").rpartition("/")[2],
        "data": {name: value for name, value in data.counts.items() if isinstance(value, int)},
        "lwo": config.lwo.model_dump(mode="json"),
        "train": config.train.model_dump(mode="json"),
        "versions": _versions(),
    }


def layer_sizes(lwo: LWO) -> tuple[int, ...]:
    """Parameters of each layer."""
    sizes = _sizes(lwo)
    return tuple(sum(sizes[name] for name in layer.parameter_names) for layer in lwo.layers)


def facts(config: Config, lwo: LWO, data: PreparedData, device: torch.device) -> dict[str, Any]:
    sizes = _sizes(lwo)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "parameters": sum(sizes.values()),
        "trained_parameters": sum(
            sizes[name] for layer in lwo.layers for name in layer.parameter_names
        ),
        "host": socket.gethostname(),
        "windows": data.counts["windows"],
        "held_out_examples": len(data.held_out),
        "data": dict(data.counts),
        "versions": _versions(),
    }


def _sizes(lwo: LWO) -> dict[str, int]:
    return {
        name: getattr(p, "ds_numel", p.numel()) for name, p in lwo.strategy.model.named_parameters()
    }


def _versions() -> dict[str, str]:
    packages = ("lwo-dist", "torch", "transformers", "deepspeed", "ray", "mlflow")
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def save_model_files(model: Any, tokenizer: Any, folder: Path) -> None:
    # The weights in the store are fp32 masters, whatever dtype the base model was published in.
    settings = type(model.config).from_dict(
        {**model.config.to_dict(), "dtype": "float32", "use_cache": True}
    )
    settings.architectures = [type(model).__name__.removeprefix("FSDP")]
    settings.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
