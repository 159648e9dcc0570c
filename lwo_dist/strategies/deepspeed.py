"""DeepSpeed ZeRO stages 1, 2 and 3: one engine for the whole run, whose ZeRO optimizer is replaced at the switch.

Who wins where both speak: the engine's learning-rate scheduler, if it has one, over `lr` and its schedule; a
`gradient_clipping` written in the DeepSpeed config over `max_grad_norm`; LWOConfig over the engine's own optimizer
(rate, betas, epsilon, weight decay). Each is warned about where the two differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lwo_dist import distributed
from lwo_dist.layers import Layer
from lwo_dist.memory import local_bytes

from . import deepspeed_private as private
from .base import MakeOptimizer, Strategy, Update
from .deepspeed_engine import (
    RateOfEngine,
    build_engine,
    check_engine,
    check_environment,
    partitioner,
    warn,
    warn_overruled,
)

__all__ = ["DeepSpeedZero", "build_engine", "check_environment", "partitioner"]


class DeepSpeedZero(Strategy):
    """ZeRO steps on a master of its own, in fp32 too: 12 bytes of state a parameter / world size.

    With bf16 weights the master of a layer that is not active is parked on the host, this rank's part.
    """

    def __init__(self, engine: Any, layers: Sequence[Layer], accumulation: int):
        super().__init__(engine.module, layers, accumulation)
        check_engine(engine, accumulation)
        self._engine = engine
        self._parameters: dict[str, Any] = dict(engine.module.named_parameters())
        self._active: Layer | None = None
        self._rate = RateOfEngine(engine)
        self._config = engine._config
        written: dict[str, Any] = self._config._param_dict
        self._clipping: float | None = written.get("gradient_clipping")
        self._warned = False
        self._own_bucket = "reduce_bucket_size" not in written.get("zero_optimization", {})
        self._parks: dict[str, tuple[Tensor, int]] = {}  # as `private.fragment` gives it
        self._written: set[str] = set()  # parked by `write_layer`: cut elsewhere than ZeRO cuts
        self._sent = private.SentBytes()
        self._before_backward = True
        engine.register_forward_pre_hook(self._start_count)

    def activate(self, layer: Layer, make_optimizer: MakeOptimizer) -> None:
        trained = [self._parameters[name] for name in layer.parameter_names]
        first, optimizer = self._active is None, make_optimizer(trained)
        if first:
            self._warn_if_late(trained)
            warn_overruled(self._engine, optimizer, rate=self._engine.lr_scheduler is None)
        offload = private.release(self._engine)
        for name, parameter in self._parameters.items():
            parameter.requires_grad_(name in layer.parameter_names)
        if first:
            _unflatten(self._parameters.values())
        if self._own_bucket:
            # All gradients of the layer go out together; the default of 5e8 elements is allocated at every switch.
            self._config.zero_config.reduce_bucket_size = sum(_numel(p) for p in trained)
        # The optimizer may live on the host (offload) without being DeepSpeed's own, which a compiler must build.
        self._config.zero_force_ds_cpu_optimizer = False
        private.adopt(self._engine, optimizer, trained, offload)
        self._active = layer
        self._unpark(layer)

    def deactivate(self) -> None:
        if self._active is None:
            return
        for name in self._active.parameter_names:
            if self._parameters[name].dtype != torch.float32:
                part, start = self._part(name)
                self._parks[name] = part.to("cpu", copy=True), start
        # The ZeRO optimizer itself goes when the next one comes: the engine cannot be without one.

    def learning_rate(self, scheduled: float) -> float:
        return self._rate.now(scheduled)

    def backward(self, loss: Tensor, boundary: bool) -> None:
        engine = self._engine
        if engine.is_gradient_accumulation_boundary() != boundary:
            raise RuntimeError("engine.step() or engine.backward() was called; call lwo.backward() and lwo.step() only")
        self._before_backward = False
        # Times 1.0, or times NaN if the loss is not finite: the norm is then NaN on all ranks, and ZeRO skips the step.
        engine.backward(loss * (1.0 + 0.0 * loss.detach()))
        if not boundary:
            engine.step()  # counts the micro-batch

    def step(self, lr: float, max_norm: float) -> Update:
        zero = self._engine.optimizer
        for group in private.inner_optimizer(zero).param_groups:
            group["lr"] = lr
        zero.clip_grad = self._max_norm(max_norm)
        self._engine.step()
        self._before_backward = True
        norm = torch.as_tensor(zero._global_grad_norm, dtype=torch.float32).detach()
        return Update(norm, torch.tensor(float(zero.overflow), device=norm.device))

    def _max_norm(self, ours: float) -> float:
        if self._clipping is not None and ours != self._clipping and not self._warned:
            self._warned = True
            warn(f"gradient_clipping = {self._clipping} of the deepspeed config wins over max_grad_norm = {ours}")
        return ours if self._clipping is None else self._clipping

    def flush(self) -> None:
        """Nothing is pending: `step` publishes before it returns."""

    def read_layer(self, layer: Layer) -> dict[str, Tensor]:
        own = self.model.state_dict(keep_vars=True)
        return {name: self._whole_master(name, own[name]) for name in layer.parameter_names}

    def write_layer(self, tensors: dict[str, Tensor]) -> None:
        own = self.model.state_dict(keep_vars=True)
        for name, tensor in tensors.items():
            target = own[name]
            _put(private.stored(target), tensor)
            if getattr(target, "ds_id", None) is not None and target.numel():  # gathered now
                target.detach().copy_(tensor)
            if name not in self._parameters:
                continue
            if self._is_active(name):
                _put(self._part(name), tensor)
            elif target.dtype != torch.float32:
                self._parks[name] = _cut(tensor.float())
                self._written.add(name)

    def export_state(self) -> dict[str, dict[str, Tensor]]:
        state = private.inner_optimizer(self._engine.optimizer).state
        if not state or self._active is None:
            return {}
        step = next(iter(state.values()))["step"].to("cpu", copy=True)
        exported: dict[str, dict[str, Tensor]] = {}
        for name in self._active.parameter_names:
            exported[name] = {"step": step.clone()}
            for key in ("exp_avg", "exp_avg_sq"):
                exported[name][key] = _whole(self._parameters[name], self._part(name, key))
        return exported

    def import_state(self, state: dict[str, dict[str, Tensor]]) -> None:
        if not state:
            return
        zero = self._engine.optimizer
        optimizer = private.inner_optimizer(zero)
        step = next(iter(state.values()))["step"]
        for flat in private.masters(zero):
            optimizer.state[flat] = {
                "step": step.to(flat.device, copy=True),
                **{key: torch.zeros_like(flat, requires_grad=False) for key in ("exp_avg", "exp_avg_sq")},
            }
        private.link_moments(zero)
        for name, moments in state.items():
            for key in ("exp_avg", "exp_avg_sq"):
                _put(self._part(name, key), moments[key])

    def bytes_per_step(self) -> int:
        """What was sent since the first forward of the coming step, or of the last one if it has not begun."""
        return self._sent.total if distributed.world_size() > 1 else 0

    def memory(self) -> dict[str, int]:
        zero, parameters = self._engine.optimizer, list(self._parameters.values())
        weights = [*parameters, *(p.ds_tensor for p in parameters if hasattr(p, "ds_id"))]
        masters = private.masters(zero)
        gradients = private.gradient_buffers(zero)
        if not gradients:  # between steps: what the reduction will leave here
            gradients = masters if self._engine.zero_optimization_stage() == 2 else private.flat_weights(zero)
        state = [t for s in private.inner_optimizer(zero).state.values() for t in s.values() if t.dim()]
        return {
            "parameter_bytes": local_bytes(weights),
            "gradient_bytes": local_bytes(gradients),
            "optimizer_state_bytes": local_bytes([*masters, *state]),
        }

    # ---- masters, moments and parks

    def _is_active(self, name: str) -> bool:
        return self._active is not None and name in self._active.parameter_names

    def _part(self, name: str, key: str | None = None) -> tuple[Tensor, int]:
        return private.fragment(self._engine.optimizer, self._parameters[name], key)

    def _unpark(self, layer: Layer) -> None:
        """Give the new masters the bits that 16-bit weights lack; a weight that was changed meanwhile keeps its own."""
        for name in layer.parameter_names:
            if name not in self._parks:
                continue
            part, start = self._part(name)
            parked = self._parks.pop(name)
            if name in self._written:
                self._written.remove(name)
                parked = _whole(self._parameters[name], parked).view(-1)[start : start + part.numel()], start
            exact, dtype = parked[0].to(part.device), self._parameters[name].dtype
            part.copy_(torch.where(exact.to(dtype) == part.to(dtype), exact, part))

    def _whole_master(self, name: str, own: Any) -> Tensor:
        if own.dtype != torch.float32 and self._is_active(name):
            return _whole(own, self._part(name))
        if name in self._parks:
            return _whole(own, self._parks[name])
        if hasattr(own, "ds_id"):
            return _whole(own, private.stored(own))
        whole = own.detach().to("cpu", copy=True)
        return whole.float() if whole.is_floating_point() else whole

    def _start_count(self, *_: Any) -> None:
        if self._before_backward:
            self._sent.reset()

    def _warn_if_late(self, trained: Sequence[nn.Parameter]) -> None:
        ids = {id(p) for p in trained}
        others = sum(id(p) not in ids for p in private.trained_parameters(self._engine.optimizer))
        if others:
            warn(
                f"the engine was made with optimizer state for {others} parameters that are not trained first; it is "
                "freed now; call lwo_dist.prepare(model, config) before deepspeed.initialize and it is never made"
            )


def _numel(parameter: Any) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())


def _whole(parameter: Any, part: tuple[Tensor, int]) -> Tensor:
    """Put the ranks' parts together: each element is one rank's, and zero on the others."""
    tensor, start = part
    whole = torch.zeros(_numel(parameter), device=parameter.device)
    whole[start : start + tensor.numel()] = tensor.to(whole.device)
    return distributed.all_reduce(whole).view(getattr(parameter, "ds_shape", parameter.shape)).to("cpu", copy=True)


def _cut(tensor: Tensor) -> tuple[Tensor, int]:
    """This rank's equal share of the flattened tensor, and where it begins."""
    size = -(-tensor.numel() // distributed.world_size())
    start = min(distributed.rank() * size, tensor.numel())
    return tensor.reshape(-1)[start : start + size].to("cpu", copy=True), start


def _put(part: tuple[Tensor, int], whole: Tensor) -> None:
    tensor, start = part
    tensor.copy_(whole.reshape(-1)[start : start + tensor.numel()])


@torch.no_grad()
def _unflatten(parameters: Any) -> None:
    """Give each weight its own storage: a flat buffer of the whole model would live until the last weight left it."""
    for parameter in parameters:
        tensor = parameter.ds_tensor if hasattr(parameter, "ds_id") else parameter
        if tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size():
            tensor.data = tensor.data.clone()
