"""A model as a run makes it: by the builder of a strategy, from a pretrained one."""

from __future__ import annotations

from typing import Any

import torch

from lwo_dist.config import Config, ModelConfig, TrainConfig
from lwo_dist.models import PretrainedSource
from lwo_dist.registry import METHODS, STRATEGIES


def load_model(model: ModelConfig, train: TrainConfig, *, strategy: str) -> Any:
    config = Config(model=model, train=train, strategy=strategy)
    source = PretrainedSource(model, gradient_checkpointing=train.gradient_checkpointing)
    builder = STRATEGIES.get(strategy)
    return builder.build(source, METHODS.get("lwo"), config, torch.device("cpu"))
