"""Floating-point operations of an optimizer step, counted without computing anything."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lwo_dist.layers import Visit, find_stacks
from lwo_dist.prefix import starting_layers

__all__ = ["flops_per_sequence"]


def flops_per_sequence(
    model: nn.Module,
    visits: Sequence[Visit],
    sequence_length: int,
    *,
    batches: str = "fresh",
) -> float:
    """Forward and backward of one sequence, in floating-point operations; a mean over the visits.

    Counted by torch's FlopCounterMode on the meta device: matrix products and attention, two
    operations per multiply-add, recomputed activations included. Attention counts all pairs of
    tokens, also masked ones.

    Args:
        model: with the method's changes made; it is moved to the meta device.
        visits: one cycle; each is as long as the others.
        sequence_length: in tokens.
        batches: `lwo.batches`; "cycle" leaves out the layers that are passed over where the hidden
            states of all batches are kept.
    """
    model = model.to("meta").train()
    parameters = dict(model.named_parameters())
    tokens = torch.zeros((1, sequence_length), dtype=torch.int64, device="meta")
    # A mask of this shape is taken as it is; for any other, transformers looks at its values.
    mask = torch.zeros((1, 1, sequence_length, sequence_length), device="meta")
    starts = starting_layers(model, visits) if batches == "cycle" else [0] * len(visits)
    total = 0
    for visit, start in zip(visits, starts, strict=True):
        trained = {name for layer in visit.layers for name in layer.parameter_names}
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in trained)
        with FlopCounterMode(display=False) as counter:
            logits = model(input_ids=tokens, attention_mask=mask).logits
            logits.flatten(0, 1).logsumexp(-1).sum().backward()
        total += counter.get_total_flops()
        if start:
            stack = f"{type(model).__name__}.{find_stacks(model)[0].path}"
            of_modules = counter.get_flop_counts()
            total -= sum(sum(of_modules[f"{stack}.{i}"].values()) for i in range(start))
        for parameter in parameters.values():
            parameter.grad = None
    return total / len(visits)
