"""The loss of a language model without the logits of a whole batch.

[sequences, tokens, vocabulary] is by far the largest tensor of a step. Here the head computes only
the labelled positions, a chunk of them at a time, and each chunk's gradients along with its loss:
no chunk is kept, and none is computed twice.

How the head is computed apart from the rest of the forward pass is in `heads`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy, pad

from .errors import UserError
from .heads import Head, at_least_fp32, with_head

__all__ = [
    "IGNORED_LABEL",
    "Reading",
    "causal_lm_loss",
    "read",
    "summed_loss",
    "summed_loss_at",
]

IGNORED_LABEL = -100


def causal_lm_loss(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    *,
    reduction: str = "mean",
    chunk_size: int | None = None,
) -> Tensor:
    """`model(**batch).loss`, with a fraction of the memory.

    Args:
        model: a Hugging Face decoder, also under peft, `fully_shard` or a DeepSpeed engine; in a
            loop with the hook `lwo.model`.
        batch: the model's arguments, with `labels`, [sequences, tokens]; -100 is ignored.
        reduction: "mean" over the labels of this batch, or "sum".
        chunk_size: positions whose logits are computed at a time. None: so many that these have
            2**26 elements.

    Returns:
        The cross-entropy in nats, 0-dim, in fp32 (fp64 of a model in fp64).

    Raises:
        UserError: an encoder-decoder, or a mixture of experts that adds a loss of its router.
    """
    labels = batch["labels"]
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    config = getattr(getattr(model, "module", model), "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise UserError("causal_lm_loss is for decoders; use the loss of an encoder-decoder itself")
    if inputs.get("output_router_logits", getattr(config, "output_router_logits", False)):
        raise UserError(
            "causal_lm_loss does not add the router's loss (output_router_logits); use the model's"
            " own loss, or set output_router_logits to False"
        )
    if reduction not in ("mean", "sum"):
        raise UserError(f"reduction = {reduction!r}; use 'mean' or 'sum'")
    shifted = pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)
    total = summed_loss(model, inputs, shifted, chunk_size=chunk_size)
    return total if reduction == "sum" else total / (shifted != IGNORED_LABEL).sum().to(total)


def summed_loss(
    model: nn.Module,
    inputs: Mapping[str, Any],
    labels: Tensor,
    *,
    chunk_size: int | None = None,
) -> Tensor:
    """Sum of the cross-entropy over the labelled positions: nats, 0-dim, in fp32 or fp64.

    All ranks call it, also one without a labelled position.

    Args:
        inputs: the model's arguments.
        labels: [sequences, tokens], what each position of `inputs` is to predict; -100 is ignored.
            On the CPU they save a GPU from being waited for.
        chunk_size: as in `causal_lm_loss`.
    """
    return summed_loss_at(model, inputs, *_labelled(labels), labels.shape, chunk_size=chunk_size)


def summed_loss_at(
    model: nn.Module,
    inputs: Mapping[str, Any],
    positions: Tensor,
    targets: Tensor,
    shape: torch.Size,
    *,
    chunk_size: int | None = None,
) -> Tensor:
    """As `summed_loss`, of labels without values (on the meta device, or fake ones).

    Args:
        positions: [labels], among sequences x tokens.
        targets: [labels], what they are to predict.
        shape: [sequences, tokens].
    """

    def loss(head: Head) -> Tensor:
        rows = head.rows(positions)
        expected = targets.to(rows.device)
        size = chunk_size or head.chunk_size
        if not torch.is_grad_enabled():
            return _losses(head, rows, expected, size).sum()
        if head.in_one_piece:
            return cross_entropy(head.logits(rows), expected, reduction="sum")
        apply: Callable[..., Tensor] = _SummedLoss.apply
        return apply(head, expected, size, rows, *head.trained)

    return with_head(model, inputs, shape, loss)


@dataclass(frozen=True)
class Reading:
    """What a model makes of given targets."""

    losses: Tensor
    """[sequences, tokens], nats: the loss of each labelled position, else 0."""
    logits: Tensor
    """[sequences, vocabulary], of one position."""
    output: Any
    """The model's own, without its logits."""


@torch.no_grad()
def read(
    model: nn.Module, inputs: Mapping[str, Any], labels: Tensor, *, logits_of: int = -1
) -> Reading:
    """Read targets: each one's loss, for evaluation.

    All ranks call it where a forward pass is a collective.

    Args:
        inputs, labels: as in `summed_loss`.
        logits_of: the position along the tokens whose logits are returned.
    """
    positions, targets = _labelled(labels)

    def reading(head: Head) -> tuple[Tensor, Tensor]:
        rows = head.rows(positions)
        found = _losses(head, rows, targets.to(rows.device), head.chunk_size)
        losses = found.new_zeros(labels.numel())
        losses[positions.to(rows.device)] = found
        outputs.append(head.output)
        return losses.view(labels.shape), head.logits(head.hidden[:, logits_of])

    outputs: list[Any] = []
    losses, logits = with_head(model, inputs, labels.shape, reading)
    return Reading(losses, logits, outputs[0])


# ---- the loss of a chunk after the other


class _SummedLoss(torch.autograd.Function):
    """Its gradients are computed in the forward pass, for an incoming gradient of 1."""

    @staticmethod
    def forward(
        ctx: Any, head: Head, targets: Tensor, size: int, rows: Tensor, *trained: Tensor
    ) -> Tensor:
        total = rows.new_zeros((), dtype=at_least_fp32(rows.dtype))
        of_rows = torch.empty_like(rows) if ctx.needs_input_grad[3] else None
        sums: list[Tensor | None] = []
        # At least once: of no positions the gradients are zeros, which other ranks wait for.
        for start in range(0, max(len(rows), 1), size):
            chunk = rows[start : start + size].detach().requires_grad_(of_rows is not None)
            with torch.enable_grad():
                logits = head.logits(chunk)
                loss = cross_entropy(logits, targets[start : start + size], reduction="sum")
                del logits
            wanted = [*trained, chunk] if of_rows is not None else trained
            found = torch.autograd.grad(loss, wanted, allow_unused=True)
            total += loss.detach()
            if of_rows is not None:
                of_rows[start : start + size] = found[-1]
            sums = _added(sums, found[: len(trained)])
        gradients = [
            None if of_one is None else of_one.to(parameter.dtype)
            for of_one, parameter in zip(sums, trained, strict=True)
        ]
        ctx.save_for_backward(of_rows, *gradients)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        # In place: a head's gradient is large. Another backward of a retained graph is an error.
        scaled = [None if saved is None else saved.mul_(gradient) for saved in ctx.saved_tensors]
        return (None, None, None, *scaled)


def _added(sums: list[Tensor | None], more: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """In fp32: sums of many chunks would lose much in 16 bits."""
    if not sums:
        return [None if new is None else new.to(at_least_fp32(new.dtype)) for new in more]
    return [
        old if old is None or new is None else old.add_(new)
        for old, new in zip(sums, more, strict=True)
    ]


def _losses(head: Head, rows: Tensor, targets: Tensor, size: int) -> Tensor:
    """[rows], without gradients."""
    if head.in_one_piece:
        size = max(len(rows), 1)
    return torch.cat(
        [
            cross_entropy(head.logits(chunk), expected, reduction="none")
            for chunk, expected in zip(rows.split(size), targets.split(size), strict=True)
        ]
    )


def _labelled(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the labelled positions among all, and their labels."""
    flat = labels.flatten()
    positions = (flat != IGNORED_LABEL).nonzero().flatten()
    return positions, flat[positions]
