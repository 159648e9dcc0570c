"""Describe a run from its parts: what the model, the data and the device say of themselves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from lwo_dist import distributed
from lwo_dist.config import Config
from lwo_dist.data import PreparedData
from lwo_dist.hook import LWO
from lwo_dist.registry import TASKS
from lwo_dist.run_info import RunInfo

__all__ = ["describe_run"]


def describe_run(
    config: Config,
    lwo: LWO,
    data: PreparedData,
    *,
    run_dir: Path,
    device: torch.device,
    hosts: Sequence[str] = (),
) -> RunInfo:
    """Describe the run that `lwo` is about to train. No collective; the same on every rank but for
    `host` and `run_dir`.

    Args:
        run_dir: the run's folder on this machine.
        device: what this rank computes on.
        hosts: the hosts of all ranks, each once.
    """
    sizes = _parameter_sizes(lwo)
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
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        hosts=tuple(hosts),
        data=dict(data.counts),
        held_out_examples=len(data.held_out),
        task_record=TASKS.get(config.task).sheet.record(),
    )


def _parameter_sizes(lwo: LWO) -> dict[str, int]:
    """Elements of each parameter; ZeRO-3 keeps the number of a sharded one in `ds_numel`."""
    return {
        name: getattr(parameter, "ds_numel", parameter.numel())
        for name, parameter in lwo.module.named_parameters()
    }
