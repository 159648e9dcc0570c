"""Answers of an encoder-decoder: one forward gives the losses of the targets, and generation
starts from the output of its encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.modeling_outputs import BaseModelOutput

from lwo_dist.data.examples import EvalExample
from lwo_dist.losses import IGNORED_LABEL, read

__all__ = ["answer"]


def answer(
    model: Any,
    rows: Sequence[EvalExample],
    config: GenerationConfig,
    *,
    generates: bool,
    device: torch.device,
    synced: bool,
) -> tuple[list[float], list[list[int]]]:
    """The summed loss of each target, and the tokens generated in its place.

    Args:
        rows: contexts are the encoder's input, targets the decoder's output.
        config: with the first token of the decoder.
        generates: if not, there are the losses only.
        synced: all ranks run the same number of decoding steps.
    """
    pad: Any = config.pad_token_id
    input_ids = _padded([row.context for row in rows], pad, device)
    attention_mask = _padded([[1] * len(row.context) for row in rows], 0, device)
    targets = _padded([row.target for row in rows], pad, device)
    start: Any = config.decoder_start_token_id
    begin = torch.full_like(targets[:, :1], start)
    # The root's own forward: under FSDP2 it gathers the embedding, which the encoder needs too.
    inputs = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "decoder_input_ids": torch.cat([begin, targets[:, :-1]], dim=1),
        "use_cache": False,
    }
    labels = _padded([row.target for row in rows], IGNORED_LABEL, torch.device("cpu"))
    reading = read(model, inputs, labels)
    losses = reading.losses.sum(1).tolist()
    if not generates:
        return losses, []
    hidden = reading.output.encoder_last_hidden_state
    written = model.generate(
        encoder_outputs=BaseModelOutput(last_hidden_state=hidden),
        attention_mask=attention_mask,
        generation_config=config,
        synced_gpus=synced,
    )
    return losses, written[:, 1:].tolist()


def _padded(rows: Sequence[Sequence[int]], value: int, device: torch.device) -> torch.Tensor:
    """[rows, longest], padded on the right."""
    padded = torch.full((len(rows), max(map(len, rows))), value, dtype=torch.int64)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = torch.tensor(row)
    return padded.to(device)
