"""What happens before the workers of a run start: the checks, the claim on its folder, run.json."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import lease
from .access import access_of, share
from .cache import cache_folder
from .checkpoint.format import committed_steps, step_folder
from .checkpoint.schema import RECORD, check_run_record, read_json
from .config import Config
from .config.batch import check_world_sizes
from .console import say
from .errors import DamagedError, UserError, first_line, printable
from .examples.tiny_code import default_cache_folder, ensure_tiny_code
from .files import absolute, absolute_uri, make_folder, write_whole
from .git import is_repository_url
from .methods import Method
from .models import PretrainedSource, check_model, check_prepared, decoder_start
from .models.gguf import dequantise, is_gguf
from .plan.estimate import early_plan
from .registry import METHODS, STRATEGIES, TASKS
from .stop import Stopped
from .storage import RunFolder, is_url, new_run_name, storage_folder, storage_path
from .strategies import StrategyBuilder
from .strategies.checks import check_config
from .tasks.base import Task
from .tracking.mlflow import DATABASE, create_run, end_run, tracking_uri
from .units import human_bytes

__all__ = [
    "ending_tracking",
    "fitting_task",
    "model_source",
    "prepare",
    "read_record",
    "refuse_too_large",
    "share_run",
    "stopped_early",
]


def prepare(config: Config, *, elsewhere: bool = False) -> Config:
    """Check everything possible before workers start, claim the run, and write run.json. Called
    once by the driver.

    Args:
        elsewhere: the workers run on other machines, which may have a model that is not here.

    Returns:
        The config with a run name, absolute paths and, for tiny-code and GGUF files, the folder of
        the base model.

    Raises:
        UserError: a setting, the source, the model, the storage or the batch size is invalid;
            nothing was written. Or another process is writing this run.
    """
    source = config.data.source
    if source is None:
        raise UserError("data.source is not set; give a folder of source files or a git repository")
    check_config(config)
    task: Task = TASKS.get(config.task)
    task.check(config)
    check_world_sizes(config)
    builder: StrategyBuilder = STRATEGIES.get(config.strategy)
    config = builder.resolve(config)
    tracking_uri(config.tracking, Path())  # refuse a password early
    run_name = config.run_name or new_run_name(METHODS.get(config.method).name)
    storage = config.storage if is_url(config.storage) else str(storage_folder(config.storage))
    config = _with_absolute_paths(config).model_copy(
        update={"storage": storage, "run_name": run_name}
    )
    storage_is_new = not storage_path(storage).exists()
    with _nothing_left_behind(storage_path(storage)):
        run_folder = RunFolder(storage, run_name)
        run_folder.check_writable()
        if config.checkpoint.resume == "never" and committed_steps(run_folder):
            raise UserError(
                f"run_name = {run_name}: {run_folder} holds a run and checkpoint.resume is never; "
                "choose another run_name, or resume: auto"
            )
        if config.model.name != "tiny-code" and not is_gguf(config.model.name):
            check_model(config.model, config.train.sequence_length, elsewhere=elsewhere)
            if not elsewhere or Path(config.model.name).expanduser().exists():
                task, _ = fitting_task(config)
            if not elsewhere:
                refuse_too_large(config)
        say(f"reading {printable(str(config.data.source))}")
        task.read(config.data, cache_folder(config))
        if config.model.name == "tiny-code":
            base = ensure_tiny_code(default_cache_folder(run_folder.local.parent))
            config = _with_model(config, base)
        elif is_gguf(config.model.name):
            config = _with_model(config, dequantise(config.model, cache_folder(config)))
        elif Path(config.model.name).expanduser().exists():  # only now: messages name it as given
            config = _with_model(config, Path(absolute(config.model.name)))
        method: Method = METHODS.get(config.method)
        if method.changes_model:
            prepare_model = partial(_prepare_model, method, config)
            check_prepared(config.model, prepare_model, elsewhere=elsewhere)
    make_folder(run_folder.local)
    claim = lease.take(run_folder, force=config.checkpoint.take_over)
    record = read_record(run_folder) or {"run_name": run_name, "attempts": 0}
    record["attempts"] += 1
    record["holder"] = claim.holder
    with ending_tracking(config):
        record["mlflow_run_id"] = create_run(config, run_folder.local.parent, run_name)
        write_whole(run_folder.path(RECORD), json.dumps(record, indent=1).encode())
        run_folder.push([RECORD])
        if config.access == "group" and storage_is_new:
            share(run_folder.local.parent)
        share_run(config, run_folder)
    return config


def refuse_too_large(config: Config) -> None:
    """Refuse a run whose weights, gradients and optimizer state alone exceed a GPU's memory, and
    warn if a step is likely to; of our own methods and strategies. Nothing is loaded.

    Raises:
        UserError
    """
    memory = device_memory()
    plan = early_plan(config) if memory is not None else None
    if memory is None or plan is None:
        return
    where = f"on {config.cluster.max_workers} GPU(s) of {human_bytes(memory)} with {plan.name}"
    remedy = "more workers, strategy: fsdp, fsdp.storage: bf16 or a smaller model need less"
    held = plan.held.device_bytes
    if held > memory:
        raise UserError(
            f"model.name {config.model.name!r} will not fit: weights, gradients and optimizer state"
            f" of a rank need {human_bytes(held)} {where}; {remedy}"
        )
    if plan.peak.total > memory:
        say(
            f"warning: a step may not fit: about {human_bytes(plan.peak.total)} of a rank {where};"
            " shorter sequences, smaller micro-batches and train.gradient_checkpointing: true need"
            " less (lwo-dist plan says how much)"
        )


def device_memory() -> int | None:
    """Bytes of this machine's first GPU; None without one."""
    if not torch.cuda.is_available():
        return None
    return int(torch.cuda.get_device_properties(0).total_memory)


