"""What accelerate and the hook must agree on; what cannot work is refused by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import DistributedType, DynamoBackend
from torch import nn

from lwo_dist.config import LWOConfig
from lwo_dist.errors import UserError

__all__ = [
    "agree",
    "complete_deepspeed",
    "reduce_in_fp32",
    "refuse_accelerator",
    "refuse_model",
    "refuse_config",
]

_DISTRIBUTED = (
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.FSDP,
    DistributedType.DEEPSPEED,
)


def agree(config: LWOConfig, theirs: Mapping[str, Any], names: Mapping[str, str]) -> None:
    """Refuse a field that the user has set in `config` and that contradicts the loop's value.

    Args:
        theirs: field -> the value that the loop uses.
        names: field -> what the loop calls it.

    Raises:
        UserError: naming the first such field.
    """
    for field, value in theirs.items():
        ours = getattr(config, field)
        if field in config.model_fields_set and ours != value:
            raise UserError(
                f"LWOConfig sets {field} = {ours}, but {names[field]} = {value}, which counts; set"
                " it there, and leave it out of LWOConfig"
            )


def refuse_config(config: LWOConfig) -> None:
    """Raise UserError for what a loop with a scheduler of its own cannot honour."""
    if config.stateless_update == "backward":
        raise UserError(
            "stateless_update: backward needs the learning rate before the backward pass, which a"
            " scheduler of the loop may set after it; set stateless_update: step, or call"
            " lwo_dist.attach in a loop of your own"
        )


def refuse_accelerator(accelerator: Any) -> None:
    """Refuse an accelerator under which layers cannot be trained one at a time.

    Raises:
        UserError: with reason and remedy.
    """
    kind = accelerator.distributed_type
    if kind not in _DISTRIBUTED:
        raise UserError(
            f"accelerate's distributed_type {kind.value} is not supported; use one process, several"
            " on CPUs or GPUs, FSDP with version 2, or DeepSpeed"
        )
    if kind == DistributedType.FSDP and accelerator.state.fsdp_plugin.fsdp_version != 2:
        raise UserError(
            "FSDP with version 1 cannot be trained layer by layer; set fsdp_version: 2"
            " (fsdp_config in TrainingArguments)"
        )
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise UserError(
            f"mixed precision {accelerator.mixed_precision} is not supported: there is no loss"
            " scaling here; use bf16, or none"
        )
    if accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        raise UserError(
            "torch.compile of the whole model makes a graph for each layer, and gives up after"
            " some; turn it off (torch_compile in TrainingArguments), and call compile() on the"
            " model's layers instead"
        )
    parallelism = accelerator.parallelism_config
    for name in ("tp_size", "cp_size", "sp_size"):
        size = getattr(parallelism, name, 1)
        if size > 1:
            raise UserError(
                f"parallelism_config: {name} = {size} is not supported; layers are trained in data"
                " parallel only: leave it out"
            )


def refuse_model(accelerator: Any, model: nn.Module) -> None:
    """Refuse a model that is spread over devices, or compiled as a whole. Raises: UserError."""
    if accelerator.verify_device_map(model):
        raise UserError(
            "the model is spread over several devices (device_map); load it without, and shard it"
            " with FSDP or DeepSpeed"
        )
    if hasattr(model, "_orig_mod"):
        raise UserError(
            "the model is compiled as a whole, which makes a graph for each layer; pass the model"
            " itself, and call compile() on its layers"
        )


def reduce_in_fp32(accelerator: Any) -> None:
    """Let FSDP2 sum gradients in fp32. For bf16, accelerate's plugin says bf16, which rounds them.

    Call it before the model is sharded.
    """
    plugin = accelerator.state.fsdp_plugin
    policy = plugin.mixed_precision_policy
    if policy is None:
        return
    if (policy.reduce_dtype or policy.param_dtype) not in (None, torch.float32):
        plugin.mixed_precision_policy = dataclasses.replace(policy, reduce_dtype=torch.float32)


def complete_deepspeed(accelerator: Any) -> None:
    """Fill in what the DeepSpeed config leaves open; call it before the engine is made."""
    settings = accelerator.deepspeed_plugin.deepspeed_config
    # An offloaded optimizer need not be DeepSpeed's own, which needs a compiler.
    settings.setdefault("zero_force_ds_cpu_optimizer", False)
    # A model is saved whole, for from_pretrained.
    zero = settings.setdefault("zero_optimization", {})
    zero.setdefault("stage3_gather_16bit_weights_on_model_save", True)
