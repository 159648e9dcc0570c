"""A method is a function that says which parameters are trained together: model, config -> list of
layers.

`full` is the schedule of one element through the same hook, so nothing else in the package asks for
the method.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from .config import LWOConfig
from .layers import Layer, find_layers

__all__ = ["METHODS", "full", "lwo"]


def lwo(model: nn.Module, config: LWOConfig) -> list[Layer]:
    """One layer at a time: the embedding, each transformer layer (or group of them), the head."""
    return find_layers(
        model,
        train_embeddings=config.train_embeddings,
        train_head=config.train_head,
        layers_per_group=config.layers_per_group,
    )


def full(model: nn.Module, config: LWOConfig) -> list[Layer]:
    """Full fine-tuning: one layer that holds every parameter."""
    return [Layer("all", tuple(name for name, _ in model.named_parameters()), depth=0)]


METHODS: dict[str, Callable[[nn.Module, LWOConfig], list[Layer]]] = {"lwo": lwo, "full": full}