def fitting_task(config: Config) -> tuple[Task, int | None]:
    """The task with examples for the run's kind of model; and the first token of the decoder, if
    that is an encoder-decoder. No collective.

    Raises:
        UserError: the task or a setting is for decoders alone.
    """
    task: Task = TASKS.get(config.task)
    start = decoder_start(config.model)
    return (task if start is None else task.for_encoder_decoder(config)), start


@contextmanager
def ending_tracking(config: Config) -> Iterator[None]:
    """If an error leaves the block, end the MLflow run: workers that were killed, or that have not
    started, could not. Nothing happens if another process has taken over the run.
    """
    try:
        yield
    except Stopped:
        raise  # the workers have ended it
    except BaseException as error:
        run_folder = RunFolder(config.storage, str(config.run_name))
        status = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
        if lease.is_ours(run_folder):
            end_run(config, run_folder.local.parent, str(config.run_name), status)
        raise


def stopped_early(config: Config, reason: str) -> Stopped:
    """The end of a run that was interrupted while it could not save; it names what there is."""
    if config.run_name is None:
        return Stopped(reason, 0, None)
    run_folder = RunFolder(config.storage, config.run_name)
    steps = committed_steps(run_folder)
    if not steps:
        return Stopped(reason, 0, None)
    return Stopped(reason, steps[-1], run_folder.local / step_folder(steps[-1]))


def model_source(config: Config, method: Method) -> PretrainedSource:
    """Where a strategy gets the model of a run from, with the method's changes."""
    return PretrainedSource(
        config.model,
        gradient_checkpointing=config.train.gradient_checkpointing,
        prepare=partial(_prepare_model, method, config),
    )


def read_record(run_folder: RunFolder) -> dict[str, Any] | None:
    """What run.json says; None if there is none. It may come from anybody.

    Raises:
        UserError: it is damaged.
    """
    # If the run resumed on another machine, its records are only in the store.
    run_folder.fetch_small()
    try:
        path = run_folder.file(RECORD)
        if not path.exists():
            return None
        record: dict[str, Any] = read_json(path)
        check_run_record(record)
    except (DamagedError, OSError) as error:
        raise UserError(
            f"{run_folder}/{RECORD} is damaged ({first_line(error)}); remove it, and the run goes"
            " on under a new MLflow run"
        ) from None
    return record


def share_run(config: Config, run_folder: RunFolder) -> None:
    if access_of(run_folder.local) == "group":
        share(run_folder.local)
    if config.access == "group":
        share(run_folder.local.parent / DATABASE)  # SQLite lets only the owner write to it.


def _prepare_model(method: Method, config: Config, model: torch.nn.Module) -> None:
    # What a method adds is then equal on all ranks.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        method.prepare(model, config)


def _with_absolute_paths(config: Config) -> Config:
    """The config with paths that a worker opens made absolute: Ray Train moves each to a folder of
    its own."""
    data = {
        name: absolute(value)
        for name, value in config.data
        if (name == "cache" or name.endswith("source"))
        and isinstance(value, str)
        and not is_repository_url(value)
    }
    update: dict[str, Any] = {"data": config.data.model_copy(update=data)}
    if config.tracking.uri:
        uri = absolute_uri(config.tracking.uri)
        update["tracking"] = config.tracking.model_copy(update={"uri": uri})
    return config.model_copy(update=update)


def _with_model(config: Config, folder: Path) -> Config:
    model = config.model.model_copy(update={"name": str(folder)})
    return config.model_copy(update={"model": model})


@contextmanager
def _nothing_left_behind(folder: Path) -> Iterator[None]:
    """On an error, remove the empty folders created on the way to it."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except UserError:
        for path in [*sorted(folder.rglob("*"), reverse=True), *made] if made else []:
            with suppress(OSError):  # not empty, or not a folder
                path.rmdir()
        raise
