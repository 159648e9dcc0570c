"""The product: layer-wise optimisation in anyone's training loop.

    lwo = lwo_dist.attach(model, LWOConfig(lr=1e-5, steps_per_layer=50))
    loss = lwo.model(**batch).loss
    lwo.backward(loss)
    lwo.step()

The hook knows the schedule and asks a strategy to do the work: `activate` a layer, `backward`,
`step`. A switch comes right after the last optimizer step of a visit is wholly done, so every step
changes the active layer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .config import LWOConfig
from .errors import UserError
from .layers import Layer, rest_names
from .methods import METHODS
from .schedule import learning_rate, make_schedule
from .strategies import (
    Moments,
    bare_module,
    choose_strategy,
    end_backward_at_active_layer,
    load_deepspeed,
    refuse_wrapped,
    warn_of_rounding,
)

__all__ = ["LWO", "StepReport", "attach", "make_engine", "prepare"]


@dataclass(frozen=True)
class StepReport:
    """What one call of `LWO.step` did. The tensors are 0-dim and on the device: reading one
    synchronises.
    """

    stepped: bool
    """False inside an accumulation: the optimizer step comes with a later micro-batch."""
    switched: bool
    """Another layer is active now."""
    layer: str
    """Name of the layer that this step trained."""
    lr: float
    grad_norm: Tensor | None
    """Norm before clipping, over all ranks; None inside an accumulation."""
    skipped: Tensor | None
    """1.0 if loss or norm was not finite and nothing was changed; None inside an accumulation."""
    bytes_sent: int
    """Bytes of weights and gradients in this step's collectives, each counted as the whole tensor.
    """


def attach(model: nn.Module, config: LWOConfig, method: str = "lwo") -> LWO:
    """Train `model` layer by layer: a plain module, a `fully_shard`ed one, or a DeepSpeed engine.

    All ranks have the same weights.

    Raises:
        UserError: what cannot be done, with reason and remedy: DDP, FSDP1, 16-bit storage (but for
            DeepSpeed's, and FSDP2's in bf16 under a policy that reduces in fp32), reentrant
            checkpointing, meshes of more than one dimension, a model without a stack of layers,
            initial weights that differ between ranks, a DeepSpeed engine with settings that cannot
            be honoured.
    """
    return LWO(model, config, method)


def prepare(model: nn.Module, config: LWOConfig, method: str = "lwo") -> list[nn.Parameter]:
    """Call before `deepspeed.initialize`: freezes all but the layer that is trained first.

    Without it the engine makes optimizer state for the whole model, which `attach` has to free
    again.

    Returns:
        The parameters of that layer, for the optimizer and `model_parameters`.

    Raises:
        UserError: a model that `attach` refuses too, or a DeepSpeed that is missing or has not been
            tested.
    """
    load_deepspeed().check_environment()
    layers = METHODS[method](model, config)
    first = layers[make_schedule(config, [layer.name for layer in layers]).active_layer(0)]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in first.parameter_names)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def make_engine(
    model: nn.Module, config: LWOConfig, settings: dict[str, Any], method: str = "lwo"
) -> Any:
    """A DeepSpeed engine to `attach` to, in the process group that is there; it never holds state
    for the whole model.

    Args:
        settings: a whole DeepSpeed config.
    """
    parameters = prepare(model, config, method)
    return load_deepspeed().build_engine(
        model, parameters, _make_adamw(config, parameters), settings
    )


class LWO:
    """The schedule and the strategy of one training run.

    Attributes:
        model: call it for the forward pass.
        step_count: optimizer steps done, skipped ones included; all that a resume needs of the
            schedule.
        layers: the trained layers in model order; `rest` is what no layer holds.
        skipped_steps, skipped_in_a_row: 0-dim tensors; reading one synchronises.
        switch_seconds: host time spent in switches so far.
        before_switch: called on all ranks after the last update of a visit and before the layer
            changes; also where the same layer begins a new visit.
    """

    def __init__(self, model: nn.Module, config: LWOConfig, method: str = "lwo"):
        module = bare_module(model)
        refuse_wrapped(model)
        end_backward_at_active_layer(module)
        self.model = model
        self.config = config
        self.layers: Sequence[Layer] = METHODS[method](module, config)
        self.rest = Layer("rest", tuple(rest_names(module, self.layers)), depth=0)
        self.schedule = make_schedule(config, [layer.name for layer in self.layers])
        learning_rate(config, self.schedule, 0)  # a schedule that lacks its length is refused now
        self.strategy = choose_strategy(model, self.layers, config)
        self.step_count = 0
        self.skipped_steps = self.skipped_in_a_row = torch.zeros(())
        self.switch_seconds = 0.0
        self.before_switch: Callable[[], None] = lambda: None
        self._micro_step = 0
        self._active = -1
        self._follow_schedule()
        if config.inactive_master == "discard":
            warn_of_rounding(self.strategy, config.lr, config.steps_per_layer)

    @property
    def active_layer(self) -> Layer:
        return self.layers[self._active]

    def backward(self, loss: Tensor) -> None:
        """Backward of one micro-batch's mean loss; the gradients of an accumulation are
        averaged.
        """
        self._micro_step += 1
        self.strategy.backward(loss, boundary=self._at_boundary)

    def step(self) -> StepReport:
        """Call after every `backward`; acts on the last one of an accumulation."""
        layer = self.active_layer
        lr = self.strategy.learning_rate(learning_rate(self.config, self.schedule, self.step_count))
        if not self._at_boundary:
            return StepReport(False, False, layer.name, lr, None, None, 0)
        if self._micro_step == 0:
            raise RuntimeError("step() without backward(): call lwo.backward(loss) first")
        update = self.strategy.step(lr, self.config.max_grad_norm)
        bytes_sent = self.strategy.bytes_per_step()
        self.skipped_steps = self.skipped_steps.to(update.skipped.device) + update.skipped
        self.skipped_in_a_row = (
            self.skipped_in_a_row.to(update.skipped.device) + 1
        ) * update.skipped
        self._micro_step = 0
        self.step_count += 1
        switched = self._follow_schedule()
        if self.step_in_visit == self.config.steps_per_layer - 1:
            self.strategy.prefetch(self.layers[self.schedule.active_layer(self.step_count + 1)])
        return StepReport(
            True, switched, layer.name, lr, update.grad_norm, update.skipped, bytes_sent
        )

    def flush(self) -> None:
        """Call before evaluation or any read of the model's weights."""
        self.strategy.flush()

    def read_layer(self, layer: Layer) -> dict[str, Tensor]:
        """Whole tensors on the CPU by parameter name: the exact fp32 masters. All ranks call it."""
        self.strategy.flush()
        return self.strategy.read_layer(layer)

    def write_layer(self, tensors: dict[str, Tensor]) -> None:
        """Set parameters from whole tensors by name. All ranks call it with the same tensors."""
        self.strategy.flush()
        self.strategy.write_layer(tensors)

    def read_moments(self, layer: Layer) -> Moments:
        """AdamW's moments of a layer that has any now, active or parked, as whole CPU tensors; {}
        else.

        All ranks call it. By parameter name: `exp_avg`, `exp_avg_sq` and the scalar `step`.
        """
        self.strategy.flush()
        return self.strategy.export_state(layer)

    def write_moments(self, layer: Layer, moments: Moments) -> None:
        """Give `layer` the moments of `read_moments`, of any strategy and world size; {} takes them
        away.

        All ranks call it with the same tensors. With `state: reset` only the active layer has any.
        """
        self.strategy.flush()
        self.strategy.import_state(layer, moments)

    def memory(self) -> dict[str, int]:
        """This rank's `parameter_bytes`, `gradient_bytes`, `optimizer_state_bytes`, `park_bytes`,
        as held now.
        """
        return self.strategy.memory()

    def masters(self) -> list[Tensor]:
        """This rank's fp32 master shards of the active layer; over all ranks each element once,
        padding zero.
        """
        return self.strategy.masters()

    def position(self) -> dict[str, Any]:
        """Where the run stands: `step`, `active_layer` (of the coming step; its name),
        `skipped_steps`.
        """
        return {
            "step": self.step_count,
            "active_layer": self.active_layer.name,
            "skipped_steps": float(self.skipped_steps),
        }

    def state_dict(self) -> dict[str, Any]:
        """Position and the moments of every layer that has any; the weights are left out
        (`read_layer`).

        All ranks call it; nothing in it depends on the strategy or the world size.
        """
        self._refuse_mid_accumulation("state_dict()")
        moments: Moments = {}
        for layer in self.layers:
            moments |= self.read_moments(layer)
        return {**self.position(), "moments": moments}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict`; load the weights (`write_layer`) too.

        Raises:
            UserError: the schedule of this config has another layer active at that step.
        """
        self._refuse_mid_accumulation("load_state_dict()")
        step, moments = state_dict["step"], state_dict["moments"]
        scheduled = self.layers[self.schedule.active_layer(step)].name
        if scheduled != state_dict["active_layer"]:
            raise UserError(
                f"the checkpoint trains {state_dict['active_layer']} at step {step}, this schedule"
                f" {scheduled}; resume with the same order, seed, steps_per_layer, layers_per_group"
                " and trained layers"
            )
        self.step_count = step
        self.skipped_steps = torch.tensor(state_dict["skipped_steps"])
        self._active = -1  # also when the layer stays: its optimizer starts anew
        self._follow_schedule()
        for layer in self.layers:
            self.write_moments(
                layer, {name: moments[name] for name in layer.parameter_names if name in moments}
            )

    @property
    def step_in_visit(self) -> int:
        """Of the coming step; -1 where there is one layer, which is never switched."""
        return self.schedule.position(self.step_count)[1] if len(self.layers) > 1 else -1

    @property
    def _at_boundary(self) -> bool:
        return self._micro_step % self.config.gradient_accumulation_steps == 0

    def _follow_schedule(self) -> bool:
        """Make the layer of the coming step active; True if that is another one."""
        index = self.schedule.active_layer(self.step_count)
        if index == self._active and self.step_in_visit != 0:
            return False
        if self._active >= 0:
            self.before_switch()
        started = time.perf_counter()
        with torch.profiler.record_function("LWO::switch"):
            self.strategy.deactivate()
            self.strategy.activate(self.layers[index], partial(_make_adamw, self.config))
        self.switch_seconds += time.perf_counter() - started
        switched, self._active = index != self._active, index
        return switched

    def _refuse_mid_accumulation(self, what: str) -> None:
        if not self._at_boundary:
            raise RuntimeError(
                f"{what} inside an accumulation would lose gradients; call it right after a whole"
                " step"
            )


def _make_adamw(config: LWOConfig, shards: Sequence[Tensor]) -> torch.optim.Optimizer:
    # Fused, because that kernel can be told on the device to skip a step (`update_shards`).
    return torch.optim.AdamW(
        shards,
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )
