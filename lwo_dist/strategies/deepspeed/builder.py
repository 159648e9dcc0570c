"""Chooses and builds DeepSpeed engines; DeepSpeed itself is imported only when needed."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lwo_dist import distributed
from lwo_dist.config import Config, LWOConfig
from lwo_dist.extras import require
from lwo_dist.layers import Layer, check_layers, keep_flags, own_flags, without_frozen
from lwo_dist.methods import Method
from lwo_dist.names import named_parameters
from lwo_dist.optimizer import make_adamw
from lwo_dist.schedule import make_schedule
from lwo_dist.strategies.base import ModelSource, Strategy, StrategyBuilder
from lwo_dist.strategies.refusals import refuse_head_rows, refuse_stateless

from . import settings

__all__ = ["DeepSpeedBuilder", "load_deepspeed", "prepare"]


class DeepSpeedBuilder(StrategyBuilder):
    name = "deepspeed"
    extras = ("deepspeed",)
    own_settings = ("zero_stage", "deepspeed")

    def drives(self, model: nn.Module) -> bool:
        return any(kind.__name__ == "DeepSpeedEngine" for kind in type(model).__mro__)

    def module(self, model: Any) -> nn.Module:
        inner: nn.Module = model.module
        return inner

    def stores_16_bit(self, config: Config) -> bool:
        return settings.precision(config) == "bf16"

    def resolve(self, config: Config) -> Config:
        """Add the contents of the DeepSpeed JSON, so that the workers need not see the file; its
        bf16.enabled decides `train.precision: auto`.

        Raises:
            UserError: a setting that cannot be honoured or contradicts ours, at any world size.
        """
        read = settings.read_config(config.deepspeed)
        train = config.train.model_copy(update={"precision": settings.precision(config)})
        config = config.model_copy(update={"deepspeed": read, "train": train})
        for world_size in config.cluster.world_sizes:
            settings.resolve(config, world_size)
        return config

    def build(
        self, source: ModelSource, method: Method, config: Config, device: torch.device
    ) -> nn.Module:
        with distributed.errors_on_all_ranks():
            engines = load_deepspeed()
            engines.check_environment()
        resolved = settings.resolve(config, distributed.world_size())
        if resolved["zero_optimization"]["stage"] == 3:
            model = source.empty()
            source.fill_partitioned(model, device, engines.partitioner(resolved))
        else:
            model = source.whole(device)
        engine: nn.Module = make_engine(model, config.lwo, resolved, method)
        return engine

    def attach(self, model: Any, layers: Sequence[Layer], config: LWOConfig) -> Strategy:
        load_deepspeed()
        from .strategy import DeepSpeedZero

        return DeepSpeedZero(model, layers, config)


def load_deepspeed() -> Any:
    """`strategies.deepspeed.engine`, imported on first use: the rest works without DeepSpeed.

    Raises:
        UserError: DeepSpeed is not installed, or the version is untested.
    """
    require("deepspeed", what="strategy: deepspeed")
    if not torch.cuda.is_available():
        # Otherwise it searches for accelerators and warns.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return importlib.import_module("lwo_dist.strategies.deepspeed.engine")


def prepare(model: nn.Module, config: LWOConfig, method: Method) -> list[list[nn.Parameter]]:
    """Freeze everything but the first visit; return the parameters of each of its layers. Of a
    mixture of experts, ZeRO-3 will fetch each block of experts whole.

    Raises:
        UserError: a model without layers, or DeepSpeed is missing or an untested version.
    """
    load_deepspeed().check_environment()
    importlib.import_module("lwo_dist.strategies.deepspeed.experts").fetch_experts_whole(model)
    flags = own_flags(model)
    layers: Sequence[Layer] = check_layers(model, method.layers(model, config))
    if not method.changes_model:
        layers = without_frozen(layers, flags)
    visits = method.cycle(layers, config)
    refuse_stateless(DeepSpeedBuilder.name, DeepSpeedBuilder.updates_whole_layers, visits)
    refuse_head_rows(DeepSpeedBuilder.name, DeepSpeedBuilder.masks_rows, config)
    schedule = make_schedule(config, [visit.active.name for visit in visits])
    first = visits[schedule.active_layer(0)]
    trained = set(first.parameter_names)
    parameters = named_parameters(model)
    keep_flags(model, flags)
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in trained)
    return [[parameters[name] for name in layer.parameter_names] for layer in first.layers]


def make_engine(
    model: nn.Module, config: LWOConfig, deepspeed: dict[str, Any], method: Method
) -> Any:
    """An engine for `attach`, in the existing process group.

    It never holds optimizer state for the whole model.

    Args:
        deepspeed: a complete DeepSpeed config.
    """
    by_layer = prepare(model, config, method)
    optimizer = make_adamw(method.with_rate(model, config), by_layer)
    parameters = [parameter for layer in by_layer for parameter in layer]
    return load_deepspeed().build_engine(model, parameters, optimizer, deepspeed)
