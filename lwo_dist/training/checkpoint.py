"""The layer store: a checkpoint writes only the layers trained since the last one.

<run>/layers/<layer>.<step last trained>.<sha8>.safetensors    fp32 masters; never changed once written
<run>/checkpoints/step_000400/
    model.safetensors.index.json, config, tokenizer            parameter -> ../../layers/<file>
    active.safetensors                                         moments of the active layer, by parameter name
    state.json                                                 written last: no state.json, no checkpoint

It is the same for all strategies and world sizes, and `from_pretrained(checkpoint folder)` reads it as it stands.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import Tensor

from lwo_dist import distributed
from lwo_dist.config import UserError
from lwo_dist.hook import LWO
from lwo_dist.layers import Layer

__all__ = ["Checkpoint", "LayerStore"]

_STATE = "state.json"
_INDEX = "model.safetensors.index.json"
_MOMENTS = "active.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint; its weights load by `from_pretrained(folder)`."""

    folder: Path
    state: Mapping[str, Any]
    """`step`, `active_layer`, `skipped_steps`, what the trainer added, `sha256` of every file named."""

    @property
    def step(self) -> int:
        return int(self.state["step"])

    def hook_state(self) -> dict[str, Any]:
        """What `LWO.load_state_dict` takes; the moments as whole CPU tensors."""
        moments: dict[str, dict[str, Tensor]] = {}
        for key, tensor in load_file(self.folder / _MOMENTS).items():
            name, _, kind = key.rpartition(".")
            moments.setdefault(name, {})[kind] = tensor
        return {**{key: self.state[key] for key in ("step", "active_layer", "skipped_steps")}, "moments": moments}


class LayerStore:
    """Reads and writes the checkpoints of one run folder. Rank 0 writes; every rank calls."""

    def __init__(self, run_folder: Path):
        self.layers = run_folder / "layers"
        self.checkpoints = run_folder / "checkpoints"
        self._written: dict[str, tuple[int, Path, str]] = {}  # layer -> (step last trained, file, sha256)

    def newest(self) -> Checkpoint | None:
        """The last committed checkpoint whose files are all there and whole.

        Raises:
            UserError: there are checkpoints, and every one of them is damaged.
        """
        damaged = []
        for folder in sorted(self.checkpoints.glob("step_*"), reverse=True):
            if not (folder / _STATE).is_file():
                continue  # a save that was cut short
            try:
                return _read(folder)
            except (OSError, ValueError, KeyError) as error:
                damaged.append(f"{folder.name}: {error}")
                print(f"checkpoint {folder} is damaged ({error}); using the one before", flush=True)
        if damaged:
            raise UserError(
                f"no checkpoint in {self.checkpoints} is whole ({damaged[0]}); remove the folder to start anew"
            )
        return None

    def save(self, lwo: LWO, model_files: Any, extra: Mapping[str, Any]) -> Path:
        """Write a checkpoint of the hook's present step. All ranks call it; it is there when it returns.

        Args:
            model_files: called with the new folder on rank 0; puts config and tokenizer there.
            extra: what else state.json holds.
        """
        state = lwo.state_dict()
        step, moments = state["step"], state.pop("moments")
        folder = self.checkpoints / f"step_{step:06d}"
        if distributed.rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)  # of a save that was cut short
            folder.mkdir(parents=True)
            self.layers.mkdir(exist_ok=True)
        weight_map: dict[str, str] = {}
        total, sha256 = 0, {}
        for layer in [*lwo.layers, lwo.rest]:
            if not layer.parameter_names:
                continue
            path, digest = self._save_layer(lwo, layer, last_trained(lwo, layer, step))
            reference = os.path.relpath(path, folder)
            weight_map |= dict.fromkeys(layer.parameter_names, reference)
            sha256[reference] = digest
            total += path.stat().st_size if distributed.rank() == 0 else 0
        if distributed.rank() == 0:
            flat = {f"{name}.{kind}": t for name, kinds in moments.items() for kind, t in kinds.items()}
            sha256[_MOMENTS] = _write(folder / _MOMENTS, save(flat))
            model_files(folder)
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            sha256[_INDEX] = _write(folder / _INDEX, json.dumps(index, indent=1).encode())
            # Last, because it is what makes the folder a checkpoint.
            _write(folder / _STATE, json.dumps({**state, **extra, "sha256": sha256}, indent=1).encode())
        distributed.barrier()
        return folder

    def remember(self, checkpoint: Checkpoint, lwo: LWO) -> None:
        """Take the layer files of a checkpoint that training goes on from for written."""
        index = json.loads((checkpoint.folder / _INDEX).read_text())["weight_map"]
        for layer in [*lwo.layers, lwo.rest]:
            references = {index[name] for name in layer.parameter_names if name in index}
            if len(references) == 1:
                reference = references.pop()
                path = Path(os.path.normpath(checkpoint.folder / reference))
                trained = last_trained(lwo, layer, checkpoint.step)
                self._written[layer.name] = (trained, path, checkpoint.state["sha256"][reference])

    def prune(self, keep: set[Path]) -> None:
        """Remove every other checkpoint and the layer files that none of `keep` names. Rank 0 calls it."""
        named = set()
        for folder in keep:
            references = json.loads((folder / _INDEX).read_text())["weight_map"].values()
            named |= {os.path.normpath(folder / reference) for reference in references}
        for folder in self.checkpoints.glob("step_*"):
            if folder not in keep:
                (folder / _STATE).unlink(missing_ok=True)  # first: a half-removed folder is then no checkpoint
                shutil.rmtree(folder)
        for path in self.layers.iterdir():
            if str(path) not in named:
                path.unlink()

    def _save_layer(self, lwo: LWO, layer: Layer, trained: int) -> tuple[Path, str]:
        known = self._written.get(layer.name)
        if known is not None and known[0] == trained:
            return known[1:]
        tensors = lwo.read_layer(layer)  # a collective: every rank gets here alike
        path, digest = Path(), ""
        if distributed.rank() == 0:
            data = save({name: tensor.contiguous() for name, tensor in tensors.items()}, {"format": "pt"})
            digest = hashlib.sha256(data).hexdigest()
            path = self.layers / f"{layer.name}.{trained:06d}.{digest[:8]}.safetensors"
            if not path.exists():
                _write(path, data)
        path, digest = distributed.broadcast_object((path, digest))
        self._written[layer.name] = (trained, path, digest)
        return path, digest


def last_trained(lwo: LWO, layer: Layer, step: int) -> int:
    """Optimizer steps that were done when `layer` was last changed; 0 for never."""
    if layer not in lwo.layers or step == 0:
        return 0
    index, visit_steps = list(lwo.layers).index(layer), lwo.config.steps_per_layer
    if len(lwo.layers) == 1:
        return step
    for visit in range((step - 1) // visit_steps, -1, -1):
        if lwo.schedule.active_layer(visit * visit_steps) == index:
            return min(step, (visit + 1) * visit_steps)
    return 0


def _read(folder: Path) -> Checkpoint:
    state = json.loads((folder / _STATE).read_text())
    for reference, digest in state["sha256"].items():
        with (folder / reference).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                raise ValueError(f"{os.path.normpath(folder / reference)} does not have the sha256 of state.json")
    return Checkpoint(folder, state)


def _write(path: Path, data: bytes) -> str:
    """Write whole or not at all; returns the sha256."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    return hashlib.sha256(data).hexdigest()
