"""Checkpoints at the cost of one layer: the step loop waits only for a copy on the host, which a
thread of rank 0 writes.

save(lwo)    every rank gathers the layers trained since the last save, and the active moments
             rank 0 passes each to its writer, and finally the checkpoint that refers to them
poll()       whether the writer is done
wait()       tells every rank the outcome of the save: committed, or why not
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from lwo_dist import distributed
from lwo_dist.hook import LWO
from lwo_dist.layers import Layer
from lwo_dist.storage import RunFolder

from .format import Checkpoint, flat_moments, step_folder
from .schema import ADAPTERS_INDEX, INDEX, file_of
from .writer import CheckpointWriter, Outcome, Piece, Save

__all__ = ["LayerStore", "Outcome"]


class LayerStore:
    """Writes the checkpoints of a run folder. All ranks call it; rank 0 writes.

    Args:
        model_files: writes config and tokenizer to a folder; called on rank 0.
        keep: how many of the newest checkpoints to keep, in addition to the best one.
        adapters_only: leave out what no layer holds: the base model has it.
        may_write: called on rank 0 before every change to a checkpoint; raises LostRunError if
            another process has taken over the run.
    """

    def __init__(
        self,
        run: RunFolder,
        model_files: Callable[[Path], None],
        *,
        keep: int = 1,
        adapters_only: bool = False,
        may_write: Callable[[], None] = lambda: None,
    ):
        self._writer = (
            CheckpointWriter(
                run,
                model_files,
                keep=keep,
                index=ADAPTERS_INDEX if adapters_only else INDEX,
                may_write=may_write,
            )
            if distributed.rank() == 0
            else None
        )
        self._adapters_only = adapters_only
        # Equal on every rank, so that all agree on what to gather without communicating.
        self._captured: dict[str, int] = {}  # key of a piece -> step last trained
        self._pending = False  # a save whose outcome `wait` has not reported yet

    def remember(self, checkpoint: Checkpoint, lwo: LWO) -> None:
        """Mark the files of the resumed checkpoint as already written."""
        weight_map = checkpoint.weight_map
        parked = checkpoint.state.get("moments", {})
        written = {}
        for layer in [*lwo.layers, lwo.rest]:
            references = {weight_map.get(name) for name in layer.parameter_names}
            # More than one: the layers were divided differently then, so write this one again.
            keys = {layer.name: references.pop() if len(references) == 1 else None}
            keys[_moments_key(layer)] = parked.get(layer.name)
            for key, reference in keys.items():
                if reference is not None:
                    name = file_of(step_folder(checkpoint.step), reference)
                    written[key] = name, checkpoint.state["sha256"][reference]
                    self._captured[key] = lwo.last_changed(layer)
        if self._writer is not None:
            self._writer.remember(written, checkpoint.step)

    def save(self, lwo: LWO, extra: Mapping[str, Any], *, best_step: int = 0) -> None:
        """Start a checkpoint of the hook's current step. All ranks call it.

        Call `wait` before the next save.

        Args:
            extra: additional entries for state.json.
            best_step: the checkpoint to keep in addition to the newest ones.
        """
        assert not self._pending, "wait() comes before the next save()"
        self._pending = True
        position = lwo.position()
        step: int = position["step"]
        weights = {}
        parked = {}
        for layer in [*lwo.layers, *([] if self._adapters_only else [lwo.rest])]:
            if not layer.parameter_names:
                continue
            trained = lwo.last_changed(layer)
            self._capture(layer.name, trained, ".safetensors", partial(lwo.read_layer, layer))
            weights[layer.name] = layer.parameter_names
            if layer not in (lwo.active_layer, lwo.rest):
                key = _moments_key(layer)
                read = partial(_flat_moments, lwo, layer)
                if self._capture(key, trained, ".moments.safetensors", read):
                    parked[layer.name] = key
        moments = lwo.read_moments(lwo.active_layer)
        if self._writer is not None:
            frozen = json.loads(json.dumps(extra))  # the loop will modify it
            self._writer.commit(Save(step, position, frozen, moments, weights, parked, best_step))

    def poll(self) -> bool:
        """Whether rank 0's writer has finished the pending save; else False. No collective."""
        return self._pending and self._writer is not None and self._writer.is_done

    def wait(self) -> Outcome | None:
        """The outcome of the pending save, on every rank; None without one. A collective.

        Raises:
            UserError: another process has taken over the run (LostRunError on rank 0).
        """
        if not self._pending:
            return None
        self._pending = False
        return distributed.on_rank_0(self._writer.outcome if self._writer is not None else _nothing)

    def _capture(
        self, key: str, trained: int, suffix: str, read: Callable[[], dict[str, Tensor]]
    ) -> bool:
        """Read and queue a piece if it changed since the last save; False if there is none.

        A collective.
        """
        if self._captured.get(key) == trained:
            return True
        tensors = read()
        if not tensors:
            return False
        self._captured[key] = trained
        if self._writer is not None:
            layer, _, _ = key.partition(" ")
            self._writer.put(
                key, Piece(layer if layer == "rest" else f"{layer}.{trained:06d}", suffix, tensors)
            )
        return True


def _flat_moments(lwo: LWO, layer: Layer) -> dict[str, Tensor]:
    return flat_moments(lwo.read_moments(layer))


def _moments_key(layer: Layer) -> str:
    return f"{layer.name} moments"


def _nothing() -> None:
    raise AssertionError("on rank 0 only")
