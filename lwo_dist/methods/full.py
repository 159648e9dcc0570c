"""Full fine-tuning: a single layer with all parameters, never switched."""

from __future__ import annotations

from torch import nn

from lwo_dist.config import Config, LWOConfig
from lwo_dist.errors import UserError
from lwo_dist.layers import Layer

from .base import Method

__all__ = ["FullFineTuning"]


class FullFineTuning(Method):
    """The baseline for LWO, using the same hook, strategies and trainer."""

    name = "full"
    rate_times_width = 0.1  # 1.7e-4 for SmolLM2-135M
    drops_trained = True

    def check(self, config: Config) -> None:
        if config.lwo.state == "keep":
            raise UserError(
                "lwo.state: keep has no effect with method: full, which never switches; drop it"
            )
        if config.lwo.batches == "cycle":
            raise UserError(
                "lwo.batches: cycle has no effect with method: full, which never switches; drop it"
            )
        if config.fsdp.storage == "bf16":
            raise UserError(
                "fsdp.storage: bf16 cannot be used with method: full; set method: lwo, or "
                "fsdp.storage: fp32"
            )

    def layers(self, model: nn.Module, config: LWOConfig) -> list[Layer]:
        return [Layer("all", tuple(name for name, _ in model.named_parameters()), depth=0)]
