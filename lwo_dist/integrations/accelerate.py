"""Layer-wise optimisation in a loop of Hugging Face's accelerate.

accelerator = Accelerator(gradient_accumulation_steps=2)
model, optimizer, batches = prepare(accelerator, model, LWOConfig(), batches)
for batch in batches:
    with accelerator.accumulate(model):
        accelerator.backward(model(**batch).loss)
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import DistributedType, DummyOptim, DummyScheduler
from torch import nn

from lwo_dist.config import LWOConfig
from lwo_dist.errors import UserError
from lwo_dist.hook import attach
from lwo_dist.hook import prepare as freeze_all_but_first
from lwo_dist.methods import Method
from lwo_dist.registry import METHODS

from .optimizer import LWOOptimizer, read_state, write_state
from .settings import (
    agree,
    complete_deepspeed,
    reduce_in_fp32,
    refuse_accelerator,
    refuse_config,
    refuse_model,
)

__all__ = ["prepare"]

_SCHEDULE = ("lr_scheduler_type", "warmup_steps", "lr_schedule_over")


def prepare(
    accelerator: Any,
    model: nn.Module,
    config: LWOConfig,
    *others: Any,
    method: str | Method = "lwo",
) -> tuple[Any, ...]:
    """What `accelerator.prepare` does, and training layer by layer, by the usual loop.

    Afterwards `accelerator.backward`, `clip_grad_norm_` and the returned optimizer's `step` are the
    hook's: no loop changes. `save_state` and `load_state` include the hook's state; they hold whole
    weights, so that a checkpoint may be loaded under another strategy or number of ranks.

    Precedence: the accelerator's `gradient_accumulation_steps`; the `max_norm` of
    `clip_grad_norm_`, if the loop calls it; a scheduler made for the returned optimizer, if there
    is one. The rest is from `config`, which may not contradict them.

    Args:
        accelerator: without FSDP1, fp16, compilation of the whole model, or parallelism of models.
        model: not prepared yet; plain, or sharded by `fully_shard`.
        config: the optimizer, the layer schedule and, without a scheduler, the learning rate.
        others: data loaders, and whatever else `accelerator.prepare` takes; no optimizer. With a
            scheduler in the DeepSpeed config, a `DummyScheduler`.
        method: as for `lwo_dist.attach`.

    Returns:
        The model for the forward pass, an `LWOOptimizer`, and `others`, prepared.

    Raises:
        UserError: anything that cannot be honoured, by name, before anything trains.
    """
    if not isinstance(config, LWOConfig):
        raise UserError(
            f"the third argument is {type(config).__name__}; it must be an LWOConfig, where"
            " accelerator.prepare has the optimizer"
        )
    refuse_config(config)
    refuse_accelerator(accelerator)
    refuse_model(accelerator, model)
    for other in others:
        if isinstance(other, torch.optim.Optimizer | torch.optim.lr_scheduler.LRScheduler):
            raise UserError(
                f"{type(other).__name__} cannot be prepared here: layers are trained with AdamW, as"
                " LWOConfig says; leave the optimizer out, and make a scheduler for the optimizer"
                " that prepare returns"
            )
    config = METHODS.instance(method).with_rate(model, config)
    optimizer = LWOOptimizer(model, config.peak_lr)
    prepared: list[Any]
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        complete_deepspeed(accelerator)
        made = _optimizer_of_engine(accelerator, model, config, method)
        for other in others:
            if isinstance(other, DummyScheduler):
                other.optimizer = made
        target, wrapper, *prepared = accelerator.prepare(model, made, *others)
        wrapper.optimizer = optimizer  # the hook empties the engine's
        _prepare_schedulers_later(accelerator)
    elif accelerator.distributed_type == DistributedType.FSDP:
        reduce_in_fp32(accelerator)
        target, wrapper, *prepared = accelerator.prepare(model, optimizer, *others)
        accelerator._optimizers.remove(wrapper)
    else:
        # For evaluation: without DDP, as the hook reduces gradients itself.
        target = accelerator.prepare_model(model, evaluation_mode=True)
        prepared = [accelerator.prepare(other) for other in others]
    # Saved with the hook's state: accelerate would save the engine's optimizer, of one layer.
    accelerator._models.remove(target)
    accumulation = accelerator.gradient_accumulation_steps
    agree(
        config,
        {"gradient_accumulation_steps": accumulation},
        {"gradient_accumulation_steps": "the accelerator's gradient_accumulation_steps"},
    )
    config = config.model_copy(update={"gradient_accumulation_steps": accumulation})
    optimizer.drive(accelerator, attach(target, config, method), target)
    optimizer._schedule_of_config = [key for key in _SCHEDULE if key in config.model_fields_set]
    accelerator.register_for_checkpointing(_Checkpoint(optimizer))
    return (target, optimizer, *prepared)


class _Checkpoint:
    """What `save_state` writes and `load_state` reads, as accelerate registers it."""

    def __init__(self, optimizer: LWOOptimizer):
        self._optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        accelerator = self._optimizer._accelerator
        each_node = accelerator.project_configuration.save_on_each_node
        writes = accelerator.is_local_main_process if each_node else accelerator.is_main_process
        return read_state(self._optimizer, keep=writes)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        write_state(self._optimizer, state_dict)


def _prepare_schedulers_later(accelerator: Any) -> None:
    """Let `accelerator.prepare` wrap a scheduler that comes after the engine, too.

    accelerate returns such a one as it is, so that it would step with each micro-batch.
    """
    own = accelerator.prepare

    def prepare(*objects: Any, **settings: Any) -> Any:
        prepared = [
            accelerator.prepare_scheduler(each)
            if isinstance(each, torch.optim.lr_scheduler.LRScheduler)
            else own(each, **settings)
            for each in objects
        ]
        return tuple(prepared) if len(prepared) != 1 else prepared[0]

    accelerator.prepare = prepare


def _optimizer_of_engine(
    accelerator: Any, model: nn.Module, config: LWOConfig, method: str | Method
) -> Any:
    """The optimizer that the engine is made with: AdamW of what is trained first."""
    first = freeze_all_but_first(model, config, method)
    if "optimizer" in accelerator.deepspeed_plugin.deepspeed_config:
        return DummyOptim(first, lr=config.peak_lr, weight_decay=config.weight_decay)
    return torch.optim.AdamW(
        first,
        lr=config.peak_lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
    )
