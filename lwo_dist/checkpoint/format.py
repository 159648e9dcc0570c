"""The format of a checkpoint, and reading one. `layer_store` writes them.

<run>/layers/<layer>.<step last trained>.<sha8>.safetensors          fp32 masters; immutable
<run>/layers/<layer>.<step last trained>.<sha8>.moments.safetensors  `state: keep`: a waiting layer
<run>/checkpoints/step_000400/
    model.safetensors.index.json, config, tokenizer   parameter -> ../../layers/<file>
    active.safetensors                                moments of the active layer, by parameter
    state.json                                        written last: no state.json, no checkpoint

It is the same for all strategies and world sizes, and `from_pretrained(checkpoint folder)` reads it
as it stands. state.json holds the sha256 of every other file and its own digest, so no damage goes
unseen.
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from lwo_dist.errors import UserError
from lwo_dist.storage import RunFolder

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

CHECKPOINTS, LAYERS = "checkpoints", "layers"
STATE, INDEX, MOMENTS = "state.json", "model.safetensors.index.json", "active.safetensors"
FORMAT = 1
"""In state.json. A reader refuses a higher one."""


class DamagedError(ValueError):
    """A checkpoint that cannot be trusted; the message names the file and what is wrong with it."""


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint whose files are all there and whole; its weights load by
    `from_pretrained(folder)`.
    """

    folder: Path
    """On this machine."""
    state: Mapping[str, Any]
    """`step`, `active_layer`, `skipped_steps`, `moments` (layer that waits -> its file), what the
    trainer added, `sha256` of every file named."""

    @property
    def step(self) -> int:
        return int(self.state["step"])

    @property
    def weight_map(self) -> dict[str, str]:
        """Parameter name -> file, relative to the checkpoint's folder."""
        return json.loads((self.folder / INDEX).read_text())["weight_map"]

    def hook_state(self) -> dict[str, Any]:
        """What `LWO.load_state_dict` takes: the position and the active layer's moments, whole CPU
        tensors.
        """
        position = {key: self.state[key] for key in ("step", "active_layer", "skipped_steps")}
        return {**position, "moments": _read_moments(self.folder / MOMENTS)}

    def parked_moments(self) -> Iterator[tuple[str, dict[str, dict[str, Tensor]]]]:
        """Name and moments of each layer that waits with its moments kept, one at a time."""
        for layer, reference in self.state.get("moments", {}).items():
            yield layer, _read_moments(self.folder / reference)

    def weights(self) -> Iterator[dict[str, Tensor]]:
        """fp32 masters by parameter name, a file at a time."""
        for reference in sorted(set(self.weight_map.values())):
            yield load_file(self.folder / reference)


def step_folder(step: int) -> str:
    """Name of a checkpoint's folder, relative to the run's."""
    return f"{CHECKPOINTS}/step_{step:06d}"


def seal(state: Mapping[str, Any]) -> bytes:
    """state.json: the values, and a digest of them."""
    return json.dumps({**state, "digest": _digest(state)}, indent=1).encode()


