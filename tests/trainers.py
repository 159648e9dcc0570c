"""transformers' Trainer on a tiny model, and the plain loop that it must equal layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset, IterableDataset, SequentialSampler
from transformers import Trainer, TrainingArguments

from lwo_dist.config import LWOConfig
from tests import oracle

LR = 1e-3
CLIP = 0.5
ROWS = 4  # of a micro-batch, over all ranks
STREAMED = 5 * ROWS
ACCUMULATION = 2
MICRO_BATCHES = 9  # of an epoch, so the last accumulation of an epoch is short
EPOCHS = 2
STEPS = EPOCHS * 5
WARMUP = 2
STEPS_PER_LAYER = 2
LAYERS = ("embed", "layer_0", "layer_1", "layer_2", "layer_3", "head")


class Rows(Dataset[dict[str, Tensor]]):
    """Sequences with different numbers of labels, so that ranks' shares differ."""

    def __init__(self, count: int = MICRO_BATCHES * ROWS):
        self.tokens, self.labels = oracle.global_batch(7, size=count, length=12)
        self.labels = self.tokens.clone()
        for i in range(count):
            self.labels[i, : 1 + i % 5] = -100

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[i], "labels": self.labels[i]}


class Stream(IterableDataset[dict[str, Tensor]]):
    """Rows of five micro-batches in each of `epochs`, and then none: ends in mid-accumulation."""

    def __init__(self, epochs: int):
        self._epochs = epochs

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        if self._epochs:
            self._epochs -= 1
            rows = Rows(STREAMED)
            yield from (rows[i] for i in range(STREAMED))


class InOrder(Trainer):  # type: ignore[misc]
    def _get_train_sampler(self, *_: Any, **__: Any) -> SequentialSampler | None:
        if isinstance(self.train_dataset, Stream):
            return None
        return SequentialSampler(self.train_dataset)


def arguments(folder: Path | str, world_size: int = 1, **more: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": ROWS // world_size,
        "gradient_accumulation_steps": ACCUMULATION,
        "num_train_epochs": EPOCHS,
        "learning_rate": LR,
        "lr_scheduler_type": "linear",
        "warmup_steps": WARMUP,
        "max_grad_norm": CLIP,
        "adam_epsilon": 1e-6,
        "weight_decay": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return TrainingArguments(**(settings | more))


def loss_in_full(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int) -> Tensor:
    """transformers' own computes in float32."""
    logits = outputs.logits[:, :-1].flatten(0, 1)
    total = cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
    return total / num_items_in_batch


def fsdp_plugin() -> FullyShardedDataParallelPlugin:
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Qwen2DecoderLayer"],
        reshard_after_forward=True,
        cpu_ram_efficient_loading=False,
    )


def use_fsdp(accelerator: Any) -> None:
    """Let the accelerator shard by FSDP2 on CPUs, where it ignores the plugin and makes DDP."""
    accelerator.state.fsdp_plugin = fsdp_plugin()
    accelerator.state.distributed_type = DistributedType.FSDP
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def config(**more: Any) -> LWOConfig:
    return LWOConfig(**({"steps_per_layer": STEPS_PER_LAYER} | more))


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def weights(lwo: Any) -> dict[str, Tensor]:
    """Whole weights, wherever they are; all ranks call it."""
    layers = [*lwo.layers, lwo.rest]
    return {name: tensor for layer in layers for name, tensor in lwo.read_layer(layer).items()}


@dataclass
class Expected:
    weights: dict[str, Tensor]
    moved: float
    """The norm of what all steps changed."""
    rates: list[float]
    norms: list[float] = field(default_factory=list)

    def relative_difference(self, got: dict[str, Tensor]) -> float:
        assert got.keys() == self.weights.keys()
        return _distance(got, self.weights) / self.moved


def linear_rates(steps: int = STEPS) -> list[float]:
    """The rate of each step with transformers' linear warm-up and decay."""
    up = [LR * step / WARMUP for step in range(WARMUP)]
    return up + [LR * (steps - step) / (steps - WARMUP) for step in range(WARMUP, steps)]


Groups = list[range]
"""The rows of what is prefetched together, whose labels the loss of these rows is divided by."""


