"""The format of a checkpoint, and how to read it. `store.py` and `writer.py` write it.

<run>/layers/<layer>.<step last trained>.<sha8>.safetensors          fp32 masters; immutable
<run>/layers/<layer>.<step last trained>.<sha8>.moments.safetensors  `state: keep`; inactive layer
<run>/checkpoints/step_000400/
    model.safetensors.index.json, config, tokenizer   parameter -> ../../layers/<file>
    active.safetensors                                moments of the active layer, by parameter
    state.json                                        written last: no state.json, no checkpoint

The format is the same for all strategies and world sizes, and `from_pretrained(folder)` reads a
checkpoint folder directly. A checkpoint of adapters lacks the base model: its index is called
adapters.index.json, and `from_pretrained` refuses it. state.json holds the sha256 of every other
file and its own digest, so that any damage is detected. A digest does not prove who wrote a file,
so `schema.py` checks the contents.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from lwo_dist.errors import DamagedError, UserError, printable
from lwo_dist.storage import RunFolder

from .schema import (
    LAYERS,
    MAX_BYTES,
    MOMENTS,
    STATE,
    check_depth,
    check_state,
    file_of,
    index_of,
    read_json,
    reading,
    weight_map_of,
)

__all__ = [
    "CHECKPOINTS",
    "Checkpoint",
    "DamagedError",
    "committed_steps",
    "flat_moments",
    "newest_checkpoint",
    "prune",
    "read_checkpoint",
    "read_state",
    "seal",
    "step_folder",
    "use_copy",
]

CHECKPOINTS = "checkpoints"
FORMAT = 1
"""Stored in state.json. Readers refuse a higher version."""


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint, complete and intact; `from_pretrained(folder)` loads it."""

    folder: Path
    """The local folder."""
    state: Mapping[str, Any]
    """`step`, `active_layer`, `skipped_steps`, `moments` (inactive layer -> file of its moments),
    the trainer's entries, and `sha256` (file -> digest)."""

    @property
    def step(self) -> int:
        return int(self.state["step"])

    @property
    def weight_map(self) -> dict[str, str]:
        """Parameter name -> file, relative to the checkpoint's folder.

        Raises:
            DamagedError
        """
        sealed = self.state["sha256"]
        return weight_map_of(read_json(self.folder / index_of(sealed)), sealed)

    def hook_state(self) -> dict[str, Any]:
        """Position and active moments (whole CPU tensors), for `LWO.load_state_dict`."""
        keys = ("step", "active_layer", "skipped_steps", "suffix")
        position = {key: self.state[key] for key in keys if key in self.state}
        return {**position, "moments": _read_moments(self.folder / MOMENTS)}

    def parked_moments(self) -> Iterator[tuple[str, dict[str, dict[str, Tensor]]]]:
        """(layer, moments) of each inactive layer with stored moments, one at a time."""
        for layer, reference in self.state.get("moments", {}).items():
            yield layer, _read_moments(self.folder / reference)

    def weights(self) -> Iterator[dict[str, Tensor]]:
        """fp32 masters by parameter name, one file at a time. Raises: DamagedError."""
        for reference in sorted(set(self.weight_map.values())):
            with reading(reference):
                tensors = load_file(self.folder / reference)
            yield tensors


def step_folder(step: int) -> str:
    """The checkpoint's folder, relative to the run's: `checkpoints/step_000400`."""
    return f"{CHECKPOINTS}/step_{step:06d}"


def seal(state: Mapping[str, Any]) -> bytes:
    """Serialise state.json: the values and their digest."""
    return json.dumps({**state, "digest": _digest(state)}, indent=1).encode()


