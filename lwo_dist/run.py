"""The composition root: builds model, data, hook, trainer and callbacks from a config.

The driver calls `prepare` once; then every worker calls `run`. Under torchrun each rank calls
`prepare_and_run`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import distributed, lease
from .access import access_of, share, umask_of
from .cache import cache_folder
from .callback import Callback
from .checkpoint.export import export_adapter, export_model
from .checkpoint.format import Checkpoint, committed_steps, read_checkpoint, step_folder
from .checkpoint.resume import (
    data_record,
    find_checkpoint,
    refuse_other_base,
    refuse_other_run,
    restore,
)
from .checkpoint.schema import RECORD, check_run_record, read_json
from .checkpoint.store import LayerStore
from .config import Config
from .config.batch import check_world_sizes
from .console import say
from .data import PreparedData, steps_of_epochs
from .errors import DamagedError, UserError, first_line, printable
from .examples.tiny_code import default_cache_folder, ensure_tiny_code
from .files import absolute, absolute_uri, make_folder, write_whole
from .git import is_repository_url
from .hook import LWO, attach
from .methods import Method
from .models import (
    PretrainedSource,
    base_digest,
    check_model,
    check_prepared,
    code_files,
    licence_of,
    load_tokenizer,
    refuse_long_sequences,
    refuse_tokens,
)
from .models.gguf import dequantise, is_gguf
from .models.saving import save_model_files
from .registry import METHODS, STRATEGIES, TASKS
from .run_info import checkpoint_record
from .stop import CTRL_C, Stopped, StopRequest, StopVote
from .storage import RunFolder, is_url, new_run_name, storage_folder, storage_path
from .strategies import StrategyBuilder
from .strategies.checks import check_config
from .tasks.base import Task
from .tasks.prepare import prepare_dataset
from .tracking.mlflow import DATABASE, MLflowCallback, create_run, end_run, tracking_uri
from .training.baseline import take_baseline
from .training.describe import describe_run, device_name
from .training.evaluate import Evaluation, evaluate
from .training.meter import Meter
from .training.packing import check_packing
from .training.progress import Progress
from .training.results import Results
from .training.saver import Saver
from .training.system_metrics import SystemMetrics
from .training.trainer import Trainer

__all__ = ["ending_tracking", "model_source", "prepare", "prepare_and_run", "run", "stopped_early"]


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
    record = _read_record(run_folder) or {"run_name": run_name, "attempts": 0}
    record["attempts"] += 1
    record["holder"] = claim.holder
    with ending_tracking(config):
        record["mlflow_run_id"] = create_run(config, run_folder.local.parent, run_name)
        write_whole(run_folder.path(RECORD), json.dumps(record, indent=1).encode())
        run_folder.push([RECORD])
        if config.access == "group" and storage_is_new:
            share(run_folder.local.parent)
        _share_run(config, run_folder)
    return config


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


def prepare_and_run(config: Config) -> dict[str, Any] | None:
    """For ranks without a driver (torchrun, Slurm): rank 0 prepares, then all ranks run."""
    stop = StopRequest(config.train.max_seconds)
    try:
        with ExitStack() as stack:
            stack.enter_context(umask_of(config.access))
            stack.enter_context(stop.interrupting())
            distributed.init_process_group(config.cluster.timeout_s)
            cluster = config.cluster.model_copy(update={"num_workers": distributed.world_size()})
            config = distributed.on_rank_0(prepare, config.model_copy(update={"cluster": cluster}))
            if distributed.rank() == 0:
                stack.enter_context(ending_tracking(config))
                run_folder = RunFolder(config.storage, str(config.run_name))
                stack.enter_context(lease.renewed(run_folder))
            return run(config, stop=stop)
    except KeyboardInterrupt:
        raise stopped_early(config, stop.reason or CTRL_C) from None


def run(
    config: Config,
    callbacks: Sequence[Callback] = (),
    *,
    on_commit: Callable[[int, Path], None] = lambda step, folder: None,
    stop: StopRequest | None = None,
    holder: str | None = None,
) -> dict[str, Any] | None:
    """Train on this worker; every worker calls it with the same prepared config.

    Args:
        callbacks: used on rank 0; ignored on other ranks.
        on_commit: called on every rank, at the same place in the loop, with each committed
            checkpoint.
        stop: polled about once a second; None: SIGTERM, SIGUSR1, Ctrl-C and `train.max_seconds`
            stop the run.
        holder: id of the process that called `prepare`, if that was on another machine.

    Returns:
        The contents of summary.json on rank 0, None elsewhere.

    Raises:
        UserError: on all ranks; LostRunError on rank 0 if another process has taken over the run.
        Stopped: on all ranks; the next `run` resumes from its checkpoint.
    """
    stop = stop or StopRequest(config.train.max_seconds)
    device = distributed.init_process_group(config.cluster.timeout_s)
    config = _with_precision(config, device)
    main = distributed.rank() == 0
    run_folder = RunFolder(config.storage, str(config.run_name))
    record = distributed.on_rank_0(_read_record, run_folder)
    assert record is not None, "prepare() comes before run()"
    with distributed.errors_on_all_ranks():
        claim = lease.join(run_folder, holder or record["holder"]) if main else None
    may_write = claim.check if claim is not None else _nothing
    everyone = [Progress(), *_tracking(config, record), *callbacks] if main else []
    try:
        trainer = _build(config, run_folder, device, everyone, stop, on_commit, may_write)
        with ExitStack() as stack:
            stack.enter_context(stop.listening())
            if claim is not None:
                # The next save would be refused.
                on_loss = partial(stop.request, "a takeover of the run by another process")
                stack.enter_context(lease.watched(claim, on_loss))
            trainer.train()
        distributed.on_rank_0(may_write)
        summary = distributed.on_rank_0(_finish, trainer, run_folder, record)
    except lease.LostRunError:
        raise  # the other process reports how the run ends
    except Stopped as stopped:
        distributed.on_rank_0(may_write)
        for callback in everyone:
            callback.on_run_stopped(str(stopped))
        # torchrun ends all ranks when the first one exits, so rank 0 must report first.
        distributed.broadcast_object(None)
        raise
    except BaseException as error:
        if claim is None or not claim.is_lost():
            for callback in everyone:
                callback.on_run_failed(error)
        raise
    for callback in everyone:
        callback.on_run_end(summary)
    if main:
        run_folder.push_small()
        _share_run(config, run_folder)
    return summary if main else None


def _build(
    config: Config,
    run_folder: RunFolder,
    device: torch.device,
    callbacks: Sequence[Callback],
    stop: StopRequest,
    on_commit: Callable[[int, Path], None],
    may_write: Callable[[], None],
) -> Trainer:
    """Build everything a run consists of; the same on every rank."""
    checkpoint = find_checkpoint(config, run_folder)
    tokenizer = load_tokenizer(config.model)
    task: Task = TASKS.get(config.task)
    data = _read_data(config, tokenizer, task)
    config = _with_length(config, data)
    if checkpoint is not None:
        refuse_other_run(config, data, checkpoint.state)
    method: Method = METHODS.get(config.method)
    digest = None
    if method.trains_adapters:
        digest = distributed.on_rank_0(base_digest, config.model)
        if checkpoint is not None:
            refuse_other_base(config, digest, checkpoint.state)
    lwo = _make_hook(config, checkpoint, device)
    refuse_tokens(config.model.name, lwo.module, data.highest_token)
    refuse_long_sequences(config.model.name, lwo.module, config.train.sequence_length)
    if config.train.packing:
        check_packing(lwo, device, precision=config.train.precision)
    results = Results(
        run_folder.local,
        task,
        config.eval.metric,
        writes=distributed.rank() == 0,
        with_samples=config.tracking.log_completions,
    )
    store = LayerStore(
        run_folder,
        partial(save_model_files, lwo.module, tokenizer, code=code_files(config.model)),
        keep=config.checkpoint.keep,
        adapters_only=method.trains_adapters,
        may_write=may_write,
    )
    if checkpoint is not None:
        store.remember(checkpoint, lwo)
        results.load_state_dict(checkpoint.state["results"])
    elif config.eval.baseline is not None:
        take_baseline(config, data, results)
    logs_system = config.tracking.enabled and config.tracking.system_metrics
    system = SystemMetrics(device, run_folder.local.parent, enabled=logs_system)
    info = describe_run(
        config, lwo, data, run_dir=run_folder.local, device=device, hosts=system.hosts
    )
    run_record = {**checkpoint_record(info), "base_digest": digest}
    if distributed.rank() == 0:  # only rank 0 writes it
        run_record["licence"] = licence_of(config.model.name, config.model.revision)
    saver = Saver(
        config,
        lwo,
        results,
        store,
        about={"run": run_record, "data": data_record(config, data)},
        callbacks=callbacks,
        on_commit=on_commit,
        checkpoint=checkpoint.folder if checkpoint is not None else None,
    )
    trainer = Trainer(
        config,
        lwo,
        data,
        device=device,
        evaluate=_evaluation(config, lwo, tokenizer, task, data, device),
        meter=Meter(lwo, results, system, device),
        results=results,
        saver=saver,
        stop=StopVote(stop, distributed.first_reason),
        callbacks=callbacks,
    )
    for callback in callbacks:
        callback.on_run_start(info)
    _warn_never_trained(config, lwo)
    return trainer


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


def _with_precision(config: Config, device: torch.device) -> Config:
    """`train.precision: auto` decided by the devices of all ranks."""
    if config.train.precision != "auto":
        return config
    precision = "bf16" if distributed.every_rank_computes_bf16(device) else "fp32"
    train = config.train.model_copy(update={"precision": precision})
    return config.model_copy(update={"train": train})


def _with_length(config: Config, data: PreparedData) -> Config:
    """`train.epochs` as steps of these examples."""
    epochs = config.train.epochs
    if epochs is None:
        return config
    sequences = len(data.lengths)
    steps = steps_of_epochs(epochs, sequences, config.train.global_batch_size)
    if distributed.rank() == 0:
        print(
            f"train.epochs = {epochs:g}: {steps} steps of {config.train.global_batch_size} out of"
            f" {sequences:,} training sequences",
            flush=True,
        )
    return config.with_steps(steps)


def _evaluation(
    config: Config, lwo: LWO, tokenizer: Any, task: Task, data: PreparedData, device: torch.device
) -> Callable[[Callable[[], None]], Evaluation]:
    """Scores the current model; calls its argument before each batch."""

    def evaluate_now(before_batch: Callable[[], None]) -> Evaluation:
        return evaluate(
            lwo.module,
            tokenizer,
            data.held_out,
            batch_size=config.eval.batch_size,
            task=task,
            device=device,
            max_new_tokens=config.eval.max_new_tokens,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            synced=lwo.strategy.forward_is_collective,
            before_batch=before_batch,
        )

    return evaluate_now


def _read_data(config: Config, tokenizer: Any, task: Task) -> PreparedData:
    # If nodes share no folder, each prepares its own examples.
    first_of_node = os.environ.get("LOCAL_RANK", "0") == "0"
    shares_no_folder = is_url(config.storage) and not config.data.cache
    is_builder = distributed.rank() == 0 or (first_of_node and shares_no_folder)
    return prepare_dataset(config, tokenizer, task, is_builder=is_builder)


def _make_hook(config: Config, checkpoint: Checkpoint | None, device: torch.device) -> LWO:
    """The model, built by the strategy, with the hook attached at the current position."""
    say(f"loading model {printable(config.model.name)}")
    method: Method = METHODS.get(config.method)
    builder: StrategyBuilder = STRATEGIES.get(config.strategy)
    from_checkpoint = checkpoint is not None and not method.changes_model
    model_config = config.model
    if checkpoint is not None and from_checkpoint:
        changed = {"name": str(checkpoint.folder), "revision": None}
        model_config = model_config.model_copy(update=changed)
    source = model_source(config.model_copy(update={"model": model_config}), method)
    model = builder.build(source, method, config, device)
    lwo = attach(model, config.lwo, method, strategy=builder)
    if checkpoint is not None:
        restore(lwo, checkpoint, has_weights=from_checkpoint)
    return lwo


def model_source(config: Config, method: Method) -> PretrainedSource:
    """Where a strategy gets the model of a run from, with the method's changes."""
    return PretrainedSource(
        config.model,
        gradient_checkpointing=config.train.gradient_checkpointing,
        prepare=partial(_prepare_model, method, config),
    )


