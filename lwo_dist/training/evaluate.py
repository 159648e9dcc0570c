"""Scores on held-out lines: each rank completes a share of them, every rank gets the scores of all.

Batches are cut from the lines once, longest context first, and dealt out to the ranks; they are the
same whatever the number of ranks, so the scores are too. A context is computed once: its cache
serves both the loss of the reference line and the greedy completion.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from transformers import Cache, GenerationConfig

from lwo_dist.data.examples import EvalExample, pad_id
from lwo_dist.tasks import Task, completion, metrics

__all__ = ["Evaluation", "Sample", "evaluate"]

_SAMPLES = 8


@dataclass(frozen=True)
class Sample:
    """One held-out line and what the model made of it."""

    name: str
    line: int
    context: str
    """The last lines before it."""
    reference: str
    prediction: str


@dataclass(frozen=True)
class Evaluation:
    """Scores of the held-out lines, those by line in the order of the lines. Equal on every
    rank.
    """

    scores: dict[str, float]
    """`eval/loss` (nats; the mean over all tokens of all lines), `eval/exact_match`,
    `eval/edit_similarity`, `eval/bleu` (0 to 100) and `eval/lines`."""
    loss: npt.NDArray[np.float64]
    """[lines], nats; the mean over the tokens of the line."""
    tokens: npt.NDArray[np.int64]
    """[lines], tokens that the loss of the line is the mean of."""
    exact_match: npt.NDArray[np.float64]
    """[lines], 0 or 100."""
    edit_similarity: npt.NDArray[np.float64]
    """[lines], 0 to 100."""
    predictions: tuple[str, ...]
    samples: tuple[Sample, ...]
    """A few, spread evenly over the lines."""


@dataclass(frozen=True)
class _Batch:
    """Contexts, padded on the left, and behind them the targets, padded on the right: [lines, width
    + targets].
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    width: int
    target_lengths: list[int]


