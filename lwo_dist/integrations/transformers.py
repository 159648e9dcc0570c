"""Layer-wise optimisation in transformers' Trainer and every subclass of it, by one line:

    trainer = SFTTrainer(...)                           # as always, without an optimizer
    use_lwo(trainer, LWOConfig(steps_per_layer=20))
    trainer.train()

or by a class, `class LWOTrainer(LWOTrainerMixin, SFTTrainer): ...`, with `lwo_config=` among its
arguments. TrainingArguments win over LWOConfig where both speak.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import Trainer

from lwo_dist.config import LWOConfig
from lwo_dist.errors import UserError
from lwo_dist.hook import LWO, attach
from lwo_dist.hook import prepare as freeze_all_but_first
from lwo_dist.methods import Method

from .optimizer import LWOOptimizer, read_state, write_state, write_weights
from .settings import (
    agree,
    complete_deepspeed,
    reduce_in_fp32,
    refuse_accelerator,
    refuse_config,
    refuse_model,
)

__all__ = ["STATE_FILE", "LWOTrainerMixin", "use_lwo"]

STATE_FILE = "lwo.pt"
"""In each checkpoint of a trainer: weights, moments and position, from which it resumes."""
_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")
# Field of LWOConfig -> what TrainingArguments call it.
_NAMES = {
    "lr": "learning_rate",
    "betas": "(adam_beta1, adam_beta2)",
    "eps": "adam_epsilon",
    "weight_decay": "weight_decay",
    "max_grad_norm": "max_grad_norm",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "lr_scheduler_type": "lr_scheduler_type",
    "lr_schedule_over": "the schedule of TrainingArguments",
    "warmup_steps": "warmup_steps",
    "max_steps": "max_steps",
}


def use_lwo(trainer: Any, config: LWOConfig, method: str | Method = "lwo") -> Any:
    """Train the model of a Trainer layer by layer. Call it after the constructor, before `train`.

    The trainer's own arguments count: learning rate with schedule and warm-up, clipping,
    accumulation, AdamW's settings, precision, saving and resuming. During training `trainer.lwo` is
    the hook. Its logs have the norm of the active layer's gradient, `lwo/active_layer` (its index
    in `trainer.lwo.layers`), `lwo/skipped_steps` and this rank's `memory/...` in bytes.

    Args:
        trainer: transformers' Trainer or a subclass: in one process, in several (without DDP, which
            it does not make), with FSDP version 2, or DeepSpeed stage 1, 2 or 3.
        config: the layer schedule. A field that TrainingArguments have too may not contradict them.
        method: as for `lwo_dist.attach`; a model with adapters of peft needs "lora".

    Returns:
        The same trainer.

    Raises:
        UserError: anything that cannot be honoured, by name. What is known only when the model is
            on its devices is refused at the start of `train`.
    """
    if not isinstance(trainer, Trainer):
        raise UserError(f"a {type(trainer).__name__} is not a transformers.Trainer")
    kind = type(trainer)
    if not isinstance(trainer, LWOTrainerMixin):
        trainer.__class__ = type(f"LWO{kind.__name__}", (LWOTrainerMixin, kind), {})
    if trainer.state.global_step and trainer.lwo is None:
        raise UserError("the trainer has trained already; call use_lwo before train")
    trainer.lwo_config = config
    trainer.lwo_method = method
    _refuse(trainer)
    return trainer


class LWOTrainerMixin:
    """A base class to put before a Trainer: `class LWOTrainer(LWOTrainerMixin, Trainer): ...`.

    Attributes:
        lwo_config, lwo_method: as given.
        lwo: the hook; None before `train`, detached after it.
    """

    lwo_config: LWOConfig
    lwo_method: str | Method = "lwo"
    lwo: LWO | None = None
    _lwo_optimizer: LWOOptimizer | None = None

    # Of the Trainer.
    accelerator: Any
    args: Any
    is_deepspeed_enabled: bool
    is_fsdp_enabled: bool
    lr_scheduler: Any
    model: Any
    model_wrapped: Any
    optimizer: Any
    state: Any

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        kinds = cls.__mro__
        if Trainer in kinds and kinds.index(Trainer) < kinds.index(LWOTrainerMixin):
            raise UserError(
                f"class {cls.__name__}: Trainer comes before LWOTrainerMixin, and would train the"
                " ordinary way; put LWOTrainerMixin first"
            )

    def __init__(
        self, *args: Any, lwo_config: LWOConfig, lwo_method: str | Method = "lwo", **kwargs: Any
    ):
        host: Any = super()
        host.__init__(*args, **kwargs)
        self.lwo_config = lwo_config
        self.lwo_method = lwo_method
        _refuse(self)

    # ---- start and end

    def train(self, *args: Any, **kwargs: Any) -> Any:
        host: Any = super()
        _refuse(self)
        try:
            result = host.train(*args, **kwargs)
        except BaseException:
            # For another attempt, as in a notebook.
            with contextlib.suppress(RuntimeError):
                self._detach()
            raise
        self._detach()
        return result

    def _detach(self) -> None:
        # What a stopped accumulation has gathered is dropped, as by the Trainer.
        if self._lwo_optimizer is not None:
            self._lwo_optimizer.detach(drop_gradients=True)

    def create_optimizer(self, model: Any = None) -> Any:
        if self.is_deepspeed_enabled:
            if self.optimizer is not None:  # of the DeepSpeed config
                return self.optimizer
            arguments = self.args
            # The engine is made with it; the hook empties it.
            self.optimizer = torch.optim.AdamW(
                [p for p in self.model.parameters() if p.requires_grad],
                lr=arguments.learning_rate,
                betas=(arguments.adam_beta1, arguments.adam_beta2),
                eps=arguments.adam_epsilon,
                weight_decay=arguments.weight_decay,
            )
        else:
            self.optimizer = LWOOptimizer(self.model, self.args.learning_rate)
        return self.optimizer

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> Any:
        host: Any = super()
        state = None if resume_from_checkpoint is None else _read_file(resume_from_checkpoint)
        config = _merged(self.lwo_config, self.args)
        if config.weight_decay and self.args.process_index == 0:
            warnings.warn(
                f"weight_decay = {config.weight_decay} counts for every parameter of the active"
                " layer, biases and norms too, which the Trainer leaves out",
                stacklevel=2,
            )
        if self.is_deepspeed_enabled:
            complete_deepspeed(self.accelerator)
            freeze_all_but_first(self.model, config, self.lwo_method)
        elif self.is_fsdp_enabled:
            reduce_in_fp32(self.accelerator)
            # `save_model` writes a whole model, for from_pretrained.
            self.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        else:
            # Not for training, which makes DDP: the hook reduces gradients itself. The accelerator
            # prepares no model twice.
            self.accelerator.prepare_model(self.model, evaluation_mode=True)
        model, loader = host._prepare_for_training(max_steps, train_dataloader, None)
        self._attach(config)
        assert self.lwo is not None
        never = self.lwo.never_trained(max_steps)
        if never and self.args.process_index == 0:
            warnings.warn(
                f"{max_steps} steps never train {', '.join(never)}; a cycle takes"
                f" {self.lwo.schedule.steps_per_cycle} steps (steps_per_layer ="
                f" {config.steps_per_layer})",
                stacklevel=2,
            )
        if state is not None:
            assert self._lwo_optimizer is not None
            write_state(self._lwo_optimizer, state)
            self.lr_scheduler.load_state_dict(state["scheduler"])
        return model, loader

    def _attach(self, config: LWOConfig) -> None:
        if self.is_deepspeed_enabled:
            optimizer = LWOOptimizer(self.model, config.peak_lr)
            if self.model_wrapped.lr_scheduler is None:  # then it has one of the Trainer
                rates = self.optimizer.param_groups[0]
                keys = ("lr", "initial_lr")
                optimizer.param_groups[0] |= {key: rates[key] for key in keys if key in rates}
            self.optimizer.optimizer = optimizer
        else:
            optimizer = self.optimizer.optimizer
        self.lwo = attach(self.model_wrapped, config, self.lwo_method)
        self._lwo_optimizer = optimizer
        optimizer.drive(self.accelerator, self.lwo, self.model_wrapped)

    # ---- logs, evaluation

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        host: Any = super()
        report = None if self._lwo_optimizer is None else self._lwo_optimizer.report
        if self.lwo is not None and report is not None and "loss" in logs:
            names = [layer.name for layer in self.lwo.layers]
            logs["lwo/active_layer"] = names.index(report.layer)
            logs["lwo/skipped_steps"] = float(self.lwo.skipped_steps)
            logs |= {f"memory/{name}": size for name, size in self.lwo.memory().items()}
        host.log(logs, *args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        host: Any = super()
        if self.lwo is not None:
            self.lwo.flush()
        return host.evaluation_loop(*args, **kwargs)

    # ---- saving

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        host: Any = super()
        if self.lwo is not None:
            self.lwo.flush()
        host.save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        host: Any = super()
        loaded_in_shards = getattr(self.model, "is_distributed_loading_by_transformers", False)
        if (
            state_dict is None
            and self.lwo is not None
            and self.lwo.strategy_name != "replicate"
            and not loaded_in_shards  # which transformers gathers itself
        ):
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            state_dict = get_model_state_dict(self.model, options=options)
        host._save(output_dir, state_dict=state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        assert self._lwo_optimizer is not None
        writes: bool = self.args.should_save
        # At the end of an epoch that ends in mid-accumulation, the Trainer saves as always.
        state = read_state(self._lwo_optimizer, keep=writes, without_gradients=True)
        if writes:
            state["scheduler"] = self.lr_scheduler.state_dict()
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            torch.save(state, Path(output_dir, STATE_FILE))

    # ---- loading

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Do nothing: `_prepare_for_training` restores the weights of `STATE_FILE`."""

    def _load_best_model(self) -> None:
        host: Any = super()
        if not Path(self.state.best_model_checkpoint, STATE_FILE).is_file():  # save_only_model
            host._load_best_model()
            return
        assert self.lwo is not None
        write_weights(self.lwo, _read_file(self.state.best_model_checkpoint))


