"""The published sizes of the models that pages and configs name, and what a run of one needs."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from lwo_dist.config import Config
from lwo_dist.layers import find_stacks
from lwo_dist.memory import DecoderSize, fsdp_bytes, lora_bytes, step_bytes
from lwo_dist.methods import Method
from lwo_dist.registry import METHODS

__all__ = [
    "QWEN_CODER",
    "USABLE",
    "adapter_numel",
    "largest_layer",
    "lora_peak",
    "lwo_peak",
    "model_of",
    "size_of",
]

USABLE = 0.9
"""Share of a GPU's memory that tensors may take; CUDA, NCCL and fragmentation take the rest."""

# From the models' config.json.
_SHAPES: dict[str, dict[str, Any]] = {
    "1.5B": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28}
    | {"num_attention_heads": 12, "num_key_value_heads": 2}
    | {"vocab_size": 151_936, "tie_word_embeddings": True},
    "7B": {"hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28}
    | {"num_attention_heads": 28, "num_key_value_heads": 4}
    | {"vocab_size": 152_064, "tie_word_embeddings": False},
    "14B": {"hidden_size": 5120, "intermediate_size": 13_824, "num_hidden_layers": 48}
    | {"num_attention_heads": 40, "num_key_value_heads": 8}
    | {"vocab_size": 152_064, "tie_word_embeddings": False},
    "32B": {"hidden_size": 5120, "intermediate_size": 27_648, "num_hidden_layers": 64}
    | {"num_attention_heads": 40, "num_key_value_heads": 8}
    | {"vocab_size": 152_064, "tie_word_embeddings": False},
}
QWEN_CODER = tuple(_SHAPES)
"""Sizes of Qwen2.5-Coder; the model's id is Qwen/Qwen2.5-Coder-<size>."""


@lru_cache
def model_of(size: str) -> nn.Module:
    """The model without memory: on the meta device."""
    with torch.device("meta"):
        model: nn.Module = Qwen2ForCausalLM(Qwen2Config(**_SHAPES[size]))
    return model


def size_of(model: nn.Module) -> DecoderSize:
    (stack,) = find_stacks(model)
    config: Any = model.config
    return DecoderSize(
        parameters=numel(model),
        stack_layers=len(stack.modules),
        stack_layer_parameters=numel(stack.modules[0]),
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        vocabulary=config.vocab_size,
    )


def numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def largest_layer(model: nn.Module, config: Config) -> int:
    """Parameters of the largest layer that the run of `config` ever trains at once."""
    method: Method = METHODS.get(config.method)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    layers = method.layers(model, config.lwo)
    return max(sum(sizes[name] for name in layer.parameter_names) for layer in layers)


def adapter_numel(model: nn.Module, rank: int) -> int:
    """Parameters of LoRA's adapters on all linear layers of the transformer layers."""
    (stack,) = find_stacks(model)
    linears = [module for module in stack.modules.modules() if isinstance(module, nn.Linear)]
    return sum(rank * (linear.in_features + linear.out_features) for linear in linears)


def lwo_peak(model: nn.Module, config: Config, world_size: int) -> int:
    """Bytes on the device of each rank at the worst moment of a step with `strategy: fsdp`, in
    bf16, of method lwo or full.
    """
    assert config.train.precision in ("auto", "bf16")
    size = size_of(model)
    active = largest_layer(model, config)
    held = fsdp_bytes(
        size.parameters,
        active,
        world_size,
        storage_bytes=2 if config.fsdp.storage == "bf16" else 4,
    )
    # Under full fine-tuning each sharded module's gradients are reduced as soon as they are there.
    whole = min(active, max(size.outside_parameters, size.stack_layer_parameters))
    step = step_bytes(
        size,
        sequences=micro_batch(config, world_size),
        length=config.train.sequence_length,
        gradient_numel=whole,
        checkpointing=config.train.gradient_checkpointing,
    )
    return sum(held.values()) + sum(step.values())


def lora_peak(model: nn.Module, config: Config, world_size: int, rank: int = 16) -> int:
    """The same of LoRA; nothing is sharded, and so nothing gathered, on a single rank."""
    size = size_of(model)
    adapters = adapter_numel(model, rank)
    step = step_bytes(
        size,
        sequences=micro_batch(config, world_size),
        length=config.train.sequence_length,
        gradient_numel=adapters // size.stack_layers,
        checkpointing=config.train.gradient_checkpointing,
        gathers=world_size > 1,
    )
    return sum(lora_bytes(size.parameters, adapters, world_size).values()) + sum(step.values())


def micro_batch(config: Config, world_size: int) -> int:
    """Sequences of a rank's micro-batch."""
    parts = world_size * config.lwo.gradient_accumulation_steps
    return config.train.global_batch_size // parts
