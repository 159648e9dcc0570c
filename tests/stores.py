"""Checkpoints of the oracle's model, without a whole run around them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import lwo_dist
from lwo_dist.checkpoint.format import Checkpoint
from lwo_dist.checkpoint.store import LayerStore, Outcome
from lwo_dist.hook import LWO
from lwo_dist.storage import RunFolder
from tests import oracle

__all__ = [
    "State",
    "attach",
    "contents",
    "model_files",
    "run_folder",
    "same",
    "save",
    "state_of",
    "step",
]

State = tuple[int, str, dict[str, torch.Tensor], dict[str, dict[str, torch.Tensor]]]


def attach(**config: Any) -> LWO:
    """One process, whole weights, a visit of two steps."""
    recipe = {"lr": 1e-2, "steps_per_layer": 2, **config}
    return lwo_dist.attach(oracle.tiny_model(tied=False), lwo_dist.LWOConfig(**recipe))


def step(lwo: LWO, count: int = 1) -> None:
    for _ in range(count):
        tokens, labels = oracle.global_batch(lwo.step_count)
        lwo.backward(oracle.loss_sum(lwo.model, tokens, labels) / (labels[:, 1:] != -100).sum())
        lwo.step()


def model_files(folder: Path) -> None:
    oracle.tiny_model(tied=False).config.save_pretrained(folder)
    (folder / "tokenizer.json").write_text('{"model": {}}')


def save(store: LayerStore, lwo: LWO, **extra: Any) -> Outcome:
    best = extra.pop("best_step", 0)
    store.save(lwo, extra, best_step=best)
    outcome = store.wait()
    assert outcome is not None
    return outcome


def state_of(lwo: LWO) -> State:
    """All that a checkpoint must bring back: step, active layer, masters, moments."""
    weights = {
        name: tensor
        for layer in [*lwo.layers, lwo.rest]
        for name, tensor in lwo.read_layer(layer).items()
    }
    return lwo.step_count, lwo.active_layer.name, weights, lwo.state_dict()["moments"]


def contents(checkpoint: Checkpoint) -> State:
    """The same, as it stands in a checkpoint."""
    weights = {name: tensor for tensors in checkpoint.weights() for name, tensor in tensors.items()}
    position = checkpoint.hook_state()
    moments = dict(position["moments"])
    for _, parked in checkpoint.parked_moments():
        moments |= parked
    return checkpoint.step, position["active_layer"], weights, moments


def same(a: State, b: State) -> bool:
    return (
        a[:2] == b[:2]
        and a[2].keys() == b[2].keys()
        and all(torch.equal(a[2][name], b[2][name]) for name in a[2])
        and a[3].keys() == b[3].keys()
        and all(
            torch.equal(a[3][name][kind], b[3][name][kind]) for name in a[3] for kind in a[3][name]
        )
    )


def run_folder(path: Path) -> RunFolder:
    return RunFolder(str(path), "r")
