"""Scores on held-out examples: each rank answers a share of them, all ranks get all the scores.

Batches are formed once, longest context first, and distributed over the ranks; they do not depend
on the number of ranks, so neither do the scores. Each context is computed once: its cache serves
both the loss of the reference and the greedy answer, whose first token is chosen among those that
begin with what is known. Where an example has choices, the answer is the most probable of them, and
one forward gives the losses of all. An encoder-decoder answers in `encoded`. The task decides what
is scored, and how.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from transformers import Cache, GenerationConfig

from lwo_dist import distributed
from lwo_dist.data.examples import EvalExample, pad_id, token_texts
from lwo_dist.errors import UserError
from lwo_dist.losses import IGNORED_LABEL, read
from lwo_dist.tasks.base import Task
from lwo_dist.tasks.scores import Column, Scores

from .encoded import answer

__all__ = ["Evaluation", "Sample", "evaluate"]

_SAMPLES = 512  # the report shows those among them that changed


@dataclass(frozen=True)
class Sample:
    """One held-out example and the model's answer."""

    index: int
    """Among the held-out examples."""
    name: str
    line: int
    context: str
    """The end of its context, as shown by the task."""
    reference: str
    prediction: str


@dataclass(frozen=True)
class Evaluation:
    """Scores of the held-out examples. Equal on every rank."""

    scores: dict[str, float]
    """`eval/<name>` for all of the task's `scores`, in their order; then the number of examples,
    such as `eval/lines`."""
    columns: Mapping[str, Column]
    """Name of each per-example score -> [examples], in the order of the examples."""
    tokens: npt.NDArray[np.int64]
    """[examples], tokens of each target."""
    bytes: npt.NDArray[np.int64]
    """[examples], UTF-8 bytes of the text of each target."""
    predictions: tuple[str, ...]
    samples: tuple[Sample, ...]
    """At most `_SAMPLES`, spread evenly over the examples."""


@dataclass(frozen=True)
class _Batch:
    """Left-padded contexts, followed by right-padded targets: [examples, width + targets]."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    """The target that each position predicts."""
    width: int
    first_tokens: list[torch.Tensor | None]
    """For each example the ids with which its answer may begin; None: all."""


@torch.no_grad()
def evaluate(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[EvalExample],
    *,
    task: Task,
    batch_size: int,
    max_new_tokens: int,
    rank: int = 0,
    world_size: int = 1,
    synced: bool = False,
    decoder_start: int | None = None,
    device: torch.device | str = "cpu",
    before_batch: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Answer `examples` greedily and score the answers; a collective if `world_size` is above 1.

    Args:
        model: a Hugging Face decoder or encoder-decoder, plain or `fully_shard`ed. Its modes and
            generation_config are restored afterwards.
        batch_size: examples answered at once on a rank.
        max_new_tokens: maximum length of an answer.
        synced: every forward is a collective, as under FSDP2: all ranks then run the same number of
            batches and decoding steps, some of them only as padding.
        decoder_start: first token of the decoder, if the model is an encoder-decoder.
        before_batch: called the same number of times on every rank, so it may be a collective; an
            exception in it ends the evaluation.
    """
    ordered = sorted(range(len(examples)), key=lambda i: (-len(examples[i].context), i))
    batches = [ordered[i : i + batch_size] for i in range(0, len(ordered), batch_size)]
    # The first token of a decoder's answer is chosen by us.
    generated = max(max_new_tokens - 1, 1) if decoder_start is None else max_new_tokens
    config = GenerationConfig(
        max_new_tokens=generated,
        decoder_start_token_id=decoder_start,
        do_sample=False,
        use_cache=True,
        pad_token_id=pad_id(tokenizer),
        eos_token_id=task.end_token_ids(tokenizer),
    )
    synced = synced and world_size > 1
    first_tokens = _first_tokens(tokenizer, examples, torch.device(device))
    answers: list[tuple[int, float, list[int]]] = []
    with _evaluating(model):
        for first in range(0, len(batches), world_size):
            before_batch()
            number = first + rank
            if number >= len(batches) and not synced:
                break
            indices = batches[min(number, len(batches) - 1)]
            part = [examples[i] for i in indices]
            rows = _choice_rows(part) if part[0].choices else part
            if decoder_start is not None:
                losses, written = answer(
                    model,
                    rows,
                    config,
                    generates=not part[0].choices,
                    device=torch.device(device),
                    synced=synced,
                )
            else:
                batch = _collate(rows, config.pad_token_id, first_tokens, torch.device(device))
                if part[0].choices:
                    losses, written = _choice_losses(model, batch), []
                else:
                    losses, written = _complete(model, batch, config, synced)
            if part[0].choices:
                losses, written = _chosen(losses, part)
            if number < len(batches):
                answers += zip(
                    indices, losses, (tokens[:max_new_tokens] for tokens in written), strict=True
                )
    results: list[tuple[int, float, str]] = []
    # Not between the forward passes: a task that fails on one rank would leave the others there.
    with distributed.errors_on_all_ranks():
        results += [
            (i, loss, task.decode(tokenizer, examples[i], tokens)) for i, loss, tokens in answers
        ]
    gathered = [results]
    if world_size > 1:
        gathered = [[] for _ in range(world_size)]
        dist.all_gather_object(gathered, results)
    results = sorted(result for part in gathered for result in part)
    return _scored(task, tokenizer, examples, results)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode with only our generation settings: the model's may sample or penalise."""
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


