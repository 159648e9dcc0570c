"""DeepSpeed ZeRO stages 1, 2 and 3: one engine per run; a switch replaces its ZeRO optimizer.

Precedence: the engine's learning-rate scheduler, if any, overrides `lr` and its schedule; a
`gradient_clipping` in the DeepSpeed config overrides `max_grad_norm`; LWOConfig overrides the
engine's own optimizer (rate, betas, epsilon, weight decay). A warning is logged if they differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lwo_dist import distributed
from lwo_dist.config import LWOConfig
from lwo_dist.layers import Layer, Visit
from lwo_dist.memory import local_bytes
from lwo_dist.names import named_parameters, named_tensors
from lwo_dist.strategies.base import MOMENTS, MakeOptimizer, Moments, Strategy, Update
from lwo_dist.strategies.changes import changed
from lwo_dist.strategies.parks import join, split

from . import fragments as fragments
from . import private as private
from .engine import (
    RateOfEngine,
    check_engine,
    refuse_own_checkpoints,
    warn,
    warn_overruled,
)
from .experts import refuse_loose_experts
from .fragments import Fragment

__all__ = ["DeepSpeedZero"]


class DeepSpeedZero(Strategy):
    """ZeRO updates a master copy, even in fp32: 12 bytes of state a parameter / world size.

    With bf16 weights, this rank's part of an inactive layer's master is parked on the host.
    """

    # [Note: Where a park was cut]
    # ZeRO decides how a layer is divided when it becomes active, and divides it the same way each
    # time. ZeRO's own parts are parked as they are. State written while a layer is inactive is
    # divided by `fragments.share`, which differs from stages 1 and 2: `_written` names those parks,
    # and a collective assembles them before they are divided again.

    def __init__(self, engine: Any, layers: Sequence[Layer], config: LWOConfig):
        super().__init__(engine.module, layers, config)
        check_engine(engine, config.gradient_accumulation_steps)
        self._engine = engine
        self.forward_is_collective = engine.zero_optimization_stage() == 3
        if self.forward_is_collective and distributed.world_size() > 1:
            refuse_loose_experts(engine.module)
        self._parameters: dict[str, Any] = dict(named_parameters(engine.module))
        self._layer_of = {name: layer.name for layer in layers for name in layer.parameter_names}
        self._rate = RateOfEngine(engine)
        self._config = engine._config
        written: dict[str, Any] = self._config._param_dict
        if written.get("gradient_clipping") == "auto":
            # transformers and accelerate replace it; in a loop of one's own, LWOConfig decides.
            self._config.gradient_clipping = config.max_grad_norm
            self._clipping: float | None = None
        else:
            self._clipping = written.get("gradient_clipping")
        self._warned = False
        bucket = written.get("zero_optimization", {}).get("reduce_bucket_size", "auto")
        self._own_bucket = bucket == "auto"
        # Key of a shard -> its offset in the flattened parameter.
        self._starts: dict[str, int] = {}
        self._written: set[str] = set()  # keys of parks, see [Note: Where a park was cut]
        self._sent = private.SentBytes()
        self._before_backward = True
        self._undo = [
            engine.register_forward_pre_hook(self._start_count).remove,
            refuse_own_checkpoints(engine),
        ]
        self._micro_steps = engine.micro_steps
        self._passed_over: list[nn.Module] = []

    def activate(self, visit: Visit, make_optimizer: MakeOptimizer) -> None:
        by_layer = [
            [self._parameters[name] for name in layer.parameter_names] for layer in visit.layers
        ]
        trained = [parameter for parameters in by_layer for parameter in parameters]
        optimizer = make_optimizer(by_layer)
        first = self._visit is None
        if first:
            self._warn_if_late(trained)
            warn_overruled(self._engine, optimizer, rate=not self._rate.follows)
        offload = private.release(self._engine)
        names = set(visit.parameter_names)
        for name, parameter in self._parameters.items():
            parameter.requires_grad_(name in names)
        if first:
            fragments.own_storage(self._parameters.values())
        if self._own_bucket:
            # All gradients of the visit are reduced together; the default buckets of 5e8 elements
            # would be allocated at every switch.
            numel = sum(fragments.total_numel(parameter) for parameter in trained)
            self._config.zero_config.reduce_bucket_size = numel
        # The optimizer may be on the host (offload) without being DeepSpeed's own, which needs a
        # compiler.
        self._config.zero_force_ds_cpu_optimizer = False
        private.adopt(self._engine, optimizer, trained, offload)
        self._visit = visit
        for layer in visit.layers:
            self._unpark_masters(layer)
        self._unpark_moments()

    def deactivate(self, following: Visit | None = None) -> None:
        if self._visit is None:
            return
        # The next ZeRO optimizer has storage of its own.
        self._park_moments(following, in_place=False)
        for name in self._visit.parameter_names:
            if self._parameters[name].dtype != torch.float32:
                self._park_master(name, self._part(name))
        # The ZeRO optimizer itself is freed at the next switch: the engine always needs one.

    def refuse_changes(self) -> None:
        super().refuse_changes()
        assert self._visit is not None
        # Under stages 1 and 2, ZeRO writes the new weights to its flat buffers.
        weights = private.flat_weights(self._engine.optimizer)
        flat = {tensor.untyped_storage().data_ptr() for tensor in weights}
        for name in self._visit.parameter_names:
            if flat and self._parameters[name].untyped_storage().data_ptr() not in flat:
                raise changed(f"{name} was moved")

    def detach(self) -> None:
        """The engine keeps the last ZeRO optimizer; to continue training, make a new engine."""
        for undo in self._undo:
            undo()

    def learning_rate(self, scheduled: float) -> float:
        return self._rate.now(scheduled)

    def backward(self, loss: Tensor, boundary: bool) -> None:
        engine = self._engine
        if engine.micro_steps != self._micro_steps:
            raise RuntimeError(
                "engine.step() was called; call lwo.backward() and lwo.step() instead"
            )
        self._before_backward = False
        engine.set_gradient_accumulation_boundary(boundary)
        # Multiply by 1.0, or by NaN if the loss is not finite: the norm is then NaN on all ranks,
        # and ZeRO skips the step. The hook has divided by the accumulation steps.
        engine.backward(loss * (1.0 + 0.0 * loss.detach()), scale_wrt_gas=False)
        if not boundary:
            engine.step()  # counts the micro-batch
            self._micro_steps = engine.micro_steps

    def step(self, lr: float, max_norm: float) -> Update:
        zero = self._engine.optimizer
        for group in private.inner_optimizer(zero).param_groups:
            group["lr"] = lr
        zero.clip_grad = self._max_norm(max_norm)
        self._engine.step()
        private.forget_gradients(zero)
        self._micro_steps = self._engine.micro_steps
        self._before_backward = True
        norm = torch.as_tensor(zero._global_grad_norm, dtype=torch.float32).detach()
        return Update(norm, torch.tensor(float(zero.overflow), device=norm.device))

    def _max_norm(self, ours: float) -> float:
        if self._clipping is not None and ours != self._clipping and not self._warned:
            self._warned = True
            warn(
                f"gradient_clipping = {self._clipping} of the deepspeed config wins over"
                f" max_grad_norm = {ours}"
            )
        return ours if self._clipping is None else self._clipping

    def flush(self) -> None:
        """Do nothing: `step` publishes before it returns."""

    def masters(self) -> list[Tensor]:
        assert self._visit is not None
        # By parameter, not the flat tensors, which stage 3 pads with garbage.
        return [self._part(name)[0] for name in self._visit.active.parameter_names]

    def read_layer(self, layer: Layer) -> dict[str, Tensor]:
        own = named_tensors(self.module)
        return {name: self._whole_master(name, own[name]) for name in layer.parameter_names}

    def write_layer(self, tensors: dict[str, Tensor]) -> None:
        own = named_tensors(self.module)
        for name, tensor in tensors.items():
            target = own[name]
            fragments.put(private.stored(target), tensor)
            if getattr(target, "ds_id", None) is not None and target.numel():  # currently gathered
                target.detach().copy_(tensor)
            if self._is_trained(name):
                fragments.put(self._part(name), tensor)
            elif name in self._layer_of and target.dtype != torch.float32:
                part, start = fragments.share(target)
                cut = tensor.reshape(-1)[start : start + part.numel()].float()
                self._park_master(name, (cut, start), written=not hasattr(target, "ds_id"))

    # ---- moments

    def _shards_of_optimizer(self, layer: Layer) -> dict[str, Tensor]:
        state = private.inner_optimizer(self._engine.optimizer).state
        flats = self._flat_masters(layer)
        if not all(state.get(flat) for flat in flats):
            return {}
        private.link_moments(self._engine.optimizer)
        shards = {"step": state[flats[0]]["step"]}
        for name in layer.parameter_names:
            for key in MOMENTS:
                part, start = self._part(name, key)
                shards[f"{name}.{key}"] = part
                self._starts[f"{name}.{key}"] = start
        return shards

    def _put_into_optimizer(self, layer: Layer, shards: dict[str, Tensor]) -> None:
        zero = self._engine.optimizer
        state = private.inner_optimizer(zero).state
        if not state and not shards:
            return
        # In place, because ZeRO refers to these tensors; zeros at step 0 match a fresh optimizer.
        # ZeRO finds the moments of all layers of a visit, or of none.
        for flat in private.masters(zero):
            for key in MOMENTS:
                state[flat].setdefault(key, torch.zeros_like(flat, requires_grad=False))
            state[flat].setdefault("step", torch.zeros((), device=flat.device))
        for flat in self._flat_masters(layer):
            for key in MOMENTS:
                state[flat][key].zero_()
            state[flat]["step"].copy_(shards.get("step", torch.zeros(())))
        private.link_moments(zero)
        for shard, tensor in shards.items():
            name, _, key = shard.rpartition(".")
            if name:
                self._put_cut(shard, self._parameters[name], tensor, self._part(name, key))

    def _flat_masters(self, layer: Layer) -> list[Tensor]:
        """The flat masters of one layer: the optimizer has a group for each layer of the visit."""
        assert self._visit is not None
        zero = self._engine.optimizer
        group = self._visit.layers.index(layer)
        pairs = zip(private.groups_of_masters(zero), private.masters(zero), strict=True)
        return [flat for number, flat in pairs if number == group]

    def _whole_moments(self, layer: Layer, shards: dict[str, Tensor]) -> Moments:
        step = shards["step"].to("cpu", copy=True)
        exported = {}
        for name in layer.parameter_names:
            exported[name] = {"step": step.clone()}
            for key in MOMENTS:
                shard = f"{name}.{key}"
                exported[name][key] = fragments.whole(
                    self._parameters[name], (shards[shard], self._starts[shard])
                )
        return exported

    def _cut_moments(self, layer: Layer, state: Moments) -> dict[str, Tensor]:
        shards = {"step": next(iter(state.values()))["step"].clone()}
        for name in layer.parameter_names:
            parameter = self._parameters[name]
            part, start = self._part(name) if self._is_trained(name) else fragments.share(parameter)
            for key in MOMENTS:
                shard = f"{name}.{key}"
                shards[shard] = state[name][key].reshape(-1)[start : start + part.numel()]
                self._starts[shard] = start
                if not self._is_trained(name) and not hasattr(parameter, "ds_id"):
                    self._written.add(shard)
        return shards

    def _shard_device(self) -> torch.device:
        return private.masters(self._engine.optimizer)[0].device

    def bytes_per_step(self) -> int:
        """Bytes sent in the step that has begun, or in the last one if none has."""
        return self._sent.total if distributed.world_size() > 1 else 0

    def memory(self) -> dict[str, int]:
        zero = self._engine.optimizer
        parameters = list(self._parameters.values())
        weights = [*parameters, *(p.ds_tensor for p in parameters if hasattr(p, "ds_id"))]
        masters = private.masters(zero)
        gradients = private.gradient_buffers(zero)
        if not gradients:  # between steps: the size that the reduction will produce
            gradients = (
                masters
                if self._engine.zero_optimization_stage() == 2
                else private.flat_weights(zero)
            )
        state = [
            t for s in private.inner_optimizer(zero).state.values() for t in s.values() if t.dim()
        ]
        return {
            "parameter_bytes": local_bytes(weights),
            "gradient_bytes": local_bytes(gradients),
            "optimizer_state_bytes": local_bytes([*masters, *state]),
            "park_bytes": self.park_bytes,
        }

    # ---- masters of 16-bit weights

    @property
    def stores_16_bit(self) -> bool:
        return any(self._parameters[name].dtype != torch.float32 for name in self._layer_of)

    def _is_trained(self, name: str) -> bool:
        return self._visit is not None and name in self._visit.parameter_names

    def _part(self, name: str, key: str | None = None) -> Fragment:
        return private.fragment(self._engine.optimizer, self._parameters[name], key)

    def _park_master(self, name: str, master: Fragment, *, written: bool = False) -> None:
        """Park the bits of this rank's part lost in rounding to bf16."""
        if self._parks_masters:
            low, halfway = split(master[0])
            self._starts[f"{name}.low"] = master[1]
            (self._written.add if written else self._written.discard)(f"{name}.low")
            self._parked_masters.put(
                self._layer_of[name], {f"{name}.low": low, f"{name}.halfway": halfway}
            )

    def _parked_master(self, name: str, parked: dict[str, Tensor]) -> Fragment | None:
        if f"{name}.low" not in parked:
            return None
        low = parked[f"{name}.low"]
        start = self._starts[f"{name}.low"]
        weight = fragments.slice_of(self._parameters[name], start, low.numel())
        return (
            join(weight, low.to(weight.device), parked[f"{name}.halfway"].to(weight.device)),
            start,
        )

    def _unpark_masters(self, layer: Layer) -> None:
        """Restore the exact masters of 16-bit weights from their parked bits."""
        parked = self._parked_masters.take(layer.name, self._shard_device())
        for name in layer.parameter_names:
            master = self._parked_master(name, parked)
            if master is not None:
                self._put_cut(f"{name}.low", self._parameters[name], master[0], self._part(name))

    def _put_cut(self, key: str, parameter: Any, parked: Tensor, part: Fragment) -> None:
        """Copy a park to where ZeRO needs it, dividing it again if we divided it."""
        if key in self._written:
            self._written.remove(key)
            fragments.put(part, fragments.whole(parameter, (parked, self._starts[key])))
        else:
            part[0].copy_(parked)

    def _whole_master(self, name: str, own: Any) -> Tensor:
        if own.dtype != torch.float32 and name in self._layer_of:
            parked = self._parked_masters.get(self._layer_of[name])
            part = self._part(name) if self._is_trained(name) else self._parked_master(name, parked)
            if part is not None:
                return fragments.whole(own, part)
        if hasattr(own, "ds_id"):
            return fragments.whole(own, private.stored(own))
        tensor: Tensor = own.detach().to("cpu", copy=True)
        return tensor.float() if tensor.is_floating_point() else tensor

    def pass_over(self, layers: Sequence[nn.Module]) -> None:
        # Stage 3 fetches in advance what the last passes have used.
        if self.forward_is_collective and layers != self._passed_over:
            private.forget_order(self._engine.optimizer)
        self._passed_over = list(layers)

    def _start_count(self, *_: Any) -> None:
        if self._before_backward:
            self._sent.reset()

    def _warn_if_late(self, trained: Sequence[nn.Parameter]) -> None:
        ids = {id(p) for p in trained}
        others = sum(id(p) not in ids for p in private.trained_parameters(self._engine.optimizer))
        if others:
            warn(
                f"the engine was made with optimizer state for {others} parameters that are not"
                " trained first; it is freed now; call lwo_dist.prepare(model, config) before"
                " deepspeed.initialize and it is never made"
            )
