"""FSDP2: every layer's weights are sharded over the ranks, in fp32, and gathered for compute.

FSDP2 reduces only gradients of trainable parameters and takes `requires_grad` from the sharded parameter at each
gather, so a switch needs no rebuilding. The optimizer works on the plain local shards, which are the fp32 masters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from lwo_dist import distributed
from lwo_dist.config import UserError
from lwo_dist.layers import Layer, find_stack, parameter_depths
from lwo_dist.memory import local_bytes, padded_numel

from .base import MakeOptimizer, Strategy, Update, update_shards

__all__ = ["FullyShard", "shard_model"]


def shard_model(model: nn.Module, *, precision: str, device_type: str) -> None:
    """Wrap each transformer layer and the root with `fully_shard`, over all ranks, in place.

    Works on a model on the meta device too: materialise it afterwards. The embedding, the final norm and the
    head stay in the root's group, where a tied matrix is held once.

    Args:
        precision: compute dtype, "fp32" or "bf16"; gradients are reduced in fp32 either way.
    """
    mesh = init_device_mesh(device_type, (distributed.world_size(),))
    policy = MixedPrecisionPolicy()
    if precision == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    _, stack = find_stack(model)
    for layer in stack:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


class FullyShard(Strategy):
    """LWO on a `fully_shard`ed model, wrapped by us or by its owner."""

    def __init__(self, model: nn.Module, layers: Sequence[Layer], accumulation: int):
        super().__init__(model, layers, accumulation)
        self._modules = [m for m in model.modules() if isinstance(m, FSDPModule)]
        self._reshard()
        # Where every layer reaches down to the bottom (`full`), nothing is ever prefix, stack or no stack.
        self._depths = parameter_depths(model) if any(layer.depth for layer in layers) else {}
        self._refuse_unsupported()
        buffers = {name: int(torch.hash_tensor(b).item()) for name, b in model.named_buffers() if b.numel()}
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        distributed.assert_same_on_all_ranks({**buffers, **shapes}, "buffers or parameter shapes")
        self._active: Layer | None = None
        self._shards: dict[str, nn.Parameter] = {}

    # [Note: The switch sequence]
    # A switch comes only between optimizer steps, and starts with a reshard: after a forward without backward
    # (evaluation) the root stays gathered, `parameters()` are then temporaries, and a flag set on them is lost
    # without an error. The flags are flipped on the sharded parameters; the dtypes of the newly trainable groups
    # are set, because FSDP2 fixes them once and ignores what is frozen then; and the groups of the prefix are
    # told that backward does not need them, else the prefetch gathers one of them in vain.
    def activate(self, layer: Layer, make_optimizer: MakeOptimizer) -> None:
        self._reshard()
        parameters = dict(self.model.named_parameters())
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in layer.parameter_names)
        for module in self._modules:
            names = _own_parameters(self.model, module)
            needed = any(self._depths.get(name, layer.depth) >= layer.depth for name in names)
            module.set_unshard_in_backward(needed)
            for group in _groups(module):
                group._init_mp_dtypes()
        self._active = layer
        self._trained = {name: parameters[name] for name in layer.parameter_names}
        # Empty where a parameter has fewer rows than there are ranks: every rank then goes through the same steps.
        self._shards = {name: nn.Parameter(_local(parameter)) for name, parameter in self._trained.items()}
        self._optimizer = make_optimizer(list(self._shards.values()))

    def deactivate(self) -> None:
        if self._active is None:
            return
        self._reshard()
        for parameter in self._trained.values():
            parameter.grad = None
        self._trained, self._shards, self._active = {}, {}, None
        del self._optimizer

    def backward(self, loss: Tensor, boundary: bool) -> None:
        root = self.model
        assert isinstance(root, FSDPModule)
        # Inside an accumulation the active layer's gradient stays whole on each rank and is reduced once.
        root.set_requires_gradient_sync(boundary)
        super().backward(loss, boundary)

    def step(self, lr: float, max_norm: float) -> Update:
        for name, shard in self._shards.items():
            gradient = self._trained[name].grad
            shard.grad = _local(gradient) if gradient is not None else torch.zeros_like(shard)
        update = update_shards(self._optimizer, lr, max_norm, self._take_non_finite())
        for name, shard in self._shards.items():
            shard.grad = self._trained[name].grad = None
        return update

    def flush(self) -> None:
        """Register the shards again: after a forward without backward the root is still gathered."""
        self._reshard()

    def read_layer(self, layer: Layer) -> dict[str, Tensor]:
        self._reshard()
        tensors = self.model.state_dict(keep_vars=True)
        return {name: _whole(tensors[name]).to("cpu", copy=True) for name in layer.parameter_names}

    def write_layer(self, tensors: dict[str, Tensor]) -> None:
        self._reshard()
        own = self.model.state_dict(keep_vars=True)
        for name, tensor in tensors.items():
            _local(own[name]).copy_(_shard_like(tensor, own[name]))

    def export_state(self) -> dict[str, dict[str, Tensor]]:
        exported: dict[str, dict[str, Tensor]] = {}
        if not self._optimizer.state:
            return exported
        for name, parameter in self._trained.items():
            state = self._optimizer.state[self._shards[name]]
            exported[name] = {"step": state["step"].to("cpu", copy=True)}
            for key in ("exp_avg", "exp_avg_sq"):
                exported[name][key] = _whole(_as_shard_of(parameter, state[key])).to("cpu", copy=True)
        return exported

    def import_state(self, state: dict[str, dict[str, Tensor]]) -> None:
        for name, moments in state.items():
            shard = self._shards[name]
            self._optimizer.state[shard] = {
                "step": moments["step"].to(shard.device, copy=True),
                **{key: _shard_like(moments[key], self._trained[name]) for key in ("exp_avg", "exp_avg_sq")},
            }

    def bytes_per_step(self) -> int:
        if distributed.world_size() == 1 or self._active is None:
            return 0
        total = 0
        for module in self._modules:
            for group in _groups(module):
                gathers = 2 if group._reshard_after_forward and group.unshard_in_backward else 1
                for item in group.fsdp_params:
                    dtype = item.param_dtype or item.orig_dtype
                    total += gathers * self.accumulation * _padded(item.sharded_param) * dtype.itemsize
        for parameter in self._trained.values():
            total += _padded(parameter) * (self._reduce_dtype() or parameter.dtype).itemsize
        return total

    def memory(self) -> dict[str, int]:
        parameters = list(self.model.parameters())
        moments = [t for state in self._optimizer.state.values() for t in state.values() if t.dim()]
        gradients = [p.grad for p in parameters if p.grad is not None]
        if not gradients:  # between steps: what the reduction will leave here
            gradients = list(self._shards.values())
        return {
            "parameter_bytes": local_bytes(parameters),
            "gradient_bytes": local_bytes(gradients),
            "optimizer_state_bytes": local_bytes(moments),
        }

    def _reduce_dtype(self) -> torch.dtype | None:
        return _groups(self._modules[0])[0].mp_policy.reduce_dtype

    def _reshard(self) -> None:
        for module in self._modules:  # `reshard` does not go down by itself
            module.reshard()

    def _refuse_unsupported(self) -> None:
        for name, parameter in self.model.named_parameters():
            if not isinstance(parameter, DTensor):
                raise UserError(
                    f"parameter {name} lies outside of every fully_shard'ed module; call fully_shard on the root module"
                )
            if parameter.device_mesh.ndim != 1 or parameter.placements != (Shard(0),):
                raise UserError(
                    f"parameter {name} is placed as {parameter.placements} on a mesh of {parameter.device_mesh.ndim} "
                    "dimensions; tensor, pipeline, context-parallel and hybrid meshes are not supported: "
                    "use fully_shard over one data-parallel dimension"
                )
            if parameter.dtype not in (torch.float32, torch.float64):
                raise UserError(
                    f"parameter {name} is stored in {parameter.dtype}, which would round the updates away; load the "
                    "model with dtype=torch.float32 and pass fully_shard(..., mp_policy=MixedPrecisionPolicy("
                    "param_dtype=torch.bfloat16, reduce_dtype=torch.float32))"
                )
        for module in self._modules:
            for group in _groups(module):
                policy = group.mp_policy
                reduce_dtype = policy.reduce_dtype or policy.param_dtype
                if reduce_dtype not in (None, torch.float32, torch.float64):
                    raise UserError(
                        f"MixedPrecisionPolicy reduces gradients in {reduce_dtype}; set reduce_dtype=torch.float32"
                    )


def _groups(module: FSDPModule) -> list:
    """FSDP2's parameter groups of a module: private, and the only private names of FSDP2 that we touch.

    torch 2.13 has a list of them, torch 2.11 one.
    """
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    return groups if groups is not None else [g for g in [state._fsdp_param_group] if g is not None]


def _own_parameters(model: nn.Module, module: FSDPModule) -> set[str]:
    """Names of the parameters in `module`'s group: below it, and below no nearer FSDP module."""
    own = {id(item.sharded_param) for group in _groups(module) for item in group.fsdp_params}
    return {name for name, parameter in model.named_parameters() if id(parameter) in own}


def _local(tensor: Tensor) -> Tensor:
    detached = tensor.detach()
    return detached.to_local() if isinstance(detached, DTensor) else detached


def _whole(tensor: Tensor) -> Tensor:
    detached = tensor.detach()
    return detached.full_tensor() if isinstance(detached, DTensor) else detached


def _as_shard_of(parameter: Tensor, local: Tensor) -> DTensor:
    """`local` as this rank's part of a tensor that is placed like `parameter`."""
    assert isinstance(parameter, DTensor)
    return DTensor.from_local(
        local, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
    )


def _shard_like(tensor: Tensor, own: Tensor) -> Tensor:
    """This rank's part of the whole `tensor`, placed like `own`; nothing is sent."""
    tensor = tensor.to(device=own.device, dtype=own.dtype)
    if not isinstance(own, DTensor):
        return tensor
    return distribute_tensor(tensor, own.device_mesh, own.placements, src_data_rank=None).to_local().clone()


def _padded(parameter: Tensor) -> int:
    """Elements of a parameter whose rows are padded to a multiple of the ranks, as FSDP2 sends it."""
    rows = parameter.shape[0] if parameter.dim() else 1
    return parameter.numel() // max(rows, 1) * padded_numel(rows, distributed.world_size())