def _first_tokens(
    tokenizer: Any, examples: Sequence[EvalExample], device: torch.device
) -> dict[str, torch.Tensor]:
    """Each `begins_with` of the examples -> the ids of the tokens that start with it."""
    known = {example.begins_with for example in examples} - {""}
    texts = token_texts(tokenizer) if known else []
    return {
        begin: torch.tensor(
            [i for i, text in enumerate(texts) if text.startswith(begin)], device=device
        )
        for begin in known
    }


def _collate(
    examples: Sequence[EvalExample],
    pad: int,
    first_tokens: Mapping[str, torch.Tensor],
    device: torch.device,
) -> _Batch:
    width = max(len(example.context) for example in examples)
    targets = max(len(example.target) for example in examples)
    input_ids = torch.full((len(examples), width + targets), pad, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORED_LABEL)
    for i, example in enumerate(examples):
        here = slice(width - len(example.context), width + len(example.target))
        input_ids[i, here] = torch.tensor([*example.context, *example.target])
        attention_mask[i, here] = 1
        predicting = slice(width - 1, width - 1 + len(example.target))
        labels[i, predicting] = torch.tensor(example.target)
    return _Batch(
        input_ids.to(device),
        attention_mask.to(device),
        labels,
        width,
        [first_tokens.get(example.begins_with) for example in examples],
    )


def _choice_rows(examples: Sequence[EvalExample]) -> list[EvalExample]:
    """Each example once for each of its choices, as its target."""
    return [
        replace(example, target=choice, begins_with="")
        for example in examples
        for choice in example.choices
    ]


def _choice_losses(model: Any, batch: _Batch) -> list[float]:
    """The summed loss of each target."""
    found: list[float] = (
        read(model, _inputs(model, batch, 0, -1), batch.labels[:, :-1]).losses.sum(1).tolist()
    )
    return found


def _chosen(
    losses_of_rows: Sequence[float], examples: Sequence[EvalExample]
) -> tuple[list[float], list[list[int]]]:
    """The summed loss of each target, and the tokens of the choice with the least.

    Args:
        losses_of_rows: of `_choice_rows`.
    """
    of_rows = iter(losses_of_rows)
    losses, chosen = [], []
    for example in examples:
        found = [next(of_rows) for _ in example.choices]
        tokens = [list(choice) for choice in example.choices]
        losses.append(found[tokens.index(list(example.target))])
        chosen.append(tokens[int(np.argmin(found))])
    return losses, chosen


