"""Losses of whole targets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

__all__ = ["summed_losses"]


def summed_losses(
    logits: torch.Tensor, targets: torch.Tensor, lengths: Sequence[int]
) -> torch.Tensor:
    """[examples], nats: the summed loss of each target.

    Args:
        logits: [examples, targets, vocabulary].
        targets: [examples, targets], padded on the right.
        lengths: tokens of each target.
    """
    # Row by row: another copy of [examples, tokens, vocabulary] would dominate memory.
    return torch.stack(
        [
            functional.cross_entropy(row[:length].float(), target[:length], reduction="sum")
            for row, target, length in zip(logits, targets, lengths, strict=True)
        ]
    )
