"""Builds a sharded model from the meta device, so that no device ever holds it whole."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from lwo_dist import distributed
from lwo_dist.config import Config, LWOConfig
from lwo_dist.errors import UserError
from lwo_dist.layers import Layer, find_stacks, separate_layers
from lwo_dist.methods import Method
from lwo_dist.strategies.base import ModelSource, Strategy, StrategyBuilder

from .strategy import FullyShard

__all__ = ["FSDPBuilder", "shard_model"]


class FSDPBuilder(StrategyBuilder):
    name = "fsdp"
    own_settings = ("fsdp.storage", "lwo.stateless", "lwo.stateless_every", "lwo.head_rows")
    updates_whole_layers = True
    masks_rows = True

    def drives(self, model: nn.Module) -> bool:
        return isinstance(model, FSDPModule)

    def stores_16_bit(self, config: Config) -> bool:
        return config.fsdp.storage == "bf16"

    def check(self, config: Config) -> None:
        if config.fsdp.storage == "bf16" and config.train.precision != "bf16":
            raise UserError(
                "fsdp.storage: bf16 cannot be used with train.precision: "
                f"{config.train.precision}; set train.precision: bf16, or fsdp.storage: fp32"
            )
        if config.fsdp.storage == "bf16" and config.lwo.stateless != "none":
            raise UserError(
                f"lwo.stateless: {config.lwo.stateless} cannot be used with fsdp.storage: bf16,"
                " which has no fp32 weights of layers that are not active; set fsdp.storage: fp32"
            )

    def build(
        self, source: ModelSource, method: Method, config: Config, device: torch.device
    ) -> nn.Module:
        model: nn.Module = source.empty()
        if config.fsdp.storage == "bf16":  # parameters only: buffers keep the model's dtype
            for parameter in model.parameters():
                parameter.data = parameter.data.to(torch.bfloat16)
        shard_model(model, precision=config.train.precision, device_type=device.type)
        source.materialize(model, device)
        source.fill(model, device)
        return model

    def attach(self, model: nn.Module, layers: Sequence[Layer], config: LWOConfig) -> Strategy:
        return FullyShard(model, layers, config)


def shard_model(model: nn.Module, *, precision: str, device_type: str) -> None:
    """Wrap each transformer layer and the root with `fully_shard`, over all ranks, in place.

    Also works for a model on the meta device, to be materialised afterwards. The embedding, final
    norm and head stay in the root's group, so that a tied matrix is held once; so do layers that
    share parameters (the blocks of Zamba).

    The last layer stays gathered from forward to backward, like the root: FSDP2 would gather it
    again at once, while the loss is computed. On a CPU, where FSDP2 has no streams, each layer is
    gathered in the background while the one before it computes, which holds one layer more.

    Args:
        precision: compute dtype, "fp32" or "bf16"; gradients are always reduced in fp32.
    """
    mesh = init_device_mesh(device_type, (distributed.world_size(),))
    policy = MixedPrecisionPolicy()
    if precision == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    layers: list[Any] = separate_layers(model)
    last = find_stacks(model)[-1].modules[-1]
    for layer in layers:
        keep = False if layer is last else None
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=keep)
    root = fully_shard(model, mesh=mesh, mp_policy=policy)
    if device_type == "cpu":
        root._set_unshard_async_op(True)
        for layer, following in pairwise(layers):
            layer.set_modules_to_forward_prefetch([following])