def flat_moments(moments: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Flatten {parameter: {exp_avg, exp_avg_sq, step}} for a safetensors file."""
    return {
        f"{name}.{kind}": t.contiguous()
        for name, kinds in moments.items()
        for kind, t in kinds.items()
    }


def committed_steps(run: RunFolder) -> list[int]:
    """Steps of the committed checkpoints, oldest first; nothing is verified."""
    steps = []
    for name in run.folders(CHECKPOINTS):
        number = re.fullmatch(r"step_([0-9]{6,15})", name)
        if number and f"{CHECKPOINTS}/{name}/{STATE}" in _files_of(run, name):
            steps.append(int(number[1]))
    return sorted(steps)


def read_checkpoint(run: RunFolder, step: int) -> Checkpoint:
    """The checkpoint of `step`, fetched from the run's storage, with every byte verified.

    Raises:
        DamagedError: a file is missing, truncated or changed.
        UserError: it was written by a newer lwo_dist.
    """
    name = step_folder(step)
    state = read_state(run, step)
    try:
        for reference, digest in state["sha256"].items():
            _check(run, file_of(name, reference), digest)
        _refuse_unsealed(run, name, state["sha256"])
        folder = run.path(name)
        index = read_json(folder / index_of(state["sha256"]))
        weight_map = weight_map_of(index, state["sha256"])
        if "config.json" in state["sha256"]:
            check_depth(read_json(folder / "config.json"), len(weight_map))
    except FileNotFoundError as error:
        missing = os.path.relpath(error.filename, run.local) if error.filename else str(error)
        raise DamagedError(f"{missing} is missing") from None
    except OSError as error:
        raise DamagedError(f"{name} cannot be read: {error.strerror or error}") from None
    return Checkpoint(folder, state)


def read_state(run: RunFolder, step: int) -> dict[str, Any]:
    """The values in a checkpoint's state.json; no other file is read.

    Raises:
        DamagedError: state.json is missing, truncated or changed.
        UserError: it was written by a newer lwo_dist.
    """
    name = f"{step_folder(step)}/{STATE}"
    try:
        state = _open_seal(read_json(run.pull(name, limit=MAX_BYTES)))
    except OSError as error:
        raise DamagedError(f"{name} cannot be read: {error.strerror or error}") from None
    if state["step"] != step:
        raise DamagedError(f"{name} belongs to step {state['step']}")
    return state


def newest_checkpoint(run: RunFolder) -> Checkpoint | None:
    """The newest intact checkpoint; None without checkpoints. Prints each damaged one it skips.

    Raises:
        UserError: every checkpoint is damaged.
    """
    damaged = []
    for step in reversed(committed_steps(run)):
        try:
            return read_checkpoint(run, step)
        except DamagedError as error:
            damaged.append(str(error))
            print(
                f"checkpoint {run}/{step_folder(step)} is damaged ({printable(str(error))}); using"
                " the one before",
                flush=True,
            )
    if damaged:
        raise UserError(
            f"no checkpoint in {run}/{CHECKPOINTS} is whole ({damaged[0]}); remove the folder to"
            " start anew"
        )
    return None


def use_copy(run: RunFolder, checkpoint: Checkpoint) -> Checkpoint:
    """Make a checkpoint that rank 0 has found available on this machine too.

    Raises:
        DamagedError: a fetched file is damaged.
        UserError: this machine cannot see the storage folder.
    """
    if run.url is not None:
        read_checkpoint(run, checkpoint.step)
    elif not (checkpoint.folder / STATE).is_file():
        raise UserError(
            f"{checkpoint.folder} does not exist on this worker; set storage to a folder that all"
            " workers share"
        )
    return checkpoint


def prune(
    run: RunFolder, keep: set[int], *, may_remove: Callable[[], None] = lambda: None
) -> list[str]:
    """Remove all checkpoints except those of the steps in `keep`, and layer files no longer used.

    Args:
        may_remove: called once the files to remove are listed, before any is removed; may raise.

    Returns:
        The removed folders and files, relative to the run's folder.

    Raises:
        DamagedError: a checkpoint to keep cannot be read; nothing was removed.
        OSError
    """
    named = set()
    for step in keep:
        folder = step_folder(step)
        state = read_state(run, step)
        named |= {file_of(folder, reference) for reference in state["sha256"]}
    kept = {step_folder(step) for step in keep}
    folders = [f"{CHECKPOINTS}/{name}" for name in run.folders(CHECKPOINTS)]
    folders = [name for name in folders if name not in kept]
    stale = [name for name in run.files(LAYERS) if name not in named]
    may_remove()
    for name in folders:
        # state.json first, so that a half-removed folder is no longer a checkpoint.
        run.remove_folder(name, first=STATE)
    run.remove(stale)
    return folders + stale


def _files_of(run: RunFolder, checkpoint: str) -> list[str]:
    return run.files(f"{CHECKPOINTS}/{checkpoint}")


def _check(run: RunFolder, name: str, digest: str) -> None:
    path = run.file(name)
    if run.url is not None and not (path.is_file() and sha256_of(path) == digest):
        run.pull(name, limit=None if name.endswith(".safetensors") else MAX_BYTES)
    if sha256_of(path) != digest:
        raise DamagedError(f"{name} does not have the sha256 of {STATE}")


def _refuse_unsealed(run: RunFolder, name: str, sealed: Mapping[str, str]) -> None:
    """Refuse files that state.json does not name: `from_pretrained` would read them too."""
    for path in run.path(name).iterdir():
        if path.name in sealed or path.name == STATE or path.name.startswith("."):
            continue
        if path.is_symlink() or path.is_file():
            if run.url is None:
                raise DamagedError(f"{name}/{path.name} is not listed in {STATE}")
            path.unlink()  # a local copy left by an earlier attempt


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _open_seal(state: Any) -> dict[str, Any]:
    if not isinstance(state, dict) or "digest" not in state:
        raise DamagedError(f"{STATE} is malformed")
    digest = state.pop("digest")
    version = state.get("format", 0)
    if not isinstance(version, int):
        raise DamagedError(f"{STATE} is malformed: format must be a number")
    if version > FORMAT:
        raise UserError(
            f"{STATE} has format {str(version)[:20]}; this lwo_dist reads up to {FORMAT}: install a"
            " newer one"
        )
    with reading(STATE):
        intact = _digest(state) == digest
    if not intact:
        raise DamagedError(f"{STATE} does not have its own digest")
    check_state(state)
    return state


def _read_moments(path: Path) -> dict[str, dict[str, Tensor]]:
    moments: dict[str, dict[str, Tensor]] = {}
    with reading(path.name), safe_open(path, "pt") as file:
        for key in file.keys():  # noqa: SIM118  safe_open is not a mapping
            name, _, kind = key.rpartition(".")
            moments.setdefault(name, {})[kind] = file.get_tensor(key)
    return moments