def _read_file(folder: str) -> Mapping[str, Any]:
    path = Path(folder, STATE_FILE)
    if not path.is_file():
        raise UserError(
            f"{folder} has no {STATE_FILE}: no trainer with use_lwo saved it, or it was saved with"
            " save_only_model; load its model with from_pretrained, and train without"
            " resume_from_checkpoint"
        )
    state: Mapping[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return state


# ---- settings


def _merged(config: LWOConfig, arguments: Any) -> LWOConfig:
    """`config` with what TrainingArguments say; the Trainer's scheduler sets the rate.

    Raises:
        UserError: a field that is set in `config` contradicts them.
    """
    counts = {
        "lr": arguments.learning_rate,
        "betas": (arguments.adam_beta1, arguments.adam_beta2),
        "eps": arguments.adam_epsilon,
        "weight_decay": arguments.weight_decay,
        "max_grad_norm": arguments.max_grad_norm or 0.0,
        "gradient_accumulation_steps": arguments.gradient_accumulation_steps,
    }
    schedule = {
        "lr_scheduler_type": getattr(
            arguments.lr_scheduler_type, "value", arguments.lr_scheduler_type
        ),
        "lr_schedule_over": "run",
        "warmup_steps": arguments.warmup_steps,
        "max_steps": arguments.max_steps,
    }
    agree(config, counts | schedule, _NAMES)
    constant = {"lr_scheduler_type": "constant", "warmup_steps": 0, "lr_schedule_over": "run"}
    return config.model_copy(update=counts | constant)


def _refuse(trainer: Any) -> None:
    """Refuse what cannot work, as far as it is known before the model is on its devices.

    Raises:
        UserError: with reason and remedy.
    """
    arguments = trainer.args
    if not isinstance(trainer.lwo_config, LWOConfig):
        raise UserError(f"a {type(trainer.lwo_config).__name__} is not an LWOConfig")
    _merged(trainer.lwo_config, arguments)
    if trainer.lwo_config.batches == "cycle":
        raise UserError(
            "batches = cycle needs the same batches again for each layer, and the Trainer's sampler"
            " gives new ones; leave it out"
        )
    _refuse_optimizers(trainer)
    if arguments.n_gpu > 1:
        raise UserError(
            f"this process uses {arguments.n_gpu} GPUs by DataParallel; start one process for each"
            " GPU, or show it one (CUDA_VISIBLE_DEVICES=0)"
        )
    if arguments.auto_find_batch_size:
        raise UserError(
            "auto_find_batch_size starts training anew with other batches, which the hook cannot"
            " follow; leave it out"
        )
    if getattr(arguments, "enable_jit_checkpoint", False):
        raise UserError(
            "enable_jit_checkpoint saves in the middle of a step, from which the hook cannot go on;"
            " leave it out, and set save_steps"
        )
    checkpointing = {
        **(getattr(arguments, "gradient_checkpointing_kwargs", None) or {}),
        **(getattr(arguments, "activation_checkpointing_kwargs", None) or {}),
    }
    if checkpointing.get("use_reentrant"):
        raise UserError(
            "gradient_checkpointing_kwargs: use_reentrant = True loses the active layer's"
            " gradients; set it to False"
        )
    refuse_config(trainer.lwo_config)
    refuse_accelerator(trainer.accelerator)
    if getattr(trainer, "is_fsdp_xla_enabled", False):
        raise UserError("FSDP of torch_xla is not supported; use FSDP with version 2, or DeepSpeed")
    if trainer.model is not None:
        refuse_model(trainer.accelerator, trainer.model)
        _refuse_adapters(trainer.model, trainer.lwo_method)


def _refuse_optimizers(trainer: Any) -> None:
    arguments = trainer.args
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    if optimizer is not None and not isinstance(optimizer, LWOOptimizer):
        raise UserError(
            f"the trainer was given an optimizer ({type(optimizer).__name__}); layers are trained"
            " with AdamW as TrainingArguments say: leave optimizers out"
        )
    if trainer.lr_scheduler is not None and trainer.lwo is None:
        raise UserError(
            f"the trainer was given a scheduler ({type(trainer.lr_scheduler).__name__}) of another"
            " optimizer; leave optimizers out, and set lr_scheduler_type"
        )
    if trainer.optimizer_cls_and_kwargs is not None:
        raise UserError(
            f"optimizer_cls_and_kwargs = {trainer.optimizer_cls_and_kwargs} cannot be used; layers"
            " are trained with AdamW as TrainingArguments say: leave it out"
        )
    name = getattr(arguments.optim, "value", arguments.optim)
    if name not in _OPTIMIZERS:
        raise UserError(
            f"optim = {name} cannot be used; layers are trained with AdamW: set optim to"
            f" {' or '.join(_OPTIMIZERS)}"
        )
    kinds = [kind for kind in type(trainer).__mro__ if kind is not LWOTrainerMixin]
    owner = next(kind for kind in kinds if "create_optimizer" in vars(kind))
    if owner is not Trainer:
        raise UserError(
            f"{owner.__name__}.create_optimizer makes an optimizer of its own, which would not be"
            " used: layers are trained with AdamW as TrainingArguments say; leave it out"
        )


def _refuse_adapters(model: nn.Module, method: str | Method) -> None:
    if getattr(model, "peft_config", None) is not None and method in ("lwo", "full"):
        raise UserError(
            f"the model has adapters of peft, which method={method!r} does not train; pass"
            ' method="lora", or the model without adapters'
        )