def flat_moments(moments: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """{parameter: {exp_avg, exp_avg_sq, step}} as one level, for a safetensors file."""
    return {
        f"{name}.{kind}": t.contiguous()
        for name, kinds in moments.items()
        for kind, t in kinds.items()
    }


def committed_steps(run: RunFolder) -> list[int]:
    """Steps of the checkpoints that were written to their end, damaged or not, oldest first."""
    steps = []
    for name in run.folders(CHECKPOINTS):
        number = name.removeprefix("step_")
        if (
            name.startswith("step_")
            and number.isdigit()
            and f"{CHECKPOINTS}/{name}/{STATE}" in _files_of(run, name)
        ):
            steps.append(int(number))
    return sorted(steps)


def read_checkpoint(run: RunFolder, step: int) -> Checkpoint:
    """The checkpoint of `step`, fetched from where the run lives, every byte of it checked.

    Raises:
        DamagedError: a file is missing, cut or changed.
        UserError: it was written by a newer lwo_dist.
    """
    name = step_folder(step)
    state = read_state(run, step)
    try:
        for reference, digest in state["sha256"].items():
            _check(run, posixpath.normpath(posixpath.join(name, reference)), digest)
    except FileNotFoundError as error:
        missing = os.path.relpath(error.filename, run.local) if error.filename else str(error)
        raise DamagedError(f"{missing} is missing") from None
    except OSError as error:
        raise DamagedError(f"{name} cannot be read: {error.strerror or error}") from None
    return Checkpoint(run.local / name, state)


def read_state(run: RunFolder, step: int) -> dict[str, Any]:
    """What state.json of a checkpoint says; the other files are not looked at. Raises: as
    `read_checkpoint`.
    """
    name = f"{step_folder(step)}/{STATE}"
    try:
        state = _open_seal(run.pull(name).read_bytes())
    except OSError as error:
        raise DamagedError(f"{name} cannot be read: {error.strerror or error}") from None
    if state["step"] != step:
        raise DamagedError(f"{name} is that of step {state['step']}")
    return state


def newest_checkpoint(run: RunFolder) -> Checkpoint | None:
    """The last checkpoint that is whole; each damaged one behind it is said in a line and passed
    over.

    Raises:
        UserError: there are checkpoints, and every one of them is damaged.
    """
    damaged = []
    for step in reversed(committed_steps(run)):
        try:
            return read_checkpoint(run, step)
        except DamagedError as error:
            damaged.append(str(error))
            print(
                f"checkpoint {run}/{step_folder(step)} is damaged ({error}); using the one before",
                flush=True,
            )
    if damaged:
        raise UserError(
            f"no checkpoint in {run}/{CHECKPOINTS} is whole ({damaged[0]}); remove the folder to"
            " start anew"
        )
    return None


def use_copy(run: RunFolder, checkpoint: Checkpoint) -> Checkpoint:
    """The same checkpoint on another machine, which fetches the files that it lacks. Raises:
    DamagedError.
    """
    if run.url is not None:
        read_checkpoint(run, checkpoint.step)
    elif not (checkpoint.folder / STATE).is_file():
        raise UserError(
            f"{checkpoint.folder} cannot be seen by this worker; set storage to a folder that all"
            " share"
        )
    return checkpoint


def prune(run: RunFolder, keep: set[int]) -> list[str]:
    """Remove the checkpoints of other steps and the layer files that no kept one names. Returns
    what was removed.

    Raises: OSError; DamagedError if a checkpoint to keep cannot be read, and nothing is removed
    then.
    """
    named = set()
    for step in keep:
        folder = step_folder(step)
        state = read_state(run, step)
        named |= {
            posixpath.normpath(posixpath.join(folder, reference)) for reference in state["sha256"]
        }
    removed = []
    for name in run.folders(CHECKPOINTS):
        if f"{CHECKPOINTS}/{name}" not in {step_folder(step) for step in keep}:
            # state.json first: a folder that is half removed is then no checkpoint.
            run.remove_folder(f"{CHECKPOINTS}/{name}", first=STATE)
            removed.append(f"{CHECKPOINTS}/{name}")
    stale = [name for name in run.files(LAYERS) if name not in named]
    run.remove(stale)
    return removed + stale


def _files_of(run: RunFolder, checkpoint: str) -> list[str]:
    return run.files(f"{CHECKPOINTS}/{checkpoint}")


def _check(run: RunFolder, name: str, digest: str) -> None:
    path = run.local / name
    if run.url is not None and not (path.is_file() and sha256_of(path) == digest):
        run.pull(name)
    if sha256_of(path) != digest:
        raise DamagedError(f"{name} does not have the sha256 of {STATE}")


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _open_seal(data: bytes) -> dict[str, Any]:
    try:
        state = json.loads(data)
        digest = state.pop("digest")
    except (ValueError, KeyError, AttributeError, TypeError):
        raise DamagedError(f"{STATE} is not whole") from None
    if state.get("format", 0) > FORMAT:
        raise UserError(
            f"{STATE} has format {state['format']}; this lwo_dist reads up to {FORMAT}: install a"
            " newer one"
        )
    if _digest(state) != digest:
        raise DamagedError(f"{STATE} does not have its own digest")
    return state


def _read_moments(path: Path) -> dict[str, dict[str, Tensor]]:
    moments: dict[str, dict[str, Tensor]] = {}
    with safe_open(path, "pt") as file:
        for key in file.keys():  # noqa: SIM118  safe_open is no mapping
            name, _, kind = key.rpartition(".")
            moments.setdefault(name, {})[kind] = file.get_tensor(key)
    return moments
