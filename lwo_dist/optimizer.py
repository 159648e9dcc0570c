"""The optimizer of a visit: AdamW with one parameter group per layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .config import LWOConfig

__all__ = ["make_adamw"]


def make_adamw(config: LWOConfig, shards: Sequence[Sequence[Tensor]]) -> torch.optim.Optimizer:
    """A new AdamW (Loshchilov and Hutter, 2019) over `shards`, one sequence of tensors per layer.

    Fused, because the fused kernel can skip a step based on a device tensor (`found_inf`).
    """
    return torch.optim.AdamW(
        [{"params": list(layer)} for layer in shards],
        lr=config.peak_lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )
