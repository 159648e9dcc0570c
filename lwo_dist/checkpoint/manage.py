"""What people do with the checkpoints of a run: list, verify, prune, export."""

from __future__ import annotations

import datetime
import fcntl
from collections.abc import Iterator
from pathlib import Path

from lwo_dist.errors import UserError
from lwo_dist.storage import RunFolder
from lwo_dist.tasks.scores import ScoreSheet
from lwo_dist.training.progress import human_bytes

from .export import Dtype, export_model
from .format import (
    STATE,
    DamagedError,
    committed_steps,
    newest_checkpoint,
    prune,
    read_checkpoint,
    read_state,
    step_folder,
)

__all__ = ["export_run", "list_checkpoints", "prune_checkpoints", "verify_checkpoints"]


def list_checkpoints(run: RunFolder) -> Iterator[str]:
    """A line per checkpoint: step, active layer, main scores, when. Nothing is verified but
    state.json.
    """
    for step in _steps(run):
        try:
            state = read_state(run, step)
        except DamagedError as error:
            yield f"step {step}  damaged: {error}"
            continue
        written = (run.local / step_folder(step) / STATE).stat().st_mtime
        when = datetime.datetime.fromtimestamp(written).isoformat(" ", "seconds")
        scores = state.get("results", {}).get("evaluations", {}).get(str(step), {})
        shown = [
            f"held-out {score.heading} {score.show(scores[score.key])}"
            for score in ScoreSheet.read(state.get("run", {}), scores).scores
            if score.headline and score.key in scores
        ]
        parts = [f"layer {state['active_layer']}", *shown, f"{len(state['sha256'])} files", when]
        yield f"step {step}  {'  '.join(parts)}"


def verify_checkpoints(run: RunFolder) -> Iterator[str]:
    """A line per checkpoint, after every byte of it was read.

    Raises:
        UserError: behind the last line, if any of them is damaged.
    """
    damaged = 0
    for step in _steps(run):
        try:
            checkpoint = read_checkpoint(run, step)
        except DamagedError as error:
            damaged += 1
            yield f"step {step}  damaged: {error}"
            continue
        size = sum((checkpoint.folder / name).stat().st_size for name in checkpoint.state["sha256"])
        yield f"step {step}  whole: {len(checkpoint.state['sha256'])} files, {human_bytes(size)}"
    if damaged:
        raise UserError(
            f"{damaged} checkpoint(s) of {run} are damaged; a resume uses the newest whole one, and"
            " `lwo-dist checkpoints prune` removes the others"
        )


def prune_checkpoints(run: RunFolder, keep: int) -> Iterator[str]:
    """Keep the newest `keep` whole checkpoints; remove the others and what only they name. A line
    per thing removed.

    Raises:
        UserError: keep below 1, no whole checkpoint, a run that is going on.
    """
    if keep < 1:
        raise UserError(f"--keep = {keep} must be at least 1")
    _refuse_running(run)
    whole: list[int] = []
    for step in reversed(_steps(run)):
        if len(whole) == keep:
            break
        try:
            whole.append(read_checkpoint(run, step).step)
        except DamagedError as error:
            yield f"step {step}  damaged: {error}"
    if not whole:
        raise UserError(f"no checkpoint of {run} is whole, so none is removed")
    for name in prune(run, set(whole)):
        yield f"removed {name}"


def export_run(run: RunFolder, target: Path | None, step: int | None, dtype: Dtype) -> Path:
    """Write a checkpoint (the newest whole one) as a Hugging Face folder; returns that folder.

    Raises:
        UserError: no such run or step, a damaged checkpoint, a folder that cannot be written.
    """
    steps = _steps(run)
    if step is not None and step not in steps:
        raise UserError(f"--step = {step}: {run} has the checkpoints {', '.join(map(str, steps))}")
    try:
        checkpoint = read_checkpoint(run, step) if step is not None else newest_checkpoint(run)
    except DamagedError as error:
        raise UserError(
            f"--step = {step}: the checkpoint is damaged ({error}); give another one"
        ) from None
    assert checkpoint is not None
    target = target or (run.local / "model" if run.url is None else Path(run.local.name))
    if target.exists() and not (target / "config.json").is_file():
        raise UserError(f"--to = {target} is there and no model; give a new folder")
    try:
        return export_model(checkpoint, target.absolute(), dtype=dtype)
    except OSError as error:
        raise UserError(
            f"--to = {target}: {error.strerror or error}; give a folder with room"
        ) from None


def _steps(run: RunFolder) -> list[int]:
    steps = committed_steps(run)
    if not steps:
        raise UserError(f"{run} has no checkpoints; give the folder of a run, <storage>/<run_name>")
    return steps


def _refuse_running(run: RunFolder) -> None:
    spool = run.local / "metrics.jsonl"
    if not spool.is_file():
        return
    with spool.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{run} is being trained, and prunes by itself; wait for its end"
            ) from None
        except OSError:  # no locks on this file system
            return
