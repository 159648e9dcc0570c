"""Resume a stopped run, on any number of ranks and with any strategy."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lwo_dist import distributed
from lwo_dist.config import Config
from lwo_dist.data import PreparedData
from lwo_dist.errors import DamagedError, UserError
from lwo_dist.hook import LWO
from lwo_dist.methods import Method
from lwo_dist.registry import METHODS
from lwo_dist.storage import RunFolder

from .format import Checkpoint, newest_checkpoint, use_copy
from .schema import STATE, check_record

__all__ = ["data_record", "find_checkpoint", "refuse_other_base", "refuse_other_run", "restore"]


def find_checkpoint(config: Config, run_folder: RunFolder) -> Checkpoint | None:
    """The newest intact checkpoint, with its files available on every machine.

    Raises:
        UserError: no checkpoint is intact, or the run's folder contains symlinks.
    """
    distributed.on_rank_0(run_folder.refuse_links)
    if config.checkpoint.resume != "auto":
        return None
    checkpoint = distributed.on_rank_0(newest_checkpoint, run_folder)
    if checkpoint is not None:
        with distributed.errors_on_all_ranks():
            if distributed.rank() != 0 and os.environ.get("LOCAL_RANK", "0") == "0":
                use_copy(run_folder, checkpoint)
    return checkpoint


def restore(lwo: LWO, checkpoint: Checkpoint, *, has_weights: bool) -> None:
    """Restore position, moments and masters.

    Args:
        has_weights: the model was built from the checkpoint.
    """
    if lwo.strategy.stores_16_bit or not has_weights:
        # A model in 16 bits still lacks the fp32 masters, which are in the same files.
        for tensors in checkpoint.weights():
            lwo.write_layer(tensors)
    lwo.load_state_dict(checkpoint.hook_state())
    layers = {layer.name: layer for layer in lwo.layers}
    for name, moments in checkpoint.parked_moments():
        if name not in layers:
            raise DamagedError(f"{STATE} has moments of {name[:100]!r}, which is not a layer")
        lwo.write_moments(layers[name], moments)


def refuse_other_base(config: Config, digest: str | None, state: Any) -> None:
    """Raise UserError if a checkpoint of adapters belongs to other weights than `digest`'s."""
    recorded = state["run"].get("base_digest")
    if recorded is not None and recorded != digest:
        raise UserError(
            f"run_name = {config.run_name}: model.name {config.model.name} has other weights than"
            " when its checkpoint was made; choose another run_name, or bring them back"
        )


def data_record(config: Config, data: PreparedData) -> dict[str, Any]:
    """What must not change when a run resumes: `seed`, `global_batch_size`, `fingerprint`, and
    `batches`, which says whether a step's batch depends on the schedule.
    """
    batches: str = config.lwo.batches
    if batches != "fresh":
        batches += f", {config.lwo.steps_per_layer} a layer"
    return {
        "seed": config.seed,
        "global_batch_size": config.train.global_batch_size,
        "fingerprint": data.fingerprint,
        "batches": batches,
    }


def refuse_other_run(config: Config, data: PreparedData, state: Any) -> None:
    """Raise UserError if the checkpoint was made from another model, by another method or from
    other data, or its entries are malformed.
    """
    check_record(state, "run", "data", "results")
    base = config.model.name
    then = state["run"]["base_model"]
    # The folder may have moved, but its name stays the same.
    if Path(base).name != Path(then).name:
        raise UserError(
            f"run_name = {config.run_name}: its checkpoint is of the model {then}, and model.name "
            f"is {base}; choose another run_name, or set it back"
        )
    if state["run"]["method"] != config.method:
        raise UserError(
            f"run_name = {config.run_name}: its checkpoint was made with method:"
            f" {state['run']['method']}, and method is {config.method}; choose another run_name,"
            " or set it back"
        )
    method: Method = METHODS.get(config.method)
    now, unset = config.model_dump(mode="json"), Config().model_dump(mode="json")
    for key in method.own_settings:
        if key in method.free_on_resume:
            continue
        then, value = _at(state["run"], key), _at(now, key)
        if then is None:  # a setting that is younger than the checkpoint
            then = _at(unset, key)
        if value != then:
            raise UserError(
                f"run_name = {config.run_name}: its checkpoint was made with {key} = {then}, and"
                f" now it is {value}; choose another run_name, or set it back"
            )
    names = {
        "fingerprint": (
            "the examples (source files, tokenizer or sequence length; an older lwo_dist cut"
            " files differently)"
        ),
        "batches": "lwo.batches (or lwo.steps_per_layer)",
    }
    for key, value in data_record(config, data).items():
        then = state["data"].get(key, "fresh")  # `batches` is younger than some checkpoints
        if then != value:
            raise UserError(
                f"run_name = {config.run_name}: its checkpoint was made with other data: "
                f"{names.get(key, key)} changed from {then} to {value}; choose "
                "another run_name, or set it back"
            )


def _at(values: Any, key: str) -> Any:
    for name in key.split("."):
        values = values.get(name) if isinstance(values, dict) else None
    return values
