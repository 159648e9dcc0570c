"""The published sizes of the models that pages and configs name, and what a run of one needs."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from lwo_dist.config import Config, LWOConfig, TrainConfig
from lwo_dist.methods import Method
from lwo_dist.plan.estimate import Plan, plan_one
from lwo_dist.plan.subject import Subject
from lwo_dist.registry import METHODS

__all__ = [
    "QWEN_CODER",
    "largest_layer",
    "model_of",
    "numel",
    "peak",
    "plan",
]

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


def numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def largest_layer(model: nn.Module, config: Config) -> int:
    """Parameters of the largest layer that the run of `config` ever trains at once."""
    method: Method = METHODS.get(config.method)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    layers = method.layers(model, config.lwo)
    return max(sum(sizes[name] for name in layer.parameter_names) for layer in layers)


def peak(size: str, config: Config, world_size: int) -> int:
    """Bytes on the device of each rank at the worst moment of a step, in bf16."""
    return plan(size, config, world_size).peak.total


def plan(size: str, config: Config, world_size: int) -> Plan:
    """For bf16."""
    assert config.train.precision in ("auto", "bf16")
    return plan_one(subject(size, config), config, world_size, bf16=True)


def subject(size: str, config: Config) -> Subject:
    checkpointing = config.train.gradient_checkpointing
    return _subject(size, config.method, checkpointing, config.lwo.model_dump_json())


@lru_cache
def _subject(size: str, method: str, checkpointing: bool, lwo: str) -> Subject:
    train = TrainConfig(gradient_checkpointing=checkpointing)
    config = Config(method=method, train=train, lwo=LWOConfig.model_validate_json(lwo))
    return Subject(config, METHODS.get(method), Path(), Qwen2Config(**_SHAPES[size]))
