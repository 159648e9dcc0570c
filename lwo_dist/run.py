"""The composition root: builds model, data, hook, trainer and callbacks from a config.

The driver calls `prepare` once; then every worker calls `run`. Under torchrun each rank calls
`prepare_and_run`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from . import distributed, lease
from .access import umask_of
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
from .checkpoint.store import LayerStore
from .config import Config
from .console import say
from .data import PreparedData, steps_of_epochs
from .driver import (
    ending_tracking,
    fitting_task,
    model_source,
    prepare,
    read_record,
    share_run,
    stopped_early,
)
from .errors import UserError, printable
from .files import write_whole
from .hook import LWO, attach
from .methods import Method
from .models import (
    base_digest,
    code_files,
    licence_of,
    load_tokenizer,
    refuse_long_sequences,
    refuse_tokens,
)
from .models.saving import save_model_files
from .registry import METHODS, STRATEGIES
from .run_info import checkpoint_record
from .stop import CTRL_C, Stopped, StopRequest, StopVote
from .storage import RunFolder, is_url, storage_folder
from .strategies import StrategyBuilder
from .tasks.base import Task
from .tasks.prepare import prepare_dataset
from .tracking.mlflow import MLflowCallback
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

__all__ = ["prepare_and_run", "run"]


def prepare_and_run(config: Config) -> dict[str, Any] | None:
    """For ranks without a driver (torchrun, Slurm): rank 0 prepares, then all ranks run."""
    stop = StopRequest(config.train.max_seconds)
    try:
        with ExitStack() as stack:
            stack.enter_context(umask_of(config.access))
            stack.enter_context(stop.interrupting())
            stack.enter_context(_group(config.cluster.timeout_s))
            cluster = config.cluster.model_copy(update={"num_workers": distributed.world_size()})
            config = distributed.on_rank_0(prepare, config.model_copy(update={"cluster": cluster}))
            if distributed.rank() == 0:
                stack.enter_context(ending_tracking(config))
                run_folder = RunFolder(config.storage, str(config.run_name))
                stack.enter_context(lease.renewed(run_folder))
            return run(config, stop=stop)
    except KeyboardInterrupt:
        raise stopped_early(config, stop.reason or CTRL_C) from None


@contextmanager
def _group(timeout_s: int) -> Iterator[None]:
    """Join the process group, and leave it when all ranks end the same way.

    Otherwise its threads still run when the interpreter ends, which then may abort: torchrun would
    report SIGABRT instead of the exit code. After a failure of one rank the others may be in a
    collective, which leaving would wait for.
    """
    is_ours = not dist.is_initialized()
    distributed.init_process_group(timeout_s)
    leaves = is_ours
    try:
        yield
    except (UserError, Stopped):
        raise
    except BaseException:
        leaves = False
        raise
    finally:
        if leaves:
            distributed.leave()


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
    record = distributed.on_rank_0(read_record, run_folder)
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
        share_run(config, run_folder)
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
    with distributed.errors_on_all_ranks():
        task, decoder_start = fitting_task(config)
    data = _read_data(config, tokenizer, task, decoder_start)
    config = _with_length(config, data)
    if checkpoint is not None:
        refuse_other_run(config, data, checkpoint.state)
    method: Method = METHODS.get(config.method)
    digest = None
    if method.trains_adapters:
        digest = distributed.on_rank_0(base_digest, config.model)
        if checkpoint is not None:
            refuse_other_base(config, digest, checkpoint.state)
    config = _with_rate_of(checkpoint, config)
    lwo = _make_hook(config, checkpoint, device)
    config = _with_rate(config, lwo)
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
    _tell_batches(config, lwo)
    return trainer


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


def _with_rate_of(checkpoint: Checkpoint | None, config: Config) -> Config:
    """`lwo.lr` as the run had it until now, where it is unset."""
    if checkpoint is None or config.lwo.lr is not None:
        return config
    rate = checkpoint.state["run"]["lwo"]["lr"]
    say(f"lwo.lr is unset: {rate:g}, as the checkpoint says")
    return config.model_copy(update={"lwo": config.lwo.model_copy(update={"lr": rate})})


def _with_rate(config: Config, lwo: LWO) -> Config:
    """`lwo.lr` as the hook has chosen it for this model, where it is unset."""
    if config.lwo.lr is None:
        say(f"lwo.lr is unset: {lwo.config.peak_lr:g}, for method {config.method} and this model")
    return config.model_copy(update={"lwo": lwo.config})


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
            decoder_start=data.decoder_start,
            before_batch=before_batch,
        )

    return evaluate_now


def _read_data(
    config: Config, tokenizer: Any, task: Task, decoder_start: int | None
) -> PreparedData:
    # If nodes share no folder, each prepares its own examples.
    first_of_node = os.environ.get("LOCAL_RANK", "0") == "0"
    shares_no_folder = is_url(config.storage) and not config.data.cache
    is_builder = distributed.rank() == 0 or (first_of_node and shares_no_folder)
    return prepare_dataset(
        config, tokenizer, task, is_builder=is_builder, decoder_start=decoder_start
    )


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
        "learning_rate": trainer.lwo.config.peak_lr,
        "ended_early": trainer.ended_early,
        "base_model": config.model.name,
        "fingerprint": trainer.data.fingerprint,
        "device": device_name(trainer.device),
        "data": dict(trainer.data.counts),
        "never_trained": trainer.lwo.never_trained(config.train.steps),
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


def _tracking(config: Config, record: dict[str, Any] | None) -> list[Callback]:
    if not config.tracking.enabled:
        return []
    run_id = (record or {}).get("mlflow_run_id")
    return [MLflowCallback(config.tracking, storage_folder(config.storage), run_id=run_id)]


def _warn_never_trained(config: Config, lwo: LWO) -> None:
    never = lwo.never_trained(config.train.steps)
    if never and distributed.rank() == 0:
        print(
            f"warning: {config.train.steps} steps never train {', '.join(never)}; one cycle takes "
            f"{lwo.schedule.steps_per_cycle} steps "
            f"(lwo.steps_per_layer = {config.lwo.steps_per_layer})",
            flush=True,
        )


def _tell_batches(config: Config, lwo: LWO) -> None:
    """How much of the data a run sees whose layers share batches."""
    if config.lwo.batches == "cycle" and distributed.rank() == 0:
        steps, size = config.train.steps, config.train.global_batch_size
        count = lwo.schedule.num_batches(steps)
        print(
            f"lwo.batches = cycle: the {len(lwo.visits)} layers of a cycle share"
            f" {config.lwo.steps_per_layer} batches; {steps} steps see {count} different ones,"
            f" {count * size:,} sequences",
            flush=True,
        )


def _nothing() -> None:
    pass
