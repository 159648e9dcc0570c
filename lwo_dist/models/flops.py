"""Floating-point operations of an optimizer step, counted without computing anything."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lwo_dist.layers import Visit, find_stacks
from lwo_dist.losses import IGNORED_LABEL, summed_loss
from lwo_dist.names import named_parameters
from lwo_dist.orthogonal import orthogonalise_flops
from lwo_dist.prefix import starting_layers
from lwo_dist.sublayers import detached, find_sublayers
from lwo_dist.suffix import droppable

__all__ = ["flops_per_sequence", "update_flops"]


def flops_per_sequence(
    model: nn.Module,
    visits: Sequence[Visit],
    sequence_length: int,
    label_tokens: int,
    *,
    batches: str = "fresh",
    suffix_backward: float = 1.0,
    drops_trained: bool = False,
) -> float:
    """Forward and backward of one sequence, in floating-point operations; a mean over the visits.

    Counted by torch's FlopCounterMode on the meta device: matrix products and attention, two
    operations per multiply-add, recomputed activations included. Attention counts all pairs of
    tokens, also masked ones; the head counts the labelled positions.

    With `suffix_backward` below 1 it is the expectation over the steps' choices at uniform rates.
    Other rates have the same one; under activation checkpointing about the same, as a layer is
    recomputed if any of its sublayers passes a gradient.

    Args:
        model: with the method's changes made; it is moved to the meta device.
        visits: one cycle; each is as long as the others.
        sequence_length: in tokens.
        label_tokens: how many of them count in the loss.
        batches: `lwo.batches`; "cycle" leaves out the layers that are passed over where the hidden
            states of all batches are kept.
        suffix_backward, drops_trained: as in `lwo_dist.suffix`.
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
    starts = starting_layers(model, visits) if batches == "cycle" else [0] * len(visits)
    sublayers = find_sublayers(model) if suffix_backward < 1.0 else []
    # Layers choose independently, and all at the same rates: let all make the same choice.
    places = 1 + max((sublayer.place for sublayer in sublayers), default=-1)
    total = 0.0
    for visit, start in zip(visits, starts, strict=True):
        trained = {name for layer in visit.layers for name in layer.parameter_names}
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in trained)
        suffix = droppable(sublayers, visit, drops_trained=drops_trained)
        for choice in product((False, True), repeat=places if suffix else 0):
            share = suffix_backward ** choice.count(False) * (1 - suffix_backward) ** sum(choice)
            dropped = [sublayers[i] for i in suffix if choice[sublayers[i].place]]
            with detached(dropped):
                total += share * _flops_of_step(model, inputs, labels, start)
        for parameter in parameters.values():
            parameter.grad = None
    return total / len(visits)


def update_flops(model: nn.Module, visits: Sequence[Visit]) -> float:
    """Matrix products of an update, all ranks together; a mean over the visits.

    Only layers that are updated without state have any (`lwo.stateless`): their number does not
    depend on the batch.
    """
    shapes = {name: parameter.shape for name, parameter in named_parameters(model).items()}
    of_visits = [
        orthogonalise_flops(
            shapes[name] for layer in visit.stateless for name in layer.parameter_names
        )
        for visit in visits
    ]
    return sum(of_visits) / len(visits)


def _flops_of_step(model: nn.Module, inputs: dict[str, Tensor], labels: Tensor, start: int) -> int:
    """Without the forward pass of the first `start` transformer layers."""
    with FlopCounterMode(display=False) as counter:
        loss = summed_loss(model, inputs, labels)
        if loss.requires_grad:  # not where all that is trained is dropped
            loss.backward()
    flops: int = counter.get_total_flops()
    if start:
        stack = f"{type(model).__name__}.{find_stacks(model)[0].path}"
        of_modules = counter.get_flop_counts()
        flops -= sum(sum(of_modules[f"{stack}.{i}"].values()) for i in range(start))
    return flops