@torch.no_grad()
def evaluate(
    model: nn.Module,
    tokenizer: Any,
    lines: Sequence[EvalExample],
    *,
    batch_size: int,
    max_new_tokens: int,
    rank: int = 0,
    world_size: int = 1,
    synced: bool = False,
    device: torch.device | str = "cpu",
    task: Task = completion,
    before_batch: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Complete `lines` greedily and score the completions; a collective where `world_size` is above
    1.

    Args:
        model: a Hugging Face decoder, plain or `fully_shard`ed. Its modes and its generation_config
            are given back as they were.
        batch_size: lines completed at once on a rank.
        max_new_tokens: where a completion is cut.
        synced: every forward is a collective, as under FSDP2: all ranks then run equally many
            batches and decoding steps, the surplus ones for nothing.
        before_batch: called equally often on every rank, so it may be a collective; what it raises
            ends the evaluation.
    """
    ordered = sorted(range(len(lines)), key=lambda i: (-len(lines[i].context), i))
    batches = [ordered[i : i + batch_size] for i in range(0, len(ordered), batch_size)]
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        pad_token_id=pad_id(tokenizer),
        eos_token_id=task.end_token_ids(tokenizer),
    )
    synced = synced and world_size > 1
    results: list[tuple[int, float, str]] = []
    with _evaluating(model):
        for first in range(0, len(batches), world_size):
            before_batch()
            number = first + rank
            if number >= len(batches) and not synced:
                break
            indices = batches[min(number, len(batches) - 1)]
            batch = _collate([lines[i] for i in indices], config.pad_token_id, torch.device(device))
            losses, written = _complete(model, batch, config, synced)
            if number < len(batches):
                texts = [task.decode(tokenizer, token_ids) for token_ids in written]
                results += zip(indices, losses, texts, strict=True)
    gathered = [results]
    if world_size > 1:
        gathered = [[] for _ in range(world_size)]
        dist.all_gather_object(gathered, results)
    return _score(tokenizer, lines, sorted(result for part in gathered for result in part))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and no generation settings but ours: a model's own may ask for sampling or
    penalties.
    """
    modes = {module: module.training for module in model.modules()}
    generation_config = model.generation_config
    model.eval()
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = generation_config
        for module, training in modes.items():
            module.training = training


def _collate(lines: Sequence[EvalExample], pad: int, device: torch.device) -> _Batch:
    width = max(len(line.context) for line in lines)
    targets = max(len(line.target) for line in lines)
    input_ids = torch.full((len(lines), width + targets), pad, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for i, line in enumerate(lines):
        here = slice(width - len(line.context), width + len(line.target))
        input_ids[i, here] = torch.tensor([*line.context, *line.target])
        attention_mask[i, here] = 1
    return _Batch(
        input_ids.to(device), attention_mask.to(device), width, [len(line.target) for line in lines]
    )


def _complete(
    model: Any, batch: _Batch, config: GenerationConfig, synced: bool
) -> tuple[list[float], list[list[int]]]:
    """The summed loss of each line's target, and the tokens written in its place."""
    accepted = inspect.signature(model.forward).parameters
    positions = (batch.attention_mask.cumsum(-1) - 1).clamp(min=0)

    def forward(start: int, end: int, **more: Any) -> Any:
        inputs = {
            "attention_mask": batch.attention_mask[:, :end],
            "position_ids": positions[:, start:end],
            **more,
        }
        inputs = {name: value for name, value in inputs.items() if name in accepted}
        return model(input_ids=batch.input_ids[:, start:end], **inputs)

    # All but the last token of the context: generate() goes on from that one, and so does the loss.
    cached, cache = batch.width - 1, None
    if cached:
        cache = getattr(
            forward(0, cached, use_cache=True, logits_to_keep=1), "past_key_values", None
        )
    if not isinstance(
        cache, Cache
    ):  # a model with a cache of its own kind computes the context twice
        cached, cache = 0, None
    targets = batch.input_ids[:, batch.width :]
    keep = targets.shape[1]
    more = {
        "past_key_values": copy.deepcopy(cache),
        "use_cache": cache is not None,
        "logits_to_keep": keep,
    }
    logits = forward(cached, batch.input_ids.shape[1] - 1, **more).logits[:, -keep:]
    # Row by row: another copy of [lines, tokens, vocabulary] would be the largest thing in memory.
    losses = torch.stack(
        [
            functional.cross_entropy(row[:length].float(), target[:length], reduction="sum")
            for row, target, length in zip(logits, targets, batch.target_lengths, strict=True)
        ]
    )
    written = model.generate(
        batch.input_ids[:, : batch.width],
        attention_mask=batch.attention_mask[:, : batch.width],
        generation_config=config,
        synced_gpus=synced,
        **({} if cache is None else {"past_key_values": cache}),
    )
    return losses.tolist(), written[:, batch.width :].tolist()


def _score(
    tokenizer: Any, lines: Sequence[EvalExample], results: list[tuple[int, float, str]]
) -> Evaluation:
    references = [line.text for line in lines]
    predictions = [text for _, _, text in results]
    tokens = np.array([len(line.target) for line in lines], dtype=np.int64)
    losses = np.array([loss for _, loss, _ in results], dtype=np.float64)
    exact_match = metrics.exact_matches(predictions, references)
    edit_similarity = metrics.edit_similarities(predictions, references)
    scores = {
        "eval/loss": float(losses.sum() / tokens.sum()),
        "eval/exact_match": float(exact_match.mean()),
        "eval/edit_similarity": float(edit_similarity.mean()),
        "eval/bleu": metrics.bleu(predictions, references),
        "eval/lines": float(len(lines)),
    }
    spread = (
        [i * len(lines) // _SAMPLES for i in range(_SAMPLES)]
        if len(lines) > _SAMPLES
        else range(len(lines))
    )
    samples = tuple(_sample(tokenizer, lines[i], predictions[i]) for i in spread)
    return Evaluation(
        scores, losses / tokens, tokens, exact_match, edit_similarity, tuple(predictions), samples
    )


def _sample(tokenizer: Any, line: EvalExample, prediction: str) -> Sample:
    before = str(tokenizer.decode(list(line.context), clean_up_tokenization_spaces=False)).split(
        "\n"
    )[-4:-1]
    return Sample(line.name, line.line, "\n".join(before), line.text, prediction)
