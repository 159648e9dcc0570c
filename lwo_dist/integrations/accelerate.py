"""Layer-wise optimisation in a loop of Hugging Face's accelerate.

    accelerator = Accelerator(gradient_accumulation_steps=2)
    model, optimizer, batches = prepare(accelerator, model, LWOConfig(lr=1e-4), batches)
    for batch in batches:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

`LWOOptimizer` and what stands below it also drive transformers' Trainer, whose loop is alike.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from accelerate.utils import DistributedType, DummyOptim, DummyScheduler, DynamoBackend
from torch import Tensor, nn

from lwo_dist.config import LWOConfig
from lwo_dist.errors import UserError
from lwo_dist.hook import LWO, StepReport, attach
from lwo_dist.hook import prepare as freeze_all_but_first
from lwo_dist.layers import Layer
from lwo_dist.methods import Method

__all__ = [
    "LWOOptimizer",
    "agree",
    "complete_deepspeed",
    "copied",
    "prepare",
    "read_state",
    "reduce_in_fp32",
    "refuse_accelerator",
    "refuse_model",
    "write_state",
    "write_weights",
]

_SCHEDULE = ("lr_scheduler_type", "warmup_steps", "lr_schedule_over")
_OF_THE_HOOK = (
    "backward",
    "clip_grad_norm_",
    "clip_grad_value_",
    "get_state_dict",
    "no_sync",
    "prepare",
)
_DISTRIBUTED = (
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.FSDP,
    DistributedType.DEEPSPEED,
)


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
    refuse_accelerator(accelerator)
    refuse_model(accelerator, model)
    for other in others:
        if isinstance(other, torch.optim.Optimizer | torch.optim.lr_scheduler.LRScheduler):
            raise UserError(
                f"{type(other).__name__} cannot be prepared here: layers are trained with AdamW, as"
                " LWOConfig says; leave the optimizer out, and make a scheduler for the optimizer"
                " that prepare returns"
            )
    optimizer = LWOOptimizer(model, config.lr)
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


class LWOOptimizer(torch.optim.Optimizer):
    """The optimizer that a loop, its schedulers and accelerate see.

    It holds the learning rate; `step` completes the hook's step. Its parameter group has one
    parameter of the model, which it does not update.

    Attributes:
        lwo: the hook.
        report: what the last step did; None before the first.
    """

    lwo: LWO
    report: StepReport | None = None

    def __init__(self, model: nn.Module, lr: float):
        super().__init__([next(model.parameters())], {"lr": lr})
        self._accelerator: Any = None
        self._scheduler_of_engine: Any = None
        self._gradients: Literal["none", "some", "all", "used"] = "none"
        self._deferred = False
        self._schedule_of_config: list[str] = []

    def drive(self, accelerator: Any, lwo: LWO, target: Any) -> None:
        """Let the accelerator's `backward` and `clip_grad_norm_` be those of the hook.

        Args:
            target: what the hook was attached to.
        """
        self.lwo = lwo
        lwo.allow(self)
        self._accelerator = accelerator
        if lwo.strategy_name == "deepspeed":
            self._scheduler_of_engine = target.lr_scheduler
        accelerator.backward = self._backward
        accelerator.clip_grad_norm_ = self._clip_grad_norm
        accelerator.clip_grad_value_ = _refuse_clip_grad_value
        accelerator.no_sync = self._no_sync
        if lwo.strategy_name == "replicate":
            own = accelerator.get_state_dict
            accelerator.get_state_dict = lambda model, unwrap=True: copied(own(model, unwrap))

    def detach(self) -> None:
        """Detach the hook from the model and leave the accelerator as it was."""
        try:
            self.lwo.detach()
        finally:
            for name in _OF_THE_HOOK:
                vars(self._accelerator).pop(name, None)

    @property
    def rate_groups(self) -> list[dict[str, Any]]:
        """The groups whose `lr` is that of the next step."""
        if self._scheduler_of_engine is not None:
            groups: list[dict[str, Any]] = self._scheduler_of_engine.optimizer.param_groups
            return groups
        return self.param_groups

    @property
    def overflow(self) -> bool:
        """Whether the last step was skipped; accelerate asks a DeepSpeed optimizer this."""
        return self.report is not None and bool(self.report.skipped)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the active layers, unless this is inside an accumulation or already done.

        Raises:
            RuntimeError: there are no gradients of `accelerator.backward`, or they were all made
                within `accelerator.no_sync`.
        """
        if self._gradients == "none":
            raise RuntimeError(
                "optimizer.step() without accelerator.backward(loss): layers are trained by the"
                " gradients of accelerator.backward; call it instead of loss.backward()"
            )
        if self._gradients == "some" and self._accelerator.sync_gradients:
            raise RuntimeError(
                "optimizer.step() after backward passes within accelerator.no_sync only, which"
                " reduce no gradients; leave it for the last one before a step"
            )
        if self._gradients == "all":
            self._update(None)
        if self._gradients == "used":
            self._gradients = "none"

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Do nothing: the hook drops gradients after each update."""

    def _backward(self, loss: Tensor, scale_wrt_gas: bool = True) -> None:
        # As accelerate does; the Trainer, which divides the loss itself, passes False or has set
        # gradient_accumulation_steps to 1.
        if scale_wrt_gas:
            loss = loss / self._accelerator.gradient_accumulation_steps
        boundary = self._accelerator.sync_gradients and not self._deferred
        self.lwo.backward(loss, boundary=boundary)
        self._gradients = "all" if boundary else "some"

    @contextlib.contextmanager
    def _no_sync(self, model: Any) -> Iterator[None]:
        """The backward passes within do not end the accumulation."""
        before = self._deferred
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = before

    def _clip_grad_norm(
        self, parameters: Iterable[Tensor] | Tensor, max_norm: float, norm_type: float = 2
    ) -> Tensor | None:
        """Update with gradients clipped to `max_norm`; the norm is known only then.

        Returns:
            The norm before clipping, over all ranks; None inside an accumulation.
        """
        if norm_type != 2:
            raise UserError(f"clip_grad_norm_(norm_type={norm_type}): only the 2-norm is supported")
        given = 1 if isinstance(parameters, Tensor) else sum(1 for _ in parameters)
        if given < len(self.lwo.visit.parameter_names):
            raise UserError(
                f"clip_grad_norm_ was given {given} of the {len(self.lwo.visit.parameter_names)}"
                " trained parameters, which are clipped together; pass model.parameters()"
            )
        if self._gradients == "all":
            max_norm = float(max_norm)
            self._update(0.0 if math.isinf(max_norm) else max_norm)
        if self._gradients != "used" or self.report is None:
            return None
        return self.report.grad_norm

    def _update(self, max_norm: float | None) -> None:
        if max_norm is not None:
            agree(self.lwo.config, {"max_grad_norm": max_norm}, {"max_grad_norm": "max_norm"})
        self.report = self.lwo.step(lr=self._rate(), max_grad_norm=max_norm)
        self._gradients = "used"

    def _rate(self) -> float | None:
        """The learning rate of a scheduler of the loop; None if there is none of it."""
        config = self.lwo.config
        group = self.param_groups[0]
        # Every scheduler of torch but ReduceLROnPlateau leaves an `initial_lr`.
        if "initial_lr" not in group and group["lr"] == config.lr:
            return None
        if self._schedule_of_config:
            raise UserError(
                f"LWOConfig sets {self._schedule_of_config[0]}, but a scheduler sets the learning"
                " rate of the optimizer; drop one of them"
            )
        rate = float(group["lr"])
        if config.visit_ramp_steps:
            _, step_in_visit = self.lwo.schedule.position(self.lwo.step_count)
            rate *= min(1.0, (step_in_visit + 1) / config.visit_ramp_steps)
        return rate


# ---- checkpoints


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


def read_state(optimizer: LWOOptimizer, *, keep: bool) -> dict[str, Any]:
    """Weights, moments, position and learning rate. All ranks call it.

    The weights are whole: the exact fp32 masters. Of a model with adapters of peft, they are the
    adapters.

    Args:
        keep: whether this rank needs the result; else it is empty.
    """
    weights: dict[str, Tensor] = {}
    for layer in _saved_layers(optimizer.lwo):
        tensors = optimizer.lwo.read_layer(layer)
        if keep:
            weights |= tensors
    state: dict[str, Any] = {"lwo": optimizer.lwo.state_dict(), "weights": weights}
    if not keep:
        return {}
    state["rates"] = [group["lr"] for group in optimizer.rate_groups]
    if optimizer._scheduler_of_engine is not None:
        state["scheduler_of_engine"] = optimizer._scheduler_of_engine.state_dict()
    return state


def write_state(optimizer: LWOOptimizer, state: Mapping[str, Any]) -> None:
    """Restore `read_state`. All ranks call it with the same state.

    Raises:
        UserError: it is of another model or schedule.
    """
    write_weights(optimizer.lwo, state)
    optimizer.lwo.load_state_dict(state["lwo"])
    if optimizer._scheduler_of_engine is not None and "scheduler_of_engine" in state:
        optimizer._scheduler_of_engine.load_state_dict(state["scheduler_of_engine"])
    for group, rate in zip(optimizer.rate_groups, state["rates"], strict=False):
        group["lr"] = rate


def write_weights(lwo: LWO, state: Mapping[str, Any]) -> None:
    """Restore the weights of `read_state` only. All ranks call it.

    Raises:
        UserError: it is of another model; nothing has changed.
    """
    weights = state["weights"]
    layers = _saved_layers(lwo)
    wanted = [name for layer in layers for name in layer.parameter_names]
    absent = [name for name in wanted if name not in weights]
    if absent:
        raise UserError(
            f"the checkpoint has no {absent[0]} and lacks {len(absent)} of {len(wanted)} tensors;"
            " it is of another model"
        )
    for layer in layers:  # one at a time: the whole tensors may be in a file
        lwo.write_layer({name: weights[name] for name in layer.parameter_names})


def _saved_layers(lwo: LWO) -> list[Layer]:
    # The base model of adapters does not change.
    adapters = getattr(lwo.module, "peft_config", None) is not None
    return [*lwo.layers, *([] if adapters else [lwo.rest])]


def copied(state_dict: Any) -> Any:
    """A state dict whose tensors have storage of their own, but for those that are one tensor.

    Under `replicate` the parameters of a layer share one, of which accelerate saves one only.
    """
    if not isinstance(state_dict, Mapping):
        return state_dict
    copies: dict[tuple[int, torch.Size], Tensor] = {}
    result = {}
    for name, value in state_dict.items():
        if isinstance(value, Tensor) and type(value) in (Tensor, nn.Parameter):
            key = (value.data_ptr(), value.shape)
            if key not in copies or not value.numel():
                copies[key] = value.detach().to("cpu", copy=True)
            value = copies[key]
        result[name] = value
    return result


def reduce_in_fp32(accelerator: Any) -> None:
    """Let FSDP2 sum gradients in fp32. For bf16, accelerate's plugin says bf16, which rounds them.

    Call it before the model is sharded.
    """
    plugin = accelerator.state.fsdp_plugin
    policy = plugin.mixed_precision_policy
    if policy is None:
        return
    if (policy.reduce_dtype or policy.param_dtype) not in (None, torch.float32):
        plugin.mixed_precision_policy = dataclasses.replace(policy, reduce_dtype=torch.float32)


def complete_deepspeed(accelerator: Any) -> None:
    """Fill in what the DeepSpeed config leaves open; call it before the engine is made."""
    settings = accelerator.deepspeed_plugin.deepspeed_config
    # An offloaded optimizer need not be DeepSpeed's own, which needs a compiler.
    settings.setdefault("zero_force_ds_cpu_optimizer", False)
    # A model is saved whole, for from_pretrained.
    zero = settings.setdefault("zero_optimization", {})
    zero.setdefault("stage3_gather_16bit_weights_on_model_save", True)


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


# ---- what cannot work


def agree(config: LWOConfig, theirs: Mapping[str, Any], names: Mapping[str, str]) -> None:
    """Refuse a field that the user has set in `config` and that contradicts the loop's value.

    Args:
        theirs: field -> the value that the loop uses.
        names: field -> what the loop calls it.

    Raises:
        UserError: naming the first such field.
    """
    for field, value in theirs.items():
        ours = getattr(config, field)
        if field in config.model_fields_set and ours != value:
            raise UserError(
                f"LWOConfig sets {field} = {ours}, but {names[field]} = {value}, which counts; set"
                " it there, and leave it out of LWOConfig"
            )


def refuse_accelerator(accelerator: Any) -> None:
    """Refuse an accelerator under which layers cannot be trained one at a time.

    Raises:
        UserError: with reason and remedy.
    """
    kind = accelerator.distributed_type
    if kind not in _DISTRIBUTED:
        raise UserError(
            f"accelerate's distributed_type {kind.value} is not supported; use one process, several"
            " on CPUs or GPUs, FSDP with version 2, or DeepSpeed"
        )
    if kind == DistributedType.FSDP and accelerator.state.fsdp_plugin.fsdp_version != 2:
        raise UserError(
            "FSDP with version 1 cannot be trained layer by layer; set fsdp_version: 2"
            " (fsdp_config in TrainingArguments)"
        )
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise UserError(
            f"mixed precision {accelerator.mixed_precision} is not supported: there is no loss"
            " scaling here; use bf16, or none"
        )
    if accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        raise UserError(
            "torch.compile of the whole model makes a graph for each layer, and gives up after"
            " some; turn it off (torch_compile in TrainingArguments), and call compile() on the"
            " model's layers instead"
        )
    parallelism = accelerator.parallelism_config
    for name in ("tp_size", "cp_size", "sp_size"):
        size = getattr(parallelism, name, 1)
        if size > 1:
            raise UserError(
                f"parallelism_config: {name} = {size} is not supported; layers are trained in data"
                " parallel only: leave it out"
            )


def refuse_model(accelerator: Any, model: nn.Module) -> None:
    """Refuse a model that is spread over devices, or compiled as a whole. Raises: UserError."""
    if accelerator.verify_device_map(model):
        raise UserError(
            "the model is spread over several devices (device_map); load it without, and shard it"
            " with FSDP or DeepSpeed"
        )
    if hasattr(model, "_orig_mod"):
        raise UserError(
            "the model is compiled as a whole, which makes a graph for each layer; pass the model"
            " itself, and call compile() on its layers"
        )


def _refuse_clip_grad_value(*_: Any, **__: Any) -> None:
    raise UserError(
        "clip_grad_value_ is not supported: gradients are reduced and clipped in one step; call"
        " clip_grad_norm_, or set max_grad_norm in LWOConfig"
    )


def _optimizer_of_engine(
    accelerator: Any, model: nn.Module, config: LWOConfig, method: str | Method
) -> Any:
    """The optimizer that the engine is made with: AdamW of what is trained first."""
    first = freeze_all_but_first(model, config, method)
    if "optimizer" in accelerator.deepspeed_plugin.deepspeed_config:
        return DummyOptim(first, lr=config.lr, weight_decay=config.weight_decay)
    return torch.optim.AdamW(
        first,
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
    )
