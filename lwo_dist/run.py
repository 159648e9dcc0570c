"""The composition root: a config becomes model, data, hook, trainer and callbacks.

The driver calls `prepare` once; then every worker calls `run`. Under torchrun each rank calls
`prepare_and_run`.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import distributed
from .base_model import default_cache_folder, ensure_base_model
from .callback import Callback, RunInfo
from .checkpoint.export import export_model
from .checkpoint.format import committed_steps, read_checkpoint, step_folder
from .checkpoint.resume import find_checkpoint, refuse_other_run, restore
from .checkpoint.store import LayerStore
from .config import Config
from .data import check_world_sizes
from .data.cache import cache_folder
from .errors import UserError
from .hook import LWO, attach, make_engine
from .models import load_model, load_tokenizer
from .registry import TASKS
from .stop import Stopped, StopRequest, StopVote
from .storage import RunFolder, is_url, storage_folder, write_whole
from .strategies import load_deepspeed
from .strategies.deepspeed import settings as deepspeed_config
from .tasks.prepare import prepare_dataset
from .tracking.mlflow import MLflowCallback, create_run, tracking_uri
from .training.about import about_run, facts, layer_sizes, save_model_files
from .training.evaluate import evaluate
from .training.progress import Progress
from .training.results import Results
from .training.system_metrics import SystemMetrics
from .training.trainer import Trainer

__all__ = ["prepare", "prepare_and_run", "run"]


def prepare(config: Config) -> Config:
    """Check what can be checked before any worker starts, and make run.json. The driver calls it
    once.

    Returns:
        The config with a run name, absolute paths and, for tiny-code, the folder of the base model.

    Raises:
        UserError: source, storage or batch size are wrong; nothing was written then.
    """
    source = config.data.source
    if source is None:
        raise UserError("data.source is not set; give a folder of source files or a git repository")
    task = TASKS.get(config.task)
    task.check(config)
    check_world_sizes(config)
    if config.strategy == "deepspeed":  # the workers need not see the file
        config = config.model_copy(
            update={"deepspeed": deepspeed_config.read_config(config.deepspeed)}
        )
        for workers in config.cluster.world_sizes:
            deepspeed_config.resolve(config, workers)
    tracking_uri(config.tracking, Path())  # refuses a password
    run_name = (
        config.run_name or f"{config.method}-{datetime.datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}"
    )
    if "://" not in source and not source.startswith("git@"):
        source = str(Path(source).expanduser().absolute())
    data = config.data.model_copy(update={"source": source})
    storage = config.storage if is_url(config.storage) else str(storage_folder(config.storage))
    config = config.model_copy(update={"storage": storage, "run_name": run_name, "data": data})
    place = RunFolder(storage, run_name)
    with _nothing_left_behind(place.local.parent):
        place.check_writable()
        if config.checkpoint.resume == "never" and committed_steps(place):
            raise UserError(
                f"run_name = {run_name}: {place} holds a run and checkpoint.resume is never; choose"
                " another run_name, or resume: auto"
            )
        task.read(config.data, cache_folder(config))
        if config.model.name == "tiny-code":
            base = ensure_base_model(default_cache_folder(place.local.parent))
            config = config.model_copy(
                update={"model": config.model.model_copy(update={"name": str(base)})}
            )
    place.local.mkdir(exist_ok=True)
    place.fetch_small()
    record = _read_json(place.local / "run.json") or {"run_name": run_name, "attempts": 0}
    record["attempts"] += 1
    record["mlflow_run_id"] = create_run(config, place.local.parent, run_name)
    write_whole(place.local / "run.json", json.dumps(record, indent=1).encode())
    place.push(["run.json"])
    return config


def prepare_and_run(config: Config) -> dict[str, Any] | None:
    """For ranks without a driver (torchrun, Slurm): rank 0 prepares, then all of them run."""
    distributed.init_process_group(config.cluster.timeout_s)
    cluster = config.cluster.model_copy(update={"num_workers": distributed.world_size()})
    config = distributed.on_rank_0(prepare, config.model_copy(update={"cluster": cluster}))
    return run(config)


def run(
    config: Config,
    callbacks: Sequence[Callback] = (),
    *,
    on_commit: Callable[[int, Path], None] = lambda step, folder: None,
    stop: StopRequest | None = None,
) -> dict[str, Any] | None:
    """Train on this worker; every worker calls it with the same prepared config.

    Args:
        callbacks: rank 0's count, those of the others are ignored.
        on_commit: called on every rank, at the same place in the loop, with each checkpoint that is
            there.
        stop: asked about once a second; None: SIGTERM, SIGUSR1 and `train.max_seconds` stop the
            run.

    Returns:
        On rank 0 what summary.json holds, None elsewhere.

    Raises:
        UserError: on every rank alike.
        Stopped: on every rank alike; the next `run` goes on from its checkpoint.
    """
    stop = stop or StopRequest(config.train.max_seconds)
    device = distributed.init_process_group(config.cluster.timeout_s)
    main = distributed.rank() == 0
    place = RunFolder(config.storage, str(config.run_name))
    record = distributed.on_rank_0(_read_record, place)
    everyone = [Progress(), *_tracking(config, record), *callbacks] if main else []
    try:
        trainer = _build(config, place, device, everyone, stop, on_commit)
        with stop.listening():
            trainer.train()
        summary = distributed.on_rank_0(_finish, config, trainer, place, record)
    except Stopped as stopped:
        for callback in everyone:
            callback.on_run_stopped(str(stopped))
        distributed.broadcast_object(
            None
        )  # torchrun ends all ranks when the first one leaves: rank 0 reports first
        raise
    except BaseException as error:
        for callback in everyone:
            callback.on_run_failed(error)
        raise
    for callback in everyone:
        callback.on_run_end(summary)
    if main:
        place.push_small()
    return summary if main else None


def _build(
    config: Config,
    place: RunFolder,
    device: torch.device,
    callbacks: Sequence[Callback],
    stop: StopRequest,
    on_commit: Callable[[int, Path], None],
) -> Trainer:
    main = distributed.rank() == 0
    checkpoint = find_checkpoint(config, place)
    tokenizer = load_tokenizer(config.model)
    task = TASKS.get(config.task)
    # Where nodes share no folder, each makes its own examples.
    first_of_node = (
        os.environ.get("LOCAL_RANK", "0") == "0"
        and is_url(config.storage)
        and not config.data.cache
    )
    data = prepare_dataset(config, tokenizer, task, is_builder=main or first_of_node)
    results = Results(place.local, task, config.eval.metric, writes=main)
    source = config.model
    if checkpoint is not None:
        refuse_other_run(config, data, checkpoint.state)
        source = source.model_copy(update={"name": str(checkpoint.folder), "revision": None})
    partition, settings = None, {}
    if config.strategy == "deepspeed":
        settings = deepspeed_config.resolve(config, distributed.world_size())
        if settings["zero_optimization"]["stage"] == 3:
            partition = load_deepspeed().partitioner(settings)
    model = load_model(
        source,
        config.train,
        strategy=config.strategy,
        device=device,
        partition=partition,
        storage=config.fsdp.storage,
    )
    wrapped = make_engine(model, config.lwo, settings, config.method) if settings else model
    lwo = attach(wrapped, config.lwo, config.method)
    store = LayerStore(
        place, partial(save_model_files, model, tokenizer), keep=config.checkpoint.keep
    )
    if checkpoint is not None:
        restore(lwo, checkpoint)
        store.remember(checkpoint, lwo)
        results.load_state_dict(checkpoint.state["results"])
    system = SystemMetrics(
        device,
        place.local.parent,
        enabled=config.tracking.enabled and config.tracking.system_metrics,
    )
    trainer = Trainer(
        config,
        lwo,
        data,
        results,
        store,
        device=device,
        callbacks=callbacks,
        on_commit=on_commit,
        system=system,
        checkpoint=checkpoint.folder if checkpoint is not None else None,
        stop=StopVote(stop, distributed.first_reason),
        evaluate=lambda before_batch: evaluate(
            model,
            tokenizer,
            data.held_out,
            batch_size=config.eval.batch_size,
            task=task,
            device=device,
            max_new_tokens=config.eval.max_new_tokens,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            synced=config.strategy != "replicate",
            before_batch=before_batch,
        ),
        about_run=about_run(config, data),
    )
    info = RunInfo(
        config,
        place.local,
        distributed.world_size(),
        tuple(layer.name for layer in lwo.layers),
        facts(config, lwo, data, device),
        lwo.step_count,
        layer_sizes(lwo),
        tuple(system.hosts),
    )
    for callback in callbacks:
        callback.on_run_start(info)
    _warn_never_trained(config, lwo)
    return trainer


def _finish(
    config: Config, trainer: Trainer, place: RunFolder, record: dict[str, Any]
) -> dict[str, Any]:
    """Export the best checkpoint and write summary.json."""
    steps = committed_steps(place)
    # The best one may have met a full disk.
    step = trainer.results.best_step if trainer.results.best_step in steps else steps[-1]
    checkpoint = read_checkpoint(place, step)
    export = export_model(checkpoint, place.local / "model")
    summary = {
        "run_name": config.run_name,
        "method": config.method,
        "strategy": config.strategy,
        "world_size": distributed.world_size(),
        "steps": config.train.steps,
        **trainer.results.summary(),
        "skipped_steps": int(trainer.lwo.skipped_steps),
        "mlflow_run_id": record.get("mlflow_run_id"),
        "checkpoint": f"{place}/{step_folder(step)}",
        "export": f"{place}/model",
    }
    place.push(path.relative_to(place.local).as_posix() for path in sorted(export.iterdir()))
    write_whole(place.local / "summary.json", json.dumps(summary, indent=1).encode())
    return summary


def _tracking(config: Config, record: dict[str, Any] | None) -> list[Callback]:
    if not config.tracking.enabled:
        return []
    run_id = (record or {}).get("mlflow_run_id")
    return [MLflowCallback(config.tracking, storage_folder(config.storage), run_id=run_id)]


def _warn_never_trained(config: Config, lwo: LWO) -> None:
    never = [lwo.layers[i].name for i in lwo.schedule.never_active(config.train.steps)]
    if never and distributed.rank() == 0:
        print(
            f"warning: {config.train.steps} steps never train {', '.join(never)}; one cycle takes"
            f" {lwo.schedule.steps_per_cycle} steps (lwo.steps_per_layer ="
            f" {config.lwo.steps_per_layer})",
            flush=True,
        )


@contextmanager
def _nothing_left_behind(folder: Path) -> Iterator[None]:
    """Remove the folders that were made on the way to an error, as far as they are empty."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except UserError:
        for path in [*sorted(folder.rglob("*"), reverse=True), *made] if made else []:
            with suppress(OSError):  # not empty, or not a folder
                path.rmdir()
        raise


def _read_record(place: RunFolder) -> dict[str, Any] | None:
    # where the run went on on another machine, what it left is in the store only
    place.fetch_small()
    return _read_json(place.local / "run.json")


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text()) if path.is_file() else None
    except ValueError:
        raise UserError(
            f"{path} is damaged (not JSON); remove it, and the run goes on under a new MLflow run"
        ) from None