def _prepare_model(method: Method, config: Config, model: torch.nn.Module) -> None:
    # What a method adds is then equal on all ranks.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        method.prepare(model, config)


def _with_model(config: Config, folder: Path) -> Config:
    model = config.model.model_copy(update={"name": str(folder)})
    return config.model_copy(update={"model": model})


def _finish(trainer: Trainer, run_folder: RunFolder, record: dict[str, Any]) -> dict[str, Any]:
    """Export the best checkpoint and write summary.json."""
    config = trainer.config
    steps = committed_steps(run_folder)
    # Saving the best one may have failed on a full disk.
    step = trainer.results.best_step if trainer.results.best_step in steps else steps[-1]
    checkpoint = read_checkpoint(run_folder, step)
    method: Method = METHODS.get(config.method)
    results = trainer.results.summary()
    how: dict[str, Any] = {
        "method": method,
        "comparison": results["eval"] if results["eval"]["best_step"] == step else {},
        "trust_remote_code": config.model.trust_remote_code,
    }
    base = config.model if method.trains_adapters else None
    exports = [export_model(checkpoint, run_folder.path("model"), base=base, **how)]
    if method.trains_adapters:
        exports.append(export_adapter(checkpoint, run_folder.path("adapter"), **how))
    summary = {
        "run_name": config.run_name,
        "method": config.method,
        "strategy": config.strategy,
        "world_size": distributed.world_size(),
        "steps": trainer.lwo.step_count,
        "ended_early": trainer.ended_early,
        "base_model": config.model.name,
        "fingerprint": trainer.data.fingerprint,
        "device": device_name(trainer.device),
        **results,
        "skipped_steps": int(trainer.lwo.skipped_steps),
        "mlflow_run_id": record.get("mlflow_run_id"),
        "checkpoint": f"{run_folder}/{step_folder(step)}",
        "export": f"{run_folder}/model",
        # What has to be kept for each tuned model.
        "serve_bytes": sum(path.stat().st_size for path in exports[-1].glob("*.safetensors")),
    }
    run_folder.push(
        path.relative_to(run_folder.local).as_posix()
        for export in exports
        for path in sorted(export.iterdir())
    )
    write_whole(run_folder.local / "summary.json", json.dumps(summary, indent=1).encode())
    return summary


def _share_run(config: Config, run_folder: RunFolder) -> None:
    if access_of(run_folder.local) == "group":
        share(run_folder.local)
    if config.access == "group":
        share(run_folder.local.parent / DATABASE)  # SQLite lets only the owner write to it.


def _tracking(config: Config, record: dict[str, Any] | None) -> list[Callback]:
    if not config.tracking.enabled:
        return []
    run_id = (record or {}).get("mlflow_run_id")
    return [MLflowCallback(config.tracking, storage_folder(config.storage), run_id=run_id)]


def _warn_never_trained(config: Config, lwo: LWO) -> None:
    never = [lwo.visits[i].active.name for i in lwo.schedule.never_active(config.train.steps)]
    if never and distributed.rank() == 0:
        print(
            f"warning: {config.train.steps} steps never train {', '.join(never)}; one cycle takes "
            f"{lwo.schedule.steps_per_cycle} steps "
            f"(lwo.steps_per_layer = {config.lwo.steps_per_layer})",
            flush=True,
        )


def _nothing() -> None:
    pass


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


def _read_record(run_folder: RunFolder) -> dict[str, Any] | None:
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
