"""A DeepSpeed engine on one rank, with the model of the oracle; called inside `run_ranks`."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

import lwo_dist
from lwo_dist.hook import LWO
from lwo_dist.strategies.deepspeed.builder import load_deepspeed
from tests import oracle


def settings(
    stage: int, *, precision: str = "fp32", accumulation: int = 1, **more: Any
) -> dict[str, Any]:
    zero = {"stage": stage, **more.pop("zero", {})}
    return {
        "train_micro_batch_size_per_gpu": 8 // dist.get_world_size() // accumulation,
        "gradient_accumulation_steps": accumulation,
        "zero_optimization": zero,
        "bf16": {"enabled": precision == "bf16"},
        "steps_per_print": 2**31,
        **more,
    }


def make_engine(
    stage: int,
    recipe: oracle.Recipe,
    *,
    tied: bool,
    late: bool = False,
    from_start: bool = False,
    checkpointing: bool = False,
    lr_scheduler: Any = None,
    **more: Any,
) -> Any:
    """`prepare` and `deepspeed.initialize`, as a user writes it; `late` forgets the first."""
    load_deepspeed()
    import deepspeed

    config = settings(stage, accumulation=recipe.accumulation, **more)
    if from_start:
        dist_settings = {**config, "zero_force_ds_cpu_optimizer": False}
        load_deepspeed().check_environment()
        deepspeed.init_distributed(dist_init_required=False)
        with deepspeed.zero.Init(config_dict_or_path=dist_settings):
            model = oracle.tiny_model(tied=tied)
    else:
        model = oracle.tiny_model(tied=tied)
    if checkpointing:
        model.train()
        enable = (
            getattr(model, "activation_checkpointing_enable", None)
            or model.gradient_checkpointing_enable
        )
        enable({"use_reentrant": False})
    if late:
        load_deepspeed().check_environment()
        parameters = list(model.parameters())
    else:
        parameters = lwo_dist.prepare(model, lwo_config(recipe))
    optimizer = torch.optim.AdamW(parameters, lr=recipe.lr, eps=recipe.eps, weight_decay=0.01)
    config["zero_force_ds_cpu_optimizer"] = False
    deepspeed.init_distributed(dist_init_required=False)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        model_parameters=parameters,
        config=config,
        dist_init_required=False,
        lr_scheduler=lr_scheduler,
    )
    return engine


def lwo_config(recipe: oracle.Recipe, **config: Any) -> lwo_dist.LWOConfig:
    return lwo_dist.LWOConfig(
        lr=recipe.lr,
        eps=recipe.eps,
        weight_decay=0.01,
        max_grad_norm=recipe.max_grad_norm,
        steps_per_layer=recipe.steps_per_layer,
        gradient_accumulation_steps=recipe.accumulation,
        **config,
    )


def attach_engine(
    stage: int,
    recipe: oracle.Recipe,
    *,
    tied: bool,
    method: str = "lwo",
    config: dict[str, Any] | None = None,
    **more: Any,
) -> LWO:
    """`config`: further fields of LWOConfig; `more`: for `make_engine`."""
    return lwo_dist.attach(
        make_engine(stage, recipe, tied=tied, **more), lwo_config(recipe, **(config or {})), method
    )