def _complete(
    model: Any, batch: _Batch, config: GenerationConfig, synced: bool
) -> tuple[list[float], list[list[int]]]:
    """The summed loss of each target, and the tokens generated in its place."""
    # All but the last token of the context, from which both generate() and the loss continue.
    cached, cache = batch.width - 1, None
    if cached:
        inputs = _inputs(model, batch, 0, cached, use_cache=True)
        context = read(model, inputs, batch.labels[:, :cached])
        cache = getattr(context.output, "past_key_values", None)
    if not isinstance(cache, Cache):  # with a custom cache class, compute the context twice
        cached = 0
        cache = None
    more = {"past_key_values": copy.deepcopy(cache), "use_cache": cache is not None}
    inputs = _inputs(model, batch, cached, -1, **more)
    begin = batch.width - 1 - cached  # of the targets' logits
    targets = read(model, inputs, batch.labels[:, cached:-1], logits_of=begin)
    first = torch.stack(
        [
            row.argmax() if allowed is None else allowed[row[allowed].argmax()]
            for row, allowed in zip(targets.logits, batch.first_tokens, strict=True)
        ]
    )
    attention_mask = batch.attention_mask[:, : batch.width]
    written = model.generate(
        torch.cat([batch.input_ids[:, : batch.width], first[:, None]], dim=1),
        attention_mask=functional.pad(attention_mask, (0, 1), value=1),
        generation_config=config,
        synced_gpus=synced,
        **({} if cache is None else {"past_key_values": cache}),
    )
    return targets.losses.sum(1).tolist(), written[:, batch.width :].tolist()


def _inputs(model: Any, batch: _Batch, start: int, end: int, **more: Any) -> dict[str, Any]:
    """The model's arguments for the tokens from `start` to `end`, without those it does not take.

    Args:
        end: negative counts from the last.
    """
    accepted = inspect.signature(model.forward).parameters
    positions = (batch.attention_mask.cumsum(-1) - 1).clamp(min=0)
    inputs = {
        "input_ids": batch.input_ids[:, start:end],
        "attention_mask": batch.attention_mask[:, :end],
        "position_ids": positions[:, start:end],
        **more,
    }
    return {name: value for name, value in inputs.items() if name in accepted}


def _scored(
    task: Task,
    tokenizer: Any,
    examples: Sequence[EvalExample],
    results: list[tuple[int, float, str]],
) -> Evaluation:
    """`results` in the order of the examples: index, summed loss, prediction."""
    predictions = [text for _, _, text in results]
    tokens = np.array([len(example.target) for example in examples], dtype=np.int64)
    losses = np.array([loss for _, loss, _ in results], dtype=np.float64)
    found = task.score(examples, predictions, losses, tokens)
    _check_whole(task, found, len(examples))
    totals = {score.key: float(found.totals[score.name]) for score in task.scores}
    columns = {
        score.name: np.asarray(found.columns[score.name], dtype=np.float64)
        for score in task.scores
        if score.per_example
    }
    samples = tuple(
        Sample(
            i,
            examples[i].name,
            examples[i].line,
            task.context_shown(tokenizer, examples[i]),
            examples[i].text,
            predictions[i],
        )
        for i in _spread(len(examples))
    )
    return Evaluation(
        scores={**totals, task.sheet.count_key: float(len(examples))},
        columns=columns,
        tokens=tokens,
        bytes=np.array([example.target_bytes for example in examples], dtype=np.int64),
        predictions=tuple(predictions),
        samples=samples,
    )


def _check_whole(task: Task, found: Scores, count: int) -> None:
    """Raise UserError if the task did not return everything that its `scores` declare."""
    for score in task.scores:
        if score.name not in found.totals:
            raise UserError(
                f"task {task.name}: score() gives no total {score.name!r}, which is in its scores;"
                " give it, or take it out"
            )
        shape = np.shape(found.columns.get(score.name, ()))
        if score.per_example and shape != (count,):
            raise UserError(
                f"task {task.name}: score() gives the column {score.name!r} in shape {shape}; give"
                f" a value for each of the {count} examples, or set per_example=False"
            )


def _spread(count: int) -> Sequence[int]:
    """At most `_SAMPLES` indices, spread evenly over `count`."""
    if count <= _SAMPLES:
        return range(count)
    return [i * count // _SAMPLES for i in range(_SAMPLES)]