def groups_of_epochs() -> list[Groups]:
    """Those of each step: the last one of an epoch has one micro-batch."""
    of_epoch = [range(i, min(i + 8, MICRO_BATCHES * ROWS)) for i in range(0, 36, 8)]
    return [[rows] for rows in of_epoch * EPOCHS]


def groups_of_stream(steps: int) -> list[Groups]:
    """Those of `Stream`: what an epoch leaves over counts in the first step of the next."""
    even: list[Groups] = [[range(16, 20), range(8)], [range(8, 16)]]
    return [[range(8)], *(even[step % 2] for step in range(1, steps))]


def plain_loop(
    layers: list[tuple[str, ...]],
    dtype: torch.dtype,
    *,
    rates: list[float] | None = None,
    count: int | None = None,
    steps: list[Groups] | None = None,
    stored: torch.dtype | None = None,
) -> Expected:
    """Layer by layer, in plain torch.

    Args:
        rates: the learning rate of each step, instead of `linear_rates`.
        steps: the rows of each step, instead of `groups_of_epochs`.
        stored: what the initial weights are rounded to.
        count: divide the loss of each step by so many labels, and label every token; else the loss
            is the mean of `Rows`' labels.
    """
    model = oracle.tiny_model(tied=False, dtype=dtype).to(stored or dtype).to(dtype)
    before = snapshot(model)
    parameters = dict(model.named_parameters())
    rows = Rows()
    expected = Expected({}, 0.0, rates or linear_rates())
    for step, groups in enumerate(steps or groups_of_epochs()):
        if step % STEPS_PER_LAYER == 0:
            active = layers[step // STEPS_PER_LAYER % len(layers)]
            for name, parameter in parameters.items():
                parameter.requires_grad_(name in active)
                parameter.grad = None
            mine = [parameters[name] for name in active]
            optimizer = torch.optim.AdamW(mine, lr=LR, eps=1e-6, weight_decay=0.0)
        for group in groups:
            tokens = rows.tokens[group.start : group.stop]
            labels = tokens if count else rows.labels[group.start : group.stop]
            divisor = count or int((labels[:, 1:] != -100).sum())
            (oracle.loss_sum(model, tokens, labels) / divisor).backward()
        expected.norms.append(float(nn.utils.clip_grad_norm_(mine, CLIP)))
        optimizer.param_groups[0]["lr"] = expected.rates[step]
        optimizer.step()
        optimizer.zero_grad()
    expected.weights = snapshot(model)
    expected.moved = _distance(expected.weights, before)
    return expected


def accelerate_loop(
    accelerator: Any,
    parts: Sequence[Any],
    *,
    done: int = 0,
    save: Path | None = None,
) -> tuple[list[float], list[float]]:
    """A usual loop of accelerate; returns the norm and the rate of each step.

    Args:
        parts: model, optimizer, loader, and scheduler, all prepared.
        done: steps that a loaded state has done.
        save: where to save the state after the third step.
    """
    model, optimizer, loader, scheduler = parts
    norms: list[float] = []
    rates: list[float] = []
    for epoch in range(done // 5, EPOCHS):
        batches = loader
        if epoch == done // 5 and done % 5:
            batches = accelerator.skip_first_batches(loader, done % 5 * ACCUMULATION)
        for batch in batches:
            with accelerator.accumulate(model):
                tokens = batch["input_ids"]
                logits = model(input_ids=tokens).logits[:, :-1].flatten(0, 1)
                accelerator.backward(cross_entropy(logits, tokens[:, 1:].flatten()))
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(model.parameters(), CLIP)
                    norms.append(float(norm))
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                rates.append(optimizer.report.lr)
                if save is not None and len(rates) == 3:
                    accelerator.save_state(str(save))
    return norms, rates


# What `accelerate_loop` divides by: it weighs each micro-batch alike, the short accumulation half.
LABELS = ROWS * ACCUMULATION * 11


def logged(trainer: Any, key: str) -> list[Any]:
    """What was logged under `key`, in the order of steps."""
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def _distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    squares = [(a[name].double() - b[name].double()).square().sum() for name in b]
    return float(torch.stack(squares).sum().sqrt())
