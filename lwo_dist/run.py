"""The composition root: a config becomes model, data, hook, trainer and callbacks.

The driver calls `prepare` once; then every worker calls `run`. Under torchrun each rank calls `prepare_and_run`.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from . import distributed
from .base_model import default_cache_folder, ensure_base_model
from .callback import Callback, RunInfo
from .config import Config, UserError
from .data import PreparedData, micro_batch_size, prepare_dataset, read_source_tree
from .data.cache import cache_folder
from .hook import LWO, attach, make_engine
from .models import load_model, load_tokenizer
from .strategies import deepspeed_config, load_deepspeed
from .tasks import TASKS
from .tracking.mlflow import MLflowCallback, create_run, tracking_uri
from .training.checkpoint import Checkpoint, LayerStore
from .training.evaluate import evaluate
from .training.export import export_model
from .training.progress import Progress
from .training.results import Results
from .training.system import SystemMetrics
from .training.trainer import Trainer

__all__ = ["prepare", "prepare_and_run", "run"]


def prepare(config: Config) -> Config:
    """Check what can be checked before any worker starts, and make run.json. The driver calls it once.

    Returns:
        The config with a run name, absolute paths and, for tiny-code, the folder of the base model.

    Raises:
        UserError: source, storage or batch size are wrong; nothing was written then.
    """
    source = config.data.source
    if source is None:
        raise UserError("data.source is not set; give a folder of source files or a git repository")
    micro_batch_size(config.train.global_batch_size, config.cluster.num_workers, config.lwo.gradient_accumulation_steps)
    if config.strategy == "deepspeed":  # the workers need not see the file
        config = config.model_copy(update={"deepspeed": deepspeed_config.read_config(config.deepspeed)})
        deepspeed_config.resolve(config, config.cluster.num_workers)
    storage = Path(config.storage).expanduser().absolute()
    tracking_uri(config.tracking, storage)  # refuses a password
    run_name = config.run_name or f"{config.method}-{datetime.datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}"
    if "://" not in source and not source.startswith("git@"):
        source = str(Path(source).expanduser().absolute())
    data = config.data.model_copy(update={"source": source})
    config = config.model_copy(update={"storage": str(storage), "run_name": run_name, "data": data})
    folder = storage / run_name
    if config.checkpoint.resume == "never" and any(folder.glob("checkpoints/step_*/state.json")):
        raise UserError(
            f"run_name = {run_name}: {folder} holds a run and checkpoint.resume is never; choose another run_name, or "
            "resume: auto"
        )
    with _nothing_left_behind(storage):
        _make_writable(storage)
        read_source_tree(config.data, cache_folder(config))
        if config.model.name == "tiny-code":
            base = ensure_base_model(default_cache_folder(storage))
            config = config.model_copy(update={"model": config.model.model_copy(update={"name": str(base)})})
    folder.mkdir(exist_ok=True)
    record = _read_json(folder / "run.json") or {"run_name": run_name, "attempts": 0}
    record["attempts"] += 1
    record["mlflow_run_id"] = create_run(config, storage, run_name)
    (folder / "run.json").write_text(json.dumps(record, indent=1))
    return config


def prepare_and_run(config: Config) -> dict[str, Any] | None:
    """For ranks without a driver (torchrun, Slurm): rank 0 prepares, then all of them run."""
    distributed.init_process_group(config.cluster.timeout_s)
    cluster = config.cluster.model_copy(update={"num_workers": distributed.world_size()})
    config = distributed.on_rank_0(prepare, config.model_copy(update={"cluster": cluster}))
    return run(config)


def run(config: Config, callbacks: Sequence[Callback] = ()) -> dict[str, Any] | None:
    """Train on this worker; every worker calls it with the same prepared config.

    Returns:
        On rank 0 what summary.json holds, None elsewhere.

    Raises:
        UserError: on every rank alike.
    """
    device = distributed.init_process_group(config.cluster.timeout_s)
    main = distributed.rank() == 0
    folder = Path(config.storage) / str(config.run_name)
    record = distributed.broadcast_object(_read_json(folder / "run.json") if main else None)
    everyone = [Progress(), *_tracking(config, record), *callbacks] if main else []
    try:
        trainer = _build(config, folder, device, everyone)
        trainer.train()
        summary = distributed.on_rank_0(_finish, config, trainer, folder, record)
    except BaseException as error:
        for callback in everyone:
            callback.on_run_failed(error)
        raise
    for callback in everyone:
        callback.on_run_end(summary)
    return summary if main else None


def _build(config: Config, folder: Path, device: torch.device, callbacks: Sequence[Callback]) -> Trainer:
    main = distributed.rank() == 0
    store = LayerStore(folder)
    checkpoint = distributed.on_rank_0(store.newest) if config.checkpoint.resume == "auto" else None
    tokenizer = load_tokenizer(config.model)
    task = TASKS[config.task]
    data = prepare_dataset(config, tokenizer, task, is_builder=main, broadcast=distributed.broadcast_object)
    results = Results(folder, config.eval.metric, writes=main)
    source = config.model
    if checkpoint is not None:
        _refuse_other_run(config, data, checkpoint.state)
        source = source.model_copy(update={"name": str(checkpoint.folder), "revision": None})
    partition, settings = None, {}
    if config.strategy == "deepspeed":
        settings = deepspeed_config.resolve(config, distributed.world_size())
        if settings["zero_optimization"]["stage"] == 3:
            partition = load_deepspeed().partitioner(settings)
    model = load_model(source, config.train, strategy=config.strategy, device=device, partition=partition)
    wrapped = make_engine(model, config.lwo, settings, config.method) if settings else model
    lwo = attach(wrapped, config.lwo, config.method)
    if checkpoint is not None:
        if settings.get("bf16", {}).get("enabled"):
            _write_masters(lwo, checkpoint)
        lwo.load_state_dict(checkpoint.hook_state())
        store.remember(checkpoint, lwo)
        results.load_state_dict(checkpoint.state["results"])
    system = SystemMetrics(device, folder.parent, enabled=config.tracking.enabled and config.tracking.system_metrics)
    trainer = Trainer(
        config, lwo, data, results, store, device=device, callbacks=callbacks, system=system,
        evaluate=partial(
            evaluate, model, tokenizer, data.held_out, batch_size=config.eval.batch_size, task=task, device=device,
            max_new_tokens=config.eval.max_new_tokens, rank=distributed.rank(), world_size=distributed.world_size(),
            synced=config.strategy != "replicate",
        ),
        model_files=partial(_save_model_files, model, tokenizer),
    )  # fmt: skip
    sizes = _sizes(lwo)
    info = RunInfo(
        config, folder, distributed.world_size(), tuple(layer.name for layer in lwo.layers),
        _facts(sizes, lwo, data, device), lwo.step_count,
        tuple(sum(sizes[name] for name in layer.parameter_names) for layer in lwo.layers), tuple(system.hosts),
    )  # fmt: skip
    for callback in callbacks:
        callback.on_run_start(info)
    _warn_never_trained(config, lwo)
    return trainer


def _write_masters(lwo: LWO, checkpoint: Checkpoint) -> None:
    """The model was made from the checkpoint in bf16; the fp32 masters are in the same files."""
    index = json.loads((checkpoint.folder / "model.safetensors.index.json").read_text())["weight_map"]
    for layer in lwo.layers:
        for reference in sorted({index[name] for name in layer.parameter_names}):
            lwo.write_layer(load_file(checkpoint.folder / reference))


def _finish(config: Config, trainer: Trainer, folder: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Export the best checkpoint and write summary.json."""
    checkpoint = trainer.store.checkpoints / f"step_{trainer.results.best_step:06d}"
    export = export_model(checkpoint, folder / "model", trust_remote_code=config.model.trust_remote_code)
    summary = {
        "run_name": config.run_name,
        "method": config.method,
        "strategy": config.strategy,
        "world_size": distributed.world_size(),
        "steps": config.train.steps,
        **trainer.results.summary(),
        "skipped_steps": int(trainer.lwo.skipped_steps),
        "mlflow_run_id": record.get("mlflow_run_id"),
        "checkpoint": str(checkpoint),
        "export": str(export),
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=1))
    return summary


