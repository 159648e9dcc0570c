"""Whole weights on every rank; only the visit's gradients, weights and norm are communicated.

A step has three phases over one flat buffer per layer: reduce-scatter the gradients, AdamW on this
rank's part of the flat weights, all-gather the weights. That is 2 x the layer's bytes, where DDP
sends 2 x the model's. The all-gather may run while the next forward pass is below the layer.

A layer that is updated without optimizer state has an owner: the gradient is reduced to that rank,
which orthogonalises it, updates the layer and broadcasts it, so that the ranks share the work. It
is 2 x the layer's bytes too.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lwo_dist import distributed
from lwo_dist.config import Config, LWOConfig
from lwo_dist.errors import UserError
from lwo_dist.layers import Layer, Visit, find_stacks
from lwo_dist.memory import local_bytes, padded_numel
from lwo_dist.methods import Method
from lwo_dist.names import named_parameters, named_tensors
from lwo_dist.orthogonal import update_without_state

from .base import (
    MOMENTS,
    MakeOptimizer,
    ModelSource,
    Moments,
    Strategy,
    StrategyBuilder,
    Update,
    mask_rows,
    update_shards,
)
from .changes import changed
from .flat_layer import FlatLayer
from .in_backward import UpdateInBackward, refuse_several_processes

__all__ = ["Replicate", "ReplicateBuilder", "compute_in_bf16"]

_ALIGN = 4  # elements: parameters in the flat buffer are aligned to 16 bytes for fast kernels
_LARGE = 2**20  # elements: such a gradient is moved into the flat buffer during backward


class ReplicateBuilder(StrategyBuilder):
    name = "replicate"
    own_settings = (
        "lwo.stateless",
        "lwo.stateless_every",
        "lwo.stateless_update",
        "lwo.head_rows",
    )
    updates_whole_layers = True
    updates_in_backward = True
    masks_rows = True

    def drives(self, model: nn.Module) -> bool:
        return isinstance(model, nn.Module)

    def check(self, config: Config) -> None:
        if config.lwo.stateless_update == "backward":
            refuse_several_processes(config.cluster.max_workers)

    def build(
        self, source: ModelSource, method: Method, config: Config, device: torch.device
    ) -> nn.Module:
        model: nn.Module = source.whole(device)
        if config.train.precision == "bf16":
            compute_in_bf16(model, device.type)
        return model

    def attach(self, model: nn.Module, layers: Sequence[Layer], config: LWOConfig) -> Strategy:
        return Replicate(model, layers, config)


def compute_in_bf16(model: nn.Module, device_type: str) -> None:
    """Like FSDP2's policy: fp32 weights and gradients, bf16 compute.

    Without autocast's cache, which would keep the bf16 copies of all trained weights until the end
    of the forward pass, also under activation checkpointing.
    """
    autocast = torch.autocast(device_type, torch.bfloat16, cache_enabled=False)
    model.forward = autocast(model.forward)


class Replicate(Strategy):
    """The shards are slices of the flat fp32 weights: 8 bytes of state a parameter / world size."""

    def __init__(self, model: nn.Module, layers: Sequence[Layer], config: LWOConfig):
        super().__init__(model, layers, config)
        self._in_backward = config.stateless_update == "backward"
        if self._in_backward:
            refuse_several_processes(distributed.world_size())
        self._early: UpdateInBackward | None = None
        self._parameters = named_parameters(model)
        self._weight_decay = config.weight_decay
        self._refuse_16_bit()
        self._dtypes = {name: parameter.dtype for name, parameter in self._parameters.items()}
        distributed.assert_same_on_all_ranks(_checksums(model), "initial weights")
        self._flat_weights: dict[str, Tensor] = {}
        self._weight_views: dict[str, dict[str, Tensor]] = {}
        self._trained: dict[str, FlatLayer] = {}
        self._hooks: list[Any] = []  # handles of hooks on gradients
        self._window: list[Any] = []  # handles of hooks while weights are on their way
        self._readers: list[nn.Module] = []

    def activate(self, visit: Visit, make_optimizer: MakeOptimizer) -> None:
        trained = set(visit.parameter_names)
        for name, parameter in self._parameters.items():
            parameter.requires_grad_(name in trained)
        owners = {
            layer.name: number % distributed.world_size()
            for number, layer in enumerate(visit.stateless)
        }
        for layer in visit.stateful if self._in_backward else visit.layers:
            weights = self._flatten(layer)
            gradient = torch.empty_like(weights)
            views = self._views(layer, gradient)
            flat = FlatLayer(layer, weights, gradient, views, owners.get(layer.name))
            self._trained[layer.name] = flat
            self._hooks += [
                self._parameters[name].register_post_accumulate_grad_hook(partial(flat.take, view))
                for name, view in views.items()
                if view.numel() >= _LARGE
            ]
        if self._in_backward and visit.stateless:
            self._early = UpdateInBackward(
                self._parameters_of(visit.stateless),
                self._parameters_of(visit.stateful),
                self._weight_decay,
            )
        self._visit = visit
        self._make_optimizer = make_optimizer
        self._optimizer = make_optimizer([[flat.weight_shard] for flat in self._with_state()])
        self._unpark_moments()

    def _parameters_of(self, layers: Sequence[Layer]) -> list[nn.Parameter]:
        return [self._parameters[name] for layer in layers for name in layer.parameter_names]

    def deactivate(self, following: Visit | None = None) -> None:
        if self._visit is None:
            return
        self.flush()
        self._park_moments(following)
        for name in self._visit.parameter_names:
            self._parameters[name].grad = None
        del self._optimizer
        self._forget_trained()
        self._visit = None

    def detach(self) -> None:
        """Give each parameter storage of its own: of a shared one, accelerate saves one tensor."""
        for layer in self.layers:
            if self._flat_weights.pop(layer.name, None) is not None:
                for name in self._weight_views.pop(layer.name):
                    self._parameters[name].data = self._parameters[name].detach().clone()

    def backward(self, loss: Tensor, boundary: bool) -> None:
        if self._early is None:
            super().backward(loss, boundary)
            return
        with self._early.running(loss, self.lr_in_backward):
            super().backward(loss, boundary)
        self._non_finite = self._non_finite + self._early.non_finite

    def step(self, lr: float, max_norm: float) -> Update:
        update = self._update(lr, max_norm)
        self.flush()
        return update

    def step_ahead(self, lr: float, max_norm: float) -> Update:
        update = self._update(lr, max_norm)
        if distributed.world_size() > 1:
            self._open_window()
        return update

    def flush(self) -> None:
        for flat in self._trained.values():
            flat.finish_publishing()
        if self._window:
            self._close_window()

    def _update(self, lr: float, max_norm: float) -> Update:
        self.flush()  # a loop may step without a forward pass in between
        self._follow_storage()
        for flat in self._trained.values():
            flat.collect(self._parameters)
            own = flat.gradient_views
            mask_rows(own, {name: rows for name, rows in self.kept_rows.items() if name in own})
        for flat in self._trained.values():
            flat.reduce()
        non_finite = self._take_non_finite()
        others = [flat for flat in self._trained.values() if flat.owner is not None]
        mine = [flat for flat in others if flat.owner == distributed.rank()]
        if mine:
            norms = torch._foreach_norm([flat.gradient for flat in mine])
            non_finite = non_finite + 0.0 * torch.stack(norms).sum()
        update = update_shards(self._optimizer, lr, max_norm, non_finite)
        self._publish(self._with_state())
        update_without_state(
            [view for flat in mine for view in self._weight_views[flat.layer.name].values()],
            [view for flat in mine for view in flat.gradient_views.values()],
            lr,
            self._weight_decay,
            update.skipped,
        )
        self._publish(others)
        return update

    def _publish(self, updated: Sequence[FlatLayer]) -> None:
        for flat in updated:
            flat.release_gradient()
            flat.start_publishing()

    # [Note: Weights on their way]
    # From `step_ahead` until `flush` other ranks' parts of a layer are the old ones, and change at
    # any moment. To train on with them would be a silent fault. So for that time its parameters are
    # NaN (one number, expanded), and `flush` is called by what reads them: the forward pass of the
    # layer, and `state_dict`. A parameter outside of the transformer layers may be read anywhere in
    # a forward pass (a tied matrix, a loss in chunks), so the whole pass waits for it; and for a
    # compiled layer, which would compile the hook too.

    def _open_window(self) -> None:
        for flat in self._trained.values():
            for name in flat.layer.parameter_names:
                self._parameters[name].data = flat.absent.expand(self._parameters[name].shape)
        assert self._visit is not None
        if not self._readers:
            self._readers = _first_readers(self.module, set(self._visit.parameter_names))
        self._window = [
            module.register_forward_pre_hook(self._wait, prepend=True) for module in self._readers
        ]
        self._window.append(self.module.register_state_dict_pre_hook(self._wait))

    def _wait(self, *_: Any) -> None:
        self.flush()

    def _close_window(self) -> None:
        for handle in self._window:
            handle.remove()
        self._window = []
        for flat in self._trained.values():
            for name, view in self._weight_views[flat.layer.name].items():
                parameter = self._parameters[name]
                if parameter.data_ptr() != flat.absent.data_ptr() and parameter.numel():
                    raise changed(f"{name} was moved or set before its update was complete")
                parameter.data = view

    def masters(self) -> list[Tensor]:
        assert self._visit is not None
        return [self._trained[self._visit.active.name].weight_shard.detach()]

    def _with_state(self) -> list[FlatLayer]:
        return [flat for flat in self._trained.values() if flat.owner is None]

    def read_layer(self, layer: Layer) -> dict[str, Tensor]:
        tensors = named_tensors(self.module)
        return {name: tensors[name].detach().to("cpu", copy=True) for name in layer.parameter_names}

    def write_layer(self, tensors: dict[str, Tensor]) -> None:
        own = named_tensors(self.module)
        for name, tensor in tensors.items():
            own[name].detach().copy_(tensor)

    def _shards_of_optimizer(self, layer: Layer) -> dict[str, Tensor]:
        weight_shard = self._trained[layer.name].weight_shard
        moments: dict[str, Tensor] = self._optimizer.state.get(weight_shard, {})
        return moments

    def _put_into_optimizer(self, layer: Layer, shards: dict[str, Tensor]) -> None:
        weight_shard = self._trained[layer.name].weight_shard
        self._optimizer.state.pop(weight_shard, None)
        if shards:
            self._optimizer.state[weight_shard] = {
                key: tensor.to(self._shard_device()) for key, tensor in shards.items()
            }

    def _whole_moments(self, layer: Layer, shards: dict[str, Tensor]) -> Moments:
        step = shards["step"].to("cpu", copy=True)
        exported: Moments = {name: {"step": step.clone()} for name in layer.parameter_names}
        for key in MOMENTS:
            whole = shards[key].new_empty(self._flat_numel(layer), device=self._shard_device())
            distributed.all_gather(whole, shards[key].to(whole.device))
            for name, view in self._views(layer, whole).items():
                exported[name][key] = view.to("cpu", copy=True)
        return exported

    def _cut_moments(self, layer: Layer, state: Moments) -> dict[str, Tensor]:
        shards = {"step": next(iter(state.values()))["step"].clone()}
        numel = self._flat_numel(layer) // distributed.world_size()
        for key in MOMENTS:
            whole = torch.zeros(
                self._flat_numel(layer), dtype=self._parameters[layer.parameter_names[0]].dtype
            )
            for name, view in self._views(layer, whole).items():
                view.copy_(state[name][key])
            shards[key] = whole[distributed.rank() * numel :][:numel].clone()
        return shards

    def _shard_device(self) -> torch.device:
        return next(iter(self._parameters.values())).device

    def bytes_per_step(self) -> int:
        if distributed.world_size() == 1:
            return 0
        return sum(2 * flat.gradient.nbytes for flat in self._trained.values())

    def memory(self) -> dict[str, int]:
        self.flush()
        trained = list(self._trained.values())
        states = [self._optimizer.state.get(flat.weight_shard, {}) for flat in self._with_state()]
        moments = [tensor for state in states for tensor in state.values() if tensor.dim()]
        return {
            "parameter_bytes": local_bytes(self.module.parameters()),
            "gradient_bytes": sum(flat.gradient_bytes for flat in trained),
            "optimizer_state_bytes": local_bytes(moments),
            "park_bytes": self.park_bytes,
        }

    def _flatten(self, layer: Layer) -> Tensor:
        """The flat weights of `layer`, built at its first visit; its parameters are views.

        Rebuilt if a parameter has received other storage in the meantime (`model.to`).

        Raises:
            RuntimeError: a parameter has another dtype than at `attach`.
        """
        if layer.name in self._flat_weights and self._is_flat(layer):
            return self._flat_weights[layer.name]
        for name in layer.parameter_names:
            if self._parameters[name].dtype != self._dtypes[name]:
                raise changed(
                    f"{name} went from {self._dtypes[name]} to {self._parameters[name].dtype}"
                )
        parameters = [self._parameters[name] for name in layer.parameter_names]
        flat = parameters[0].new_zeros(self._flat_numel(layer), requires_grad=False)
        views = self._views(layer, flat)
        for name, view in views.items():
            view.copy_(self._parameters[name].detach())
            self._parameters[name].data = view
        self._flat_weights[layer.name] = flat
        self._weight_views[layer.name] = views
        return flat

    def _is_flat(self, layer: Layer) -> bool:
        """Whether the parameters of `layer` are still views of its flat weights."""
        return all(
            self._parameters[name].data_ptr() == view.data_ptr()
            for name, view in self._weight_views[layer.name].items()
        )

    def _follow_storage(self) -> None:
        """Keep training layers whose parameters have moved within the visit (`model.to`)."""
        if all(self._is_flat(flat.layer) for flat in self._trained.values()):
            return
        assert self._visit is not None
        moments = {layer: self._shards_of_optimizer(layer) for layer in self._visit.stateful}
        self._forget_trained()
        self.activate(self._visit, self._make_optimizer)
        for layer, shards in moments.items():
            self._put_into_optimizer(layer, shards)

    def _flat_numel(self, layer: Layer) -> int:
        numel = sum(
            padded_numel(self._parameters[name].numel(), _ALIGN) for name in layer.parameter_names
        )
        return padded_numel(numel, distributed.world_size())

    def _views(self, layer: Layer, flat: Tensor) -> dict[str, Tensor]:
        views = {}
        start = 0
        for name in layer.parameter_names:
            parameter = self._parameters[name]
            views[name] = flat[start : start + parameter.numel()].view(parameter.shape)
            start += padded_numel(parameter.numel(), _ALIGN)
        return views

    def _forget_trained(self) -> None:
        for handle in self._hooks:
            handle.remove()
        self._hooks = []
        if self._early is not None:
            self._early.end()
            self._early = None
        self._trained = {}
        self._readers = []

    def _refuse_16_bit(self) -> None:
        for layer in self.layers:
            for name in layer.parameter_names:
                dtype = self._parameters[name].dtype
                if dtype not in (torch.float32, torch.float64):
                    raise UserError(
                        f"parameter {name} is stored in {dtype}, which would round the updates"
                        " away; load the model with dtype=torch.float32 and compute under"
                        " torch.autocast"
                    )


def _first_readers(model: nn.Module, names: set[str]) -> list[nn.Module]:
    """The modules of which one is the first to read these parameters in a forward pass."""
    try:
        stacks = find_stacks(model)
    except UserError:  # layers of the caller's own, in a model without a stack
        return [model]
    inside = {
        f"{stack.path}.{name}.": module
        for stack in stacks
        for name, module in stack.modules.named_children()
    }
    parameters = named_parameters(model)
    wanted = {id(parameters[name]) for name in names}
    readers: dict[nn.Module, None] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in wanted:
            found = (module for path, module in inside.items() if name.startswith(path))
            readers[next(found, model)] = None
    if any(reader is model or reader._compiled_call_impl for reader in readers):
        return [model]
    return list(readers)


def _checksums(model: nn.Module) -> dict[str, int]:
    """A hash of the bits of every parameter and buffer, computed on its device."""
    return {
        name: int(torch.hash_tensor(tensor.detach()).item()) if tensor.numel() else 0
        for name, tensor in model.state_dict(keep_vars=True).items()
    }
