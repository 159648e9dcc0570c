"""Layer-wise optimisation: one layer at a time, every layer in turn."""

from __future__ import annotations

from torch import nn

from lwo_dist.config import LWOConfig
from lwo_dist.layers import Layer, find_layers

from .base import Method

__all__ = ["LayerWise"]


class LayerWise(Method):
    """The embedding, each transformer layer (or group of neighbours), the head."""

    name = "lwo"
    rate_times_width = 0.6  # 1.0e-3 for SmolLM2-135M
    own_settings = (
        "lwo.stateless",  # first: the next two depend on it
        "lwo.embeddings",
        "lwo.head_rows",
        "lwo.stateless_every",
        "lwo.stateless_update",
    )
    free_on_resume = ("lwo.stateless_update",)

    def layers(self, model: nn.Module, config: LWOConfig) -> list[Layer]:
        return find_layers(
            model,
            train_embeddings=config.train_embeddings,
            train_head=config.train_head,
            layers_per_group=config.layers_per_group,
        )
