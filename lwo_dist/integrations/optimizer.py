"""The optimizer that a host's loop sees, and what it saves."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lwo_dist.errors import UserError
from lwo_dist.hook import LWO, StepReport
from lwo_dist.layers import Layer

from .settings import agree

__all__ = ["LWOOptimizer", "copied", "read_state", "write_state", "write_weights"]

_OF_THE_HOOK = (
    "backward",
    "clip_grad_norm_",
    "clip_grad_value_",
    "get_state_dict",
    "no_sync",
    "prepare",
)


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

    def detach(self, *, drop_gradients: bool = False) -> None:
        """Detach the hook from the model and leave the accelerator as it was.

        Args:
            drop_gradients: also inside an accumulation, whose gradients are dropped.
        """
        try:
            self.lwo.detach(drop_gradients=drop_gradients)
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
        if "initial_lr" not in group and group["lr"] == config.peak_lr:
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


def _refuse_clip_grad_value(*_: Any, **__: Any) -> None:
    raise UserError(
        "clip_grad_value_ is not supported: gradients are reduced and clipped in one step; call"
        " clip_grad_norm_, or set max_grad_norm in LWOConfig"
    )


# ---- checkpoints


def read_state(
    optimizer: LWOOptimizer, *, keep: bool, without_gradients: bool = False
) -> dict[str, Any]:
    """Weights, moments, position and learning rate. All ranks call it.

    The weights are whole: the exact fp32 masters. Of a model with adapters of peft, they are the
    adapters.

    Args:
        keep: whether this rank needs the result; else it is empty.
        without_gradients: also inside an accumulation, whose gradients it then lacks.
    """
    weights: dict[str, Tensor] = {}
    for layer in _saved_layers(optimizer.lwo):
        tensors = optimizer.lwo.read_layer(layer)
        if keep:
            weights |= tensors
    position = optimizer.lwo.state_dict(without_gradients=without_gradients)
    state: dict[str, Any] = {"lwo": position, "weights": weights}
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
