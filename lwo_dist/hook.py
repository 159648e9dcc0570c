"""Layer-wise optimisation in any training loop.

    lwo = lwo_dist.attach(model, LWOConfig(steps_per_layer=50))
    for batch in batches:
        loss = lwo.model(**batch).loss
        lwo.backward(loss)
        lwo.step()

The hook knows the schedule and delegates the work to a strategy: `activate` a visit, `backward`,
`step`. A switch happens only after the last optimizer step of a visit is complete, so every step
changes exactly the layers of its visit.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import distributed
from .config import LWOConfig
from .errors import UserError
from .guard import Guard
from .head_rows import HeadRows
from .layers import (
    Layer,
    Visit,
    check_layers,
    check_visits,
    forget_flags,
    keep_flags,
    own_flags,
    rest_names,
    without_frozen,
)
from .methods import Method
from .names import clean_name, named_parameters
from .optimizer import make_adamw
from .prefix import PrefixReuse
from .registry import METHODS, STRATEGIES
from .schedule import learning_rate, make_schedule
from .state import moments_by_layer, refuse_moments, refuse_strangers, whole_shapes
from .strategies import Moments, StrategyBuilder
from .strategies.refusals import (
    CheckpointingWatch,
    refuse_compiled,
    refuse_head_rows,
    refuse_stateless,
    refuse_stateless_in_16_bit,
    refuse_update_in_backward,
    refuse_wrapped,
    warn_of_frozen,
    warn_of_rounding,
)
from .suffix import SuffixBackward

__all__ = ["LWO", "StepReport", "attach", "prepare"]


@dataclass(frozen=True)
class StepReport:
    """What one call of `LWO.step` did.

    The tensors are 0-dim and on the device: reading one synchronises.
    """

    stepped: bool
    """False inside an accumulation: a later micro-batch triggers the optimizer step."""
    switched: bool
    """A different layer became active."""
    layer: str
    """Name of the layer that was active in this step."""
    lr: float
    grad_norm: Tensor | None
    """Norm before clipping, over all ranks, of the layers with optimizer state; None inside an
    accumulation."""
    skipped: Tensor | None
    """1.0 if loss or norm was not finite and the step was skipped; None inside an accumulation."""
    bytes_sent: int
    """Bytes of weights and gradients in this step's collectives, each counted as a whole tensor."""


def attach(
    model: nn.Module,
    config: LWOConfig,
    method: str | Method = "lwo",
    *,
    layers: Sequence[Layer] | None = None,
    strategy: str | StrategyBuilder | None = None,
) -> LWO:
    """Train `model` layer by layer in your own loop.

    Do not create an optimizer or wrap the model in DDP: the strategy reduces gradients and updates
    the active layer. Parameters that require no gradient now stay as they are, with a warning;
    freeze before `attach`, as later changes are refused or have no effect. Of a PEFT model only its
    adapters are trained.

    Args:
        model: a plain module with the same fp32 or fp64 weights on every rank (`replicate`), one
            wrapped by `fully_shard` (`fsdp`), or a DeepSpeed engine of ZeRO stage 1, 2 or 3
            (`deepspeed`).
        config: the optimizer, the layer schedule and the learning-rate schedule.
        method: "lwo" trains one layer at a time; "full" trains all parameters through the same
            hook, "lora" the adapters that peft has added to the model. Or an instance of your own
            `Method`.
        layers: the layers to train, instead of those the method finds, in the order of the
            forward pass. Parameters in none of them stay unchanged.
        strategy: how layers are distributed across ranks; None: chosen by how the model is
            wrapped.

    Returns:
        The hook. Call its `model` for the forward pass, then `backward` and `step`.

    Raises:
        UserError: anything unsupported, with reason and remedy: DDP, FSDP1, 16-bit storage (except
            DeepSpeed's, and FSDP2's in bf16 under a policy that reduces in fp32), reentrant
            checkpointing, `torch.compile` of the model as a whole, meshes other than (shard) and
            (replicate, shard), a model without a stack of layers,
            initial weights that differ between ranks, DeepSpeed settings that cannot be honoured,
            `layers` that do not fit the model, nothing that requires a gradient, or, with
            `batches: cycle`, a model that draws random numbers in training.

    Example:
        >>> lwo = lwo_dist.attach(model, lwo_dist.LWOConfig(steps_per_layer=50))
        >>> for batch in batches:
        ...     loss = lwo.model(**batch).loss
        ...     lwo.backward(loss)
        ...     report = lwo.step()
        >>> lwo.detach()
    """
    return LWO(model, config, method, layers=layers, strategy=strategy)


