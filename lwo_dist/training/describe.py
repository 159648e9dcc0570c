"""Builds the description of a run from its model, data and device."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lwo_dist import distributed
from lwo_dist.config import Config
from lwo_dist.data import PreparedData
from lwo_dist.hook import LWO
from lwo_dist.memory import lora_numel
from lwo_dist.methods import Method
from lwo_dist.registry import METHODS, TASKS
from lwo_dist.run_info import LORA_RANK, RunInfo

__all__ = ["describe_run", "device_name"]


def describe_run(
    config: Config,
    lwo: LWO,
    data: PreparedData,
    *,
    run_dir: Path,
    device: torch.device,
    hosts: Sequence[str] = (),
) -> RunInfo:
    """Describe the run that `lwo` is about to train. No collective.

    Equal on every rank except for `host` and `run_dir`.

    Args:
        run_dir: the run's folder on this machine.
        device: the device of this rank.
        hosts: the distinct hosts of all ranks.
    """
    sizes = _parameter_sizes(lwo)
    method: Method = METHODS.get(config.method)
    return RunInfo(
        config=config,
        run_dir=run_dir,
        world_size=distributed.world_size(),
        start_step=lwo.step_count,
        layers=tuple(layer.name for layer in lwo.layers),
        layer_sizes=tuple(
            sum(sizes[name] for name in layer.parameter_names) for layer in lwo.layers
        ),
        parameters=sum(sizes.values()),
        lora_parameters=0 if method.trains_adapters else lora_numel(_matrices(lwo), LORA_RANK),
        device=device_name(device),
        hosts=tuple(hosts),
        data=dict(data.counts),
        fingerprint=data.fingerprint,
        held_out_examples=len(data.held_out),
        task_record=TASKS.get(config.task).sheet.record(),
    )


def _matrices(lwo: LWO) -> list[tuple[int, ...]]:
    """Shapes of the weights of linear layers, but for the head."""
    find_head: Any = getattr(lwo.module, "get_output_embeddings", lambda: None)
    head = find_head()
    weights: list[Tensor] = [
        module.weight
        for module in lwo.module.modules()
        if isinstance(module, nn.Linear) and module is not head
    ]
    return [tuple(getattr(weight, "ds_shape", weight.shape)) for weight in weights]


def _parameter_sizes(lwo: LWO) -> dict[str, int]:
    """Elements of each parameter; under ZeRO-3, `ds_numel` of a partitioned one."""
    return {
        name: getattr(parameter, "ds_numel", parameter.numel())
        for name, parameter in lwo.module.named_parameters()
    }


def device_name(device: torch.device) -> str:
    """The device for people: the GPU's name, or CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
