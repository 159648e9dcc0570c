"""List, verify, prune and export a run's checkpoints, for the command line."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lwo_dist import lease
from lwo_dist.config import ModelConfig
from lwo_dist.errors import DamagedError, UserError, first_line
from lwo_dist.spool import SPOOL_NAME, is_being_written
from lwo_dist.storage import RunFolder
from lwo_dist.tasks.scores import Score, ScoreSheet
from lwo_dist.units import human_bytes

from .card import read_comparison
from .export import Dtype, export_adapter, export_model
from .format import (
    Checkpoint,
    committed_steps,
    newest_checkpoint,
    prune,
    read_checkpoint,
    read_state,
    step_folder,
)
from .schema import STATE, check_record

__all__ = [
    "choose_checkpoint",
    "export_checkpoint",
    "list_checkpoints",
    "prune_checkpoints",
    "verify_checkpoints",
]


def list_checkpoints(run: RunFolder) -> Iterator[str]:
    """One line per checkpoint: step, active layer, main scores, files, time.

    Only state.json is verified.

    Raises:
        UserError: the run has no checkpoints.
    """
    for step in _steps(run):
        try:
            state = read_state(run, step)
            check_record(state)
        except DamagedError as error:
            yield f"step {step}  damaged: {error}"
            continue
        written = (run.local / step_folder(step) / STATE).stat().st_mtime
        when = datetime.datetime.fromtimestamp(written).isoformat(" ", "seconds")
        scores = (state.get("results") or {}).get("evaluations", {}).get(str(step), {})
        shown = [
            f"held-out {score.heading} {score.show(scores[score.key])}"
            for score in ScoreSheet.read(state.get("run") or {}, scores).scores
            if score.headline and score.key in scores
        ]
        parts = [f"layer {state['active_layer']}", *shown, f"{len(state['sha256'])} files", when]
        yield f"step {step}  {'  '.join(parts)}"


def verify_checkpoints(run: RunFolder) -> Iterator[str]:
    """Read every byte of every checkpoint; one line per checkpoint: intact, or what is damaged.

    Raises:
        UserError: the run has no checkpoints; or, after the last line, some are damaged.
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
            f"{damaged} checkpoint(s) of {run} are damaged; a resume uses the newest whole one;"
            " remove the others with `lwo-dist checkpoints prune`"
        )


def prune_checkpoints(run: RunFolder, keep: int) -> Iterator[str]:
    """Keep the newest `keep` intact checkpoints and remove the others, with files only they use.

    Yields one line per removed file or folder.

    Raises:
        UserError: `keep` is below 1, no checkpoint is intact, or the run is still running.
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
        raise UserError(
            f"no checkpoint of {run} is whole, so nothing was removed; remove the folder to start"
            " anew"
        )
    try:
        removed = prune(run, set(whole))
    except OSError as error:
        raise UserError(f"{run} could not be pruned: {first_line(error)}") from None
    for name in removed:
        yield f"removed {name}"


def choose_checkpoint(
    run: RunFolder, step: int | None = None, *, newest: bool = False
) -> tuple[Checkpoint, str]:
    """The checkpoint to export, and in words which one it is.

    Args:
        step: its step; None: the best one by the score that selects the best checkpoint of this
            run, or the newest if none was evaluated.
        newest: take the newest intact one.

    Raises:
        UserError: no such run or step, or the checkpoint is damaged.
    """
    steps = _steps(run)
    if step is not None:
        if step not in steps:
            known = ", ".join(map(str, steps))
            raise UserError(f"--step = {step}: {run} has the checkpoints {known}")
        return _intact(run, step), "as given"
    best, score = (0, None) if newest else _best(run, steps)
    if score is not None and best > 0:
        return _intact(run, best), f"the best by {score.label}"
    checkpoint = newest_checkpoint(run)
    assert checkpoint is not None
    if newest:
        return checkpoint, "the newest"
    why = "none was evaluated" if score is not None else "this run does not say which one is best"
    return checkpoint, f"the newest; {why}"


def export_checkpoint(
    run: RunFolder,
    checkpoint: Checkpoint,
    target: Path,
    dtype: Dtype,
    *,
    base: ModelConfig | None = None,
    adapter: bool = False,
    trust_remote_code: bool = False,
) -> Path:
    """Write a checkpoint of `run` as a Hugging Face model folder, in place of one in `target`.

    Args:
        base: the base model of a checkpoint of adapters; None: the one that it names.
        adapter: write only its adapters, in peft's format.
        trust_remote_code: run the Python code that comes with the model, if any.

    Returns:
        The folder, absolute.

    Raises:
        UserError: `target` cannot be written, or as `export_model`.
    """
    comparison = read_comparison(run, checkpoint.step)
    how: dict[str, Any] = {"comparison": comparison, "trust_remote_code": trust_remote_code}
    try:
        target = target.resolve() if target.is_symlink() else target.absolute()
        if adapter:
            return export_adapter(checkpoint, target, **how)
        return export_model(checkpoint, target, dtype=dtype, base=base, **how)
    except OSError as error:
        raise UserError(
            f"--to = {target}: {error.strerror or error}; give a folder with enough space"
        ) from None


def _best(run: RunFolder, steps: list[int]) -> tuple[int, Score | None]:
    """The best checkpoint's step, 0 without any, and the score that it is the best by."""
    for step in reversed(steps):
        try:
            state = read_state(run, step)
            check_record(state, "run", "results")
        except DamagedError:
            continue  # an older one has the earlier evaluations
        sheet = ScoreSheet.read(state["run"], ())
        score = next((s for s in sheet.scores if s.name == state["run"].get("metric")), None)
        evaluations = {int(step): s for step, s in state["results"]["evaluations"].items()}
        saved = {step: s for step, s in evaluations.items() if step in steps}
        return score.best_step(saved) if score is not None else 0, score
    return 0, None


def _intact(run: RunFolder, step: int) -> Checkpoint:
    try:
        return read_checkpoint(run, step)
    except DamagedError as error:
        raise UserError(
            f"step {step}: the checkpoint is damaged ({error}); give another one with --step, or"
            " --newest"
        ) from None


def _steps(run: RunFolder) -> list[int]:
    try:
        steps = committed_steps(run)
    except OSError as error:
        raise UserError(f"{run} cannot be read: {first_line(error)}") from None
    if not steps:
        raise UserError(f"{run} has no checkpoints; give the folder of a run, <storage>/<run_name>")
    return steps


def _refuse_running(run: RunFolder) -> None:
    spool = run.file(SPOOL_NAME)
    if spool.is_file() and is_being_written(spool):
        raise UserError(f"{run} is still running and prunes by itself; wait until it ends")
    lease.refuse_held(run)
