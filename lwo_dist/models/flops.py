"""Floating-point operations of an optimizer step, counted without computing anything."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lwo_dist.layers import Visit
from lwo_dist.losses import IGNORED_LABEL, summed_loss

__all__ = ["flops_per_sequence"]


def flops_per_sequence(
    model: nn.Module, visits: Sequence[Visit], sequence_length: int, label_tokens: int
) -> float:
    """Forward and backward of one sequence, in floating-point operations; a mean over the visits.

    Counted by torch's FlopCounterMode on the meta device: matrix products and attention, two
    operations per multiply-add, recomputed activations included. Attention counts all pairs of
    tokens, also masked ones; the head counts the labelled positions.

    Args:
        model: with the method's changes made; it is moved to the meta device.
        visits: one cycle; each is as long as the others.
        sequence_length: in tokens.
        label_tokens: how many of them count in the loss.
    """
    model = model.to("meta").train()
    parameters = dict(model.named_parameters())
    inputs = {
        "input_ids": torch.zeros((1, sequence_length), dtype=torch.int64, device="meta"),
        # A mask of this shape is taken as it is; for any other, transformers looks at its values.
        "attention_mask": torch.zeros((1, 1, sequence_length, sequence_length), device="meta"),
    }
    labels = torch.full((1, sequence_length), IGNORED_LABEL)
    labels[:, :label_tokens] = 0
    total = 0
    for visit in visits:
        trained = {name for layer in visit.layers for name in layer.parameter_names}
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in trained)
        with FlopCounterMode(display=False) as counter:
            summed_loss(model, inputs, labels).backward()
        total += counter.get_total_flops()
        for parameter in parameters.values():
            parameter.grad = None
    return total / len(visits)