def prepare(
    model: nn.Module, config: LWOConfig, method: str | Method = "lwo"
) -> list[nn.Parameter]:
    """Freeze everything except the first layer to be trained; call before `deepspeed.initialize`.

    Without it the engine allocates optimizer state for the whole model, which `attach` then has to
    free.

    Returns:
        The parameters that are trained first, for the optimizer and `model_parameters`.

    Raises:
        UserError: a model that `attach` would refuse too, or DeepSpeed is missing or an untested
            version.
    """
    from .strategies.deepspeed.builder import prepare

    by_layer = prepare(model, config, _method(method))
    return [parameter for layer in by_layer for parameter in layer]


class LWO:
    """The schedule and the strategy of one training run.

    Attributes:
        model: call it for the forward pass.
        module: the module with the parameters: `model`, or what a DeepSpeed engine wraps.
        layers: all trained layers in model order; `rest` holds everything outside them.
        visits: the visits of a cycle, in model order; the schedule orders them.
        step_count: completed optimizer steps, including skipped ones; the only schedule state a
            resume needs.
        skipped_steps, skipped_in_a_row: 0-dim tensors; reading one synchronises.
        switch_seconds: host time spent in switches so far.
        before_switch: called on all ranks after the last update of a visit is complete, before its
            layers change; also when the same visit starts again.
    """

    def __init__(
        self,
        model: nn.Module,
        config: LWOConfig,
        method: str | Method = "lwo",
        *,
        layers: Sequence[Layer] | None = None,
        strategy: str | StrategyBuilder | None = None,
    ):
        if not isinstance(model, nn.Module) or not isinstance(config, LWOConfig):
            raise UserError(
                f"attach({type(model).__name__}, {type(config).__name__}): pass a torch.nn.Module"
                " and an LWOConfig"
            )
        refuse_wrapped(model)
        builder = _builder(model, strategy)
        how = _method(method)
        self.model = model
        self.module = builder.module(model)
        _refuse_attached(self.module)
        config = how.with_rate(self.module, config)
        self.config = config
        self._flags = own_flags(self.module)
        if layers is not None and (config.stateless, config.embeddings) != ("none", "visit"):
            raise UserError(
                f"stateless: {config.stateless} and embeddings: {config.embeddings} are for the"
                " layers that a method finds; leave out attach(layers=...), or write a Method with"
                " visits of your own"
            )
        found = layers if layers is not None else how.layers(self.module, config)
        self.layers: Sequence[Layer] = check_layers(self.module, found)
        if not how.changes_model:  # such a method freezes the base model itself
            self.layers = without_frozen(self.layers, self._flags)
            warn_of_frozen(self._flags)
        self.visits: Sequence[Visit] = check_visits(self.layers, how.cycle(self.layers, config))
        if len(self.visits) > 1:
            refuse_compiled(self.module)
        elif config.batches == "cycle":
            raise UserError(
                f"batches: cycle has no effect with method: {how.name}, which never switches; set"
                " batches: fresh"
            )
        refuse_stateless(builder.name, builder.updates_whole_layers, self.visits)
        refuse_update_in_backward(builder.name, builder.updates_in_backward, config, self.visits)
        refuse_head_rows(builder.name, builder.masks_rows, config)
        self.rest = Layer("rest", tuple(rest_names(self.module, self.layers)))
        self.schedule = make_schedule(config, [visit.active.name for visit in self.visits])
        learning_rate(config, self.schedule, 0)  # refuse a schedule without a length early
        self.strategy = builder.attach(model, self.layers, config)
        refuse_stateless_in_16_bit(self.strategy, self.visits)
        self.strategy_name = builder.name
        self.step_count = 0
        self.skipped_steps = torch.zeros(())
        self.skipped_in_a_row = torch.zeros(())
        self.switch_seconds = 0.0
        self.before_switch: Callable[[], None] = _do_nothing
        self._micro_step = 0
        self._at_boundary: bool | None = None  # of the last backward; None after a full step
        self._active = -1
        self._prefix: PrefixReuse | None = None
        if config.batches == "cycle":
            self._prefix = PrefixReuse(self.module, config, self.visits, self.strategy)
        self._head_rows: HeadRows | None = None
        if config.head_rows == "batch":
            self._head_rows = HeadRows(self.module, self.visits, self.strategy)
        self._suffix = SuffixBackward(
            self.module,
            self.visits,
            config.suffix_backward,
            config.seed,
            drops_trained=how.drops_trained,
        )
        keep_flags(self.module, self._flags)
        self._guard = Guard(self.module)
        self._follow_schedule()
        self._suffix.choose(self.step_count, self.visit)
        _ATTACHED[self.module] = weakref.ref(self)
        if config.inactive_master == "discard":
            warn_of_rounding(self.strategy, config.peak_lr, config.steps_per_layer)
        self._checkpointing = CheckpointingWatch(self.module)

    # ---- a step

    def backward(self, loss: Tensor, boundary: bool | None = None) -> None:
        """Backward of one micro-batch.

        Args:
            loss: 0-dim. With `boundary=None`, the mean of its micro-batch: the gradients of the
                `gradient_accumulation_steps` micro-batches are averaged.
            boundary: whether the optimizer step follows, for callers that count micro-batches
                themselves, e.g. when the last accumulation of an epoch is short. Gradients are then
                summed as they are: the caller has already divided the loss.

        Raises:
            RuntimeError: `step` was not called after the last micro-batch, or after `detach`; or,
                with `stateless_update: backward`, the last pass failed halfway.
            UserError: `boundary=False` with `stateless_update: backward`.
        """
        self._refuse_detached()
        if self._at_boundary:
            raise RuntimeError(
                "backward() was called again before step(); call lwo.step() after every "
                "lwo.backward(), and set gradient_accumulation_steps to accumulate"
            )
        micro_step = self._micro_step + 1
        accumulation = self.config.gradient_accumulation_steps
        if boundary is None:
            boundary = micro_step >= accumulation
            if accumulation > 1:
                loss = loss / accumulation
        if self.config.stateless_update == "backward":
            if not boundary:
                raise UserError(
                    "backward(boundary=False): stateless_update: backward cannot accumulate"
                    " gradients; set stateless_update: step"
                )
            self.strategy.lr_in_backward = self._rate()
        self._suffix.before_backward()
        with self._guard.ours():
            self.strategy.backward(loss, boundary)
        self._suffix.after_backward(loss.device)
        if boundary:
            self._guard.note_gradients()
        # Only now: a backward that failed, as for lack of memory, may be tried again, unless it has
        # updated layers (`stateless_update: backward`).
        self._micro_step = micro_step
        self._at_boundary = boundary

    def step(
        self,
        lr: float | None = None,
        max_grad_norm: float | None = None,
        *,
        wait: bool = True,
    ) -> StepReport:
        """Update the visit's layers and switch at its end; call it after every `backward`.

        Does nothing inside an accumulation.

        Args:
            lr: the learning rate, if the caller has a scheduler; None: from the config.
            max_grad_norm: what to clip to, if the caller decides; None: from the config.
            wait: False lets `replicate` send the new weights while the next forward pass of `model`
                is below the layer; the numbers are the same. Until that pass, a read of the active
                layer's parameters gives NaN: call `flush` before you read them, or call a part
                of the model.

        Raises:
            RuntimeError: `backward` was not called.
            UserError: `lr` or `max_grad_norm` is below 0, or `lr` is given with
                `stateless_update: backward`.
        """
        self._refuse_detached()
        if self._at_boundary is None:
            raise RuntimeError("step() without backward(): call lwo.backward(loss) first")
        layer = self.active_layer.name
        if lr is None:
            lr = self._rate()
        elif self.config.stateless_update == "backward":
            raise UserError(
                f"step(lr={lr}): stateless_update: backward has already updated layers with the"
                " rate of LWOConfig; set the schedule there, or stateless_update: step"
            )
        if not self._at_boundary:
            return StepReport(
                stepped=False,
                switched=False,
                layer=layer,
                lr=lr,
                grad_norm=None,
                skipped=None,
                bytes_sent=0,
            )
        if max_grad_norm is None:
            max_grad_norm = self.config.max_grad_norm
        if lr < 0 or max_grad_norm < 0:
            raise UserError(f"step(lr={lr}, max_grad_norm={max_grad_norm}): neither can be below 0")
        self.strategy.refuse_changes()
        self._guard.refuse_interference()
        self._guard.warn_if_unreached(layer)
        if self._head_rows is not None:
            self.strategy.kept_rows = self._head_rows.take(self.visit)
        with self._guard.ours():
            step = self.strategy.step if wait else self.strategy.step_ahead
            update = step(lr, max_grad_norm)
        bytes_sent = self.strategy.bytes_per_step()
        # Before the first step they are on the CPU, where torch takes them as numbers: `to` would
        # wait for the device.
        self.skipped_steps = self.skipped_steps + update.skipped
        self.skipped_in_a_row = (self.skipped_in_a_row + 1) * update.skipped
        self._micro_step = 0
        self._at_boundary = None
        self.step_count += 1
        switched = self._follow_schedule()
        self._suffix.choose(self.step_count, self.visit)
        if self.step_in_visit == self.config.steps_per_layer - 1:
            self.strategy.prefetch(self.visits[self.schedule.active_layer(self.step_count + 1)])
        return StepReport(
            stepped=True,
            switched=switched,
            layer=layer,
            lr=lr,
            grad_norm=update.grad_norm,
            skipped=update.skipped,
            bytes_sent=bytes_sent,
        )

    def _rate(self) -> float:
        """Of the next step, unless the caller decides."""
        scheduled = learning_rate(self.config, self.schedule, self.step_count)
        return self.strategy.learning_rate(scheduled)

    def allow(self, optimizer: torch.optim.Optimizer) -> None:
        """Allow `step` of an optimizer that holds parameters of the model but updates none.

        A loop may need one for its scheduler. The step of any other is a RuntimeError.
        """
        self._guard.allow(optimizer)

    def flush(self) -> None:
        """Call before evaluation or any read of the model's weights."""
        self.strategy.flush()

    def detach(self, *, drop_gradients: bool = False) -> None:
        """Give the model back with whole weights, and flags and hooks as `attach` found them.

        All ranks call it, right after a full step. A DeepSpeed engine keeps the ZeRO optimizer of
        the last visit and can run forward passes; to continue training, create a new engine.

        Args:
            drop_gradients: also inside an accumulation, whose gradients are dropped.
        """
        if not drop_gradients:
            self._refuse_mid_accumulation("detach()", "pass drop_gradients=True")
        self._refuse_detached()
        self.strategy.flush()
        self._guard.end()
        if self._prefix is not None:
            self._prefix.end()
        self._suffix.end()
        if self._head_rows is not None:
            self._head_rows.end()
        self.strategy.deactivate()
        # Before the strategy's own part, which depends on what is trainable.
        for name, parameter in named_parameters(self.module).items():
            parameter.requires_grad_(self._flags[name])
        forget_flags(self.module)
        self.strategy.detach()
        self._checkpointing.end()
        _ATTACHED.pop(self.module, None)
        self._active = -1

    # ---- position

    @property
    def visit(self) -> Visit:
        """The visit that the next step trains."""
        self._refuse_detached()
        return self.visits[self._active]

    @property
    def active_layer(self) -> Layer:
        return self.visit.active

    @property
    def step_in_visit(self) -> int:
        """Index of the next step in its visit, from 0; -1 with a single visit, which never ends."""
        if len(self.visits) == 1:
            return -1
        return self.schedule.position(self.step_count)[1]

    @property
    def batch_index(self) -> int:
        """Which batch the next step trains on, from 0: with `batches: cycle` the batches of a visit
        come again for every layer of the cycle, else each step has a new one.
        """
        return self.schedule.batch(self.step_count)

    @property
    def prefix_reused(self) -> int:
        """How many of this process's forward passes in training started at kept hidden states,
        instead of running the layers below the active one; 0 with `batches: fresh`.
        """
        return self._prefix.reused if self._prefix is not None else 0

    def never_trained(self, steps: int) -> list[str]:
        """Names of the layers that a run of `steps` optimizer steps does not come to."""
        never = self.schedule.never_active(steps)
        changed = {
            layer.name
            for i, visit in enumerate(self.visits)
            if i not in never
            for layer in visit.layers
        }
        names = [self.visits[i].active.name for i in never]
        return [name for name in names if name not in changed]

    def last_changed(self, layer: Layer) -> int:
        """The step count after the last update of `layer`; 0 if never updated, as for `rest`."""
        indices = {i for i, visit in enumerate(self.visits) if layer in visit.layers}
        return self.schedule.last_active(indices, self.step_count)

    def position(self) -> dict[str, Any]:
        """The position: `step`, `active_layer` (name, for the next step), `skipped_steps`; with
        `suffix_backward`, the sensitivities (`suffix`) once they are measured.
        """
        suffix = self._suffix.state()
        return {
            "step": self.step_count,
            "active_layer": self.active_layer.name,
            "skipped_steps": float(self.skipped_steps),
            **({"suffix": suffix} if suffix is not None else {}),
        }

    def memory(self) -> dict[str, int]:
        """This rank's current `parameter_bytes`, `gradient_bytes` and `optimizer_state_bytes`, and
        `park_bytes` on the host.

        Gradients count as they are before the update, also where they have no memory between steps
        (`replicate`). Right after a switch a layer has no moments yet. On a GPU, the next layer's
        parks are also on the device during the last step of a visit; they are not counted.
        """
        self._refuse_detached()
        return self.strategy.memory()

    def masters(self) -> list[Tensor]:
        """This rank's fp32 master shards of the active layer; do not modify them.

        Across ranks each element appears once, under a (replicate, shard) mesh once per replica;
        padding is zero.
        """
        self._refuse_detached()
        return self.strategy.masters()

    # ---- weights and state

    def read_layer(self, layer: Layer) -> dict[str, Tensor]:
        """Whole tensors on the CPU by parameter name: the exact fp32 masters. All ranks call it."""
        self.strategy.flush()
        return self.strategy.read_layer(layer)

    def write_layer(self, tensors: dict[str, Tensor]) -> None:
        """Set parameters from whole tensors by name. All ranks call it with the same tensors.

        Raises:
            UserError: a name or shape that does not match the model.
        """
        tensors = {clean_name(name): tensor for name, tensor in tensors.items()}
        refuse_strangers("weights", {name: t.shape for name, t in tensors.items()}, self.module)
        self.strategy.flush()
        if self._prefix is not None:
            self._prefix.forget()
        self.strategy.write_layer(tensors)

    def read_moments(self, layer: Layer) -> Moments:
        """AdamW's moments of a layer, active or parked, as whole CPU tensors; {} if it has none.

        All ranks call it. By parameter name: `exp_avg`, `exp_avg_sq` and the scalar `step`.
        """
        self.strategy.flush()
        return self.strategy.export_state(layer)

    def write_moments(self, layer: Layer, moments: Moments) -> None:
        """Set the moments of `layer`, as `read_moments` returns them; {} clears them.

        They may come from any strategy and world size. All ranks call it with the same tensors.
        With `state: reset`, moments of layers outside the current visit are dropped.

        Raises:
            UserError: parameter names or shapes that do not match the layer.
        """
        refuse_moments(layer, moments, self.module)
        self.strategy.flush()
        self.strategy.import_state(layer, moments)

    def state_dict(self, *, without_gradients: bool = False) -> dict[str, Any]:
        """Position and all existing moments; the weights are not included (see `read_layer`).

        All ranks call it; the result does not depend on the strategy or the world size.

        Args:
            without_gradients: also inside an accumulation, whose gradients it then lacks.
        """
        if not without_gradients:
            self._refuse_mid_accumulation("state_dict()", "pass without_gradients=True")
        moments: Moments = {}
        for layer in self.layers:
            moments |= self.read_moments(layer)
        return {**self.position(), "schedule": self._schedule_of_layers(), "moments": moments}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore `state_dict`; also load the weights (`write_layer`). Changes nothing on error.

        Raises:
            UserError: a key is missing, the schedule or the layers are others, or the moments
                belong to another model.
        """
        self._refuse_mid_accumulation("load_state_dict()", "detach and attach again")
        by_layer = moments_by_layer(state_dict, self.layers, self.module)
        ours = self._schedule_of_layers()
        # A state dict without one of these is older than that setting.
        older = {"stateless_every": 1, "head_rows": "all"}
        theirs = {**older, **state_dict.get("schedule", ours)}
        for key, value in theirs.items():
            if ours[key] != value:
                raise UserError(
                    f"the checkpoint was made with {key} = {value}, the model is attached with"
                    f" {ours[key]}; attach with the same layers and LWOConfig to resume (a default"
                    " may have changed since)"
                )
        step = state_dict["step"]
        scheduled = self.visits[self.schedule.active_layer(step)].active.name
        if scheduled != state_dict["active_layer"]:
            raise UserError(
                f"the checkpoint trains {state_dict['active_layer']} at step {step}, this schedule"
                f" {scheduled}; resume with the same order, seed, steps_per_layer,"
                " layers_per_group and trained layers"
            )
        self._suffix.load(state_dict.get("suffix"))
        self.step_count = step
        self.skipped_steps = torch.tensor(float(state_dict["skipped_steps"]))
        self._active = -1  # even if the layer stays: its optimizer is rebuilt
        if self._head_rows is not None:
            self._head_rows.forget()
        if self._prefix is not None:
            self._prefix.forget()
        self._follow_schedule()
        self._suffix.choose(self.step_count, self.visit)
        for layer in self.layers:
            self.write_moments(layer, by_layer.get(layer.name, {}))

    def __repr__(self) -> str:
        if self._active < 0:
            return f"LWO({self.strategy_name}, detached after {self.step_count} steps)"
        visit, in_visit = self.schedule.position(self.step_count)
        shapes = whole_shapes(self.module)
        lines = [
            f"LWO({self.strategy_name} on {distributed.world_size()} rank(s), after "
            f"{self.step_count} steps: {self.active_layer.name} is active, visit {visit + 1}, "
            f"step {in_visit + 1} of {self.config.steps_per_layer}"
        ]
        for layer in [*self.layers, self.rest]:
            numel = sum(torch.Size(shapes[name]).numel() for name in layer.parameter_names)
            mark = "*" if layer in self.visit.layers else " "
            if layer.parameter_names:
                lines.append(f" {mark} {layer.name:<14}{numel:>16,} parameters")
        return "\n".join(lines) + ")"

    # ---- internals

    def _follow_schedule(self) -> bool:
        """Activate the visit of the next step; return True if the active layer changed."""
        index = self.schedule.active_layer(self.step_count)
        if index == self._active and self.step_in_visit != 0:
            return False
        self.strategy.refuse_any_change()
        if self._active >= 0:
            self.before_switch()
        started = time.perf_counter()
        with torch.profiler.record_function("LWO::switch"):
            self._guard.watch([])
            if self._prefix is not None:
                in_cycle = self.step_count % self.schedule.steps_per_cycle
                self._prefix.begin_visit(index, first_of_cycle=in_cycle == 0)
            self.strategy.deactivate(self.visits[index])
            self._guard.drop_gradients()
            self.strategy.activate(self.visits[index], partial(make_adamw, self.config))
            self._guard.watch(self.visits[index].parameter_names)
        self.switch_seconds += time.perf_counter() - started
        switched = index != self._active
        self._active = index
        return switched

    def _schedule_of_layers(self) -> dict[str, Any]:
        """What decides which layers, and which of their rows, a step updates."""
        return {
            "layers": [visit.active.name for visit in self.visits],
            "order": self.config.order,
            "seed": self.config.seed,
            "steps_per_layer": self.config.steps_per_layer,
            "layer_weights": dict(self.config.layer_weights),
            "stateless": self.config.stateless,
            "stateless_every": self.config.stateless_every,
            "head_rows": self.config.head_rows,
        }

    def _refuse_mid_accumulation(self, what: str, remedy: str) -> None:
        self._refuse_detached()
        if self._at_boundary is not None:
            raise RuntimeError(
                f"{what} inside an accumulation would lose gradients; call it right after a whole"
                f" step, or {remedy}"
            )

    def _refuse_detached(self) -> None:
        if self._active < 0:
            raise RuntimeError("this LWO was detached from its model; call lwo_dist.attach again")


_ATTACHED: weakref.WeakKeyDictionary[nn.Module, weakref.ref[LWO]] = weakref.WeakKeyDictionary()


def _refuse_attached(module: nn.Module) -> None:
    other = _ATTACHED.get(module)
    if other is not None and other() is not None:
        raise UserError(
            f"this {type(module).__name__} is attached to another LWO, and both would change its"
            " weights; call detach() on that one first"
        )


def _method(method: str | Method) -> Method:
    found: Method = METHODS.instance(method)
    return found


def _builder(model: nn.Module, strategy: str | StrategyBuilder | None) -> StrategyBuilder:
    builders: list[StrategyBuilder] = STRATEGIES.all()
    # `replicate` accepts any module, so it is tried last.
    fitting = next(builder for builder in reversed(builders) if builder.drives(model))
    if strategy is None:
        return fitting
    chosen: StrategyBuilder = STRATEGIES.instance(strategy)
    if chosen.name in STRATEGIES.names and chosen.name != fitting.name:
        raise UserError(
            f"strategy={chosen.name!r} cannot train a {type(model).__name__} that is wrapped for "
            f"{fitting.name!r}; leave strategy out, or wrap the model for {chosen.name!r}"
        )
    return chosen


def _do_nothing() -> None:
    pass