def _sizes(lwo: LWO) -> dict[str, int]:
    """Parameter name -> elements of the whole tensor."""
    return {name: getattr(p, "ds_numel", p.numel()) for name, p in lwo.strategy.model.named_parameters()}


def _facts(sizes: dict[str, int], lwo: LWO, data: PreparedData, device: torch.device) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "parameters": sum(sizes.values()),
        "trained_parameters": sum(sizes[name] for layer in lwo.layers for name in layer.parameter_names),
        "host": socket.gethostname(),
        **{name: data.counts[name] for name in ("windows", "held_out_lines")},
        "data": dict(data.counts),
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    packages = ("lwo-dist", "torch", "transformers", "deepspeed", "ray", "mlflow")
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _tracking(config: Config, record: dict[str, Any] | None) -> list[Callback]:
    if not config.tracking.enabled:
        return []
    run_id = (record or {}).get("mlflow_run_id")
    return [MLflowCallback(config.tracking, Path(config.storage), run_id=run_id)]


def _save_model_files(model: Any, tokenizer: Any, folder: Path) -> None:
    # The weights in the store are fp32 masters, whatever dtype the base model was published in.
    settings = type(model.config).from_dict({**model.config.to_dict(), "dtype": "float32", "use_cache": True})
    settings.architectures = [type(model).__name__.removeprefix("FSDP")]
    settings.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _warn_never_trained(config: Config, lwo: LWO) -> None:
    never = [lwo.layers[i].name for i in lwo.schedule.never_active(config.train.steps)]
    if never and distributed.rank() == 0:
        print(
            f"warning: {config.train.steps} steps never train {', '.join(never)}; one cycle takes "
            f"{lwo.schedule.steps_per_cycle} steps (lwo.steps_per_layer = {config.lwo.steps_per_layer})",
            flush=True,
        )


def _refuse_other_run(config: Config, data: PreparedData, state: Any) -> None:
    now = {
        "seed": config.seed,
        "global_batch_size": config.train.global_batch_size,
        "fingerprint": data.fingerprint,
    }
    for key, value in now.items():
        if state["data"][key] != value:
            what = "the examples (source files, tokenizer or sequence length)" if key == "fingerprint" else key
            raise UserError(
                f"run_name = {config.run_name}: its checkpoint was made with other data: {what} changed from "
                f"{state['data'][key]} to {value}; choose another run_name, or set it back"
            )


def _make_writable(storage: Path) -> None:
    probe = storage / f".probe-{os.getpid()}"
    try:
        storage.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"storage = {storage}: {error.strerror}; give a folder that can be written") from None


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


def _read_json(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.is_file() else None
