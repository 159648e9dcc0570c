"""FSDP2: every layer's weights are sharded across ranks, and gathered for compute.

FSDP2 reduces only gradients of trainable parameters and takes `requires_grad` from the sharded
parameter at each gather, so a switch does not rebuild anything. The optimizer works on the plain
local shards, which are the fp32 masters. If the weights are stored in bf16, the active layer's are
cast to fp32 for the duration of its visit.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from lwo_dist import distributed
from lwo_dist.config import LWOConfig
from lwo_dist.errors import UserError
from lwo_dist.layers import Layer, Visit, last_depths
from lwo_dist.memory import local_bytes
from lwo_dist.names import named_parameters, named_tensors
from lwo_dist.orthogonal import update_without_state
from lwo_dist.strategies.base import (
    MOMENTS,
    MakeOptimizer,
    Moments,
    Strategy,
    Update,
    mask_rows,
    update_shards,
)
from lwo_dist.strategies.changes import KnownParameters, changed
from lwo_dist.strategies.parks import join, split

from .checks import (
    assert_same_on_mesh,
    mesh_of,
    refuse_depths,
    refuse_uneven_division,
    refuse_unsupported,
)
from .matrices import exchanged_numel, orthogonalise_shards
from .shards import (
    as_shard_of,
    drop_whole_gradients,
    fsdp_groups,
    has_all_reduce_hook,
    local_shard,
    padded_rows,
    replace_shards,
    shard_like,
    whole_tensor,
)

__all__ = ["FullyShard"]


_SET = ("unshard_in_backward", "reduce_scatter_unused_params")  # of a group, at each switch


class FullyShard(Strategy):
    """LWO on a `fully_shard`ed model, wrapped by us or by the caller."""

    forward_is_collective = True

    def __init__(self, model: nn.Module, layers: Sequence[Layer], config: LWOConfig):
        super().__init__(model, layers, config)
        self._modules = [m for m in model.modules() if isinstance(m, FSDPModule)]
        self._groups = fsdp_groups(self._modules)
        # Those of the caller, for `detach`. torch 2.11 has no `reduce_scatter_unused_params`.
        self._own = [{name: getattr(g, name, False) for name in _SET} for g in self._groups]
        self._reshard()
        for item in [item for group in self._groups for item in group.fsdp_params]:
            item.reset_sharded_param()  # a model sharded at load has other parameters since
        self._known = KnownParameters(model)
        refuse_unsupported(model, self._groups)
        # If every layer's backward must reach the bottom (`full`), there is never a frozen prefix,
        # with or without a stack.
        self._depths: dict[str, int] = {}
        if any(layer.depth for layer in layers):
            self._depths = last_depths(model)
            refuse_depths(model, layers)
        refuse_uneven_division(self._groups)
        self._mesh = mesh_of(model, self._groups)
        self._replicas = self._mesh.size() // self._mesh.shape[-1]
        assert_same_on_mesh(model, self._mesh)
        self._weight_decay = config.weight_decay
        if config.head_rows == "batch":
            self._refuse_unknown_tokens()
        self._layer_of = {name: layer.name for layer in layers for name in layer.parameter_names}
        self._stored = {name: p.dtype for name, p in named_parameters(model).items()}
        self._below: list[Any] = []  # handles of hooks
        self._after_forward: dict[Any, Any] = {}  # what the caller chose for groups of the prefix
        self._trained: dict[str, nn.Parameter] = {}
        self._shards: dict[str, nn.Parameter] = {}
        self._stateless: list[str] = []  # parameters of layers without optimizer state
        self._micro_batches = 0
        self._micro_batches_of_step = 1
        self._passed_over: list[Any] = []  # groups that this forward pass does not gather
        self._not_gathered = 0  # bytes, in the micro-batches so far
        self._not_gathered_in_step = 0

    # [Note: The switch sequence]
    # A switch happens only between optimizer steps, and starts with a reshard: after a forward
    # without backward (evaluation) the root stays gathered, `parameters()` are then temporaries,
    # and a flag set on them is silently lost. The flags are set on the sharded parameters; the
    # dtypes of newly trainable groups are set, because FSDP2 determines them once and ignores
    # frozen parameters; and the groups of the prefix are marked as not needed in backward, as
    # otherwise the prefetch gathers one of them for nothing. A group is needed for the last use of
    # any of its parameters: a tied matrix is below and above the stack. What is not needed is
    # resharded right after its forward, also where the caller chose to keep it for backward; the
    # root is left as FSDP2 has it, which decides at the first forward.
    def activate(self, visit: Visit, make_optimizer: MakeOptimizer) -> None:
        self._reshard()
        parameters = named_parameters(self.module)
        trained = set(visit.parameter_names)
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in trained)
        self._trained = {name: parameters[name] for name in visit.parameter_names}
        for layer in visit.layers:
            self._cast_to_masters(layer)
        needed = {
            parameter
            for name, parameter in parameters.items()
            if self._depths.get(name, visit.depth) >= visit.depth or name in trained
        }
        roots = fsdp_groups(self._modules[:1])
        for group in self._groups:
            own = {item.sharded_param for item in group.fsdp_params}
            group.unshard_in_backward = not needed.isdisjoint(own)
            if group in self._after_forward:
                group.post_forward_mesh_info = self._after_forward.pop(group)
            if not group.unshard_in_backward and group not in roots:
                self._after_forward[group] = group.post_forward_mesh_info
                group.post_forward_mesh_info = group.mesh_info
            # Zeros for an expert that no token of this rank reaches: the ranks' gradients are sent
            # one after the other, and would be summed with those of other experts.
            group.reduce_scatter_unused_params = not own.isdisjoint(self._trained.values())
            group._init_mp_dtypes()
        self._below = [
            module.register_forward_hook(_keep_for_backward)
            for module in self._modules[1:]
            if not all(group.unshard_in_backward for group in fsdp_groups([module]))
        ]
        self._visit = visit
        # Empty if a parameter has fewer rows than there are ranks, so that every rank goes through
        # the same steps.
        self._shards = {
            name: nn.Parameter(local_shard(parameter)) for name, parameter in self._trained.items()
        }
        self._stateless = [name for layer in visit.stateless for name in layer.parameter_names]
        self._optimizer = make_optimizer(
            [[self._shards[name] for name in layer.parameter_names] for layer in visit.stateful]
        )
        self._unpark_moments()

    def refuse_changes(self) -> None:
        # The modules may have gathered parameters now, so FSDP2's own record is looked at.
        own = {item.sharded_param for group in self._groups for item in group.fsdp_params}
        for name, parameter in self._trained.items():
            if parameter not in own:
                raise changed(f"{name} was replaced")
            if local_shard(parameter).data_ptr() != self._shards[name].data_ptr():
                raise changed(f"{name} was moved")

    def refuse_any_change(self) -> None:
        self._reshard()
        super().refuse_any_change()

    def deactivate(self, following: Visit | None = None) -> None:
        if self._visit is None:
            return
        self._reshard()
        for parameter in self._trained.values():
            parameter.grad = None
        drop_whole_gradients(self._groups)
        for handle in self._below:
            handle.remove()
        self._park_moments(following)
        del self._optimizer
        self._shards = {}
        for layer in self._visit.layers:
            self._cast_to_storage(layer)
        self._trained = {}
        self._visit = None

    def detach(self) -> None:
        self._reshard()
        for group, own in zip(self._groups, self._own, strict=True):
            for name, value in own.items():
                setattr(group, name, value)
            if group in self._after_forward:
                group.post_forward_mesh_info = self._after_forward.pop(group)
            group._init_mp_dtypes()
        root = self.module
        assert isinstance(root, FSDPModule)
        root.set_requires_gradient_sync(True)

    def backward(self, loss: Tensor, boundary: bool) -> None:
        root = self.module
        assert isinstance(root, FSDPModule)
        # Inside an accumulation each rank keeps the whole gradient, which is reduced once.
        root.set_requires_gradient_sync(boundary)
        root.set_is_last_backward(True)
        refuse_uneven_division(self._groups)
        self._micro_batches += 1
        self._not_gathered += sum(_gathered_bytes(group) for group in self._passed_over)
        super().backward(loss, boundary)

    def step(self, lr: float, max_norm: float) -> Update:
        self._reshard()  # or forward would use the old weights, after set_reshard_after_backward
        gradient_of: dict[str, Tensor] = {}
        for name, shard in self._shards.items():
            whole = self._trained[name].grad
            gradient = local_shard(whole) if whole is not None else torch.zeros_like(shard)
            shard.grad = gradient_of[name] = gradient
        mask_rows(gradient_of, self._rows_of_shards())
        non_finite = self._take_non_finite()
        if any(map(has_all_reduce_hook, self._groups)):
            non_finite = 0.0  # of ranks of this mesh only; the gradients are those of all
        gradients = [gradient_of[name] for name in self._stateless]
        if gradients:
            non_finite = non_finite + 0.0 * torch.stack(torch._foreach_norm(gradients)).sum()
        update = update_shards(self._optimizer, lr, max_norm, non_finite, self._sum_over_mesh)
        if gradients:
            update_without_state(
                [self._shards[name] for name in self._stateless],
                gradients,
                lr,
                self._weight_decay,
                update.skipped,
                shapes=[self._trained[name].shape for name in self._stateless],
                orthogonalised=partial(orthogonalise_shards, group=self._mesh.get_all_groups()[-1]),
            )
        for name, shard in self._shards.items():
            shard.grad = None
            self._trained[name].grad = None
        self._micro_batches_of_step = self._micro_batches
        self._micro_batches = 0
        self._not_gathered_in_step = self._not_gathered
        self._not_gathered = 0
        return update

    def _refuse_unknown_tokens(self) -> None:
        if any(map(has_all_reduce_hook, self._groups)):
            raise UserError(
                "head_rows: batch cannot be used with set_all_reduce_hook, as the tokens of ranks"
                " outside of the mesh are not known; set head_rows: all"
            )

    def _rows_of_shards(self) -> dict[str, Tensor]:
        """Of `kept_rows`, those of this rank's shards."""
        if self.kept_rows:
            self._refuse_unknown_tokens()
        return {
            name: shard_like(rows, self._trained[name], rows.dtype)
            for name, rows in self.kept_rows.items()
        }

    def flush(self) -> None:
        """Reshard: a forward without backward leaves the root gathered."""
        self._reshard()

    def masters(self) -> list[Tensor]:
        assert self._visit is not None
        return [self._shards[name].detach() for name in self._visit.active.parameter_names]

    def read_layer(self, layer: Layer) -> dict[str, Tensor]:
        self._reshard()
        own = named_tensors(self.module)
        parked = self._parked_masters.get(layer.name)
        read = {}
        for name in layer.parameter_names:
            tensor = own[name]
            if tensor.dtype == torch.bfloat16 and isinstance(tensor, DTensor):
                tensor = as_shard_of(tensor, _master(name, local_shard(tensor), parked))
            read[name] = whole_tensor(tensor).to("cpu", copy=True)
        return read

    def write_layer(self, tensors: dict[str, Tensor]) -> None:
        self._reshard()
        own = named_tensors(self.module)
        for name, tensor in tensors.items():
            target = own[name]
            master = shard_like(tensor, target, self._master_dtype(name, target))
            local_shard(target).copy_(master)
            if master.dtype != target.dtype and name in self._layer_of:
                self._park_master(self._layer_of[name], {name: master})

    # ---- moments

    def _shards_of_optimizer(self, layer: Layer) -> dict[str, Tensor]:
        state = self._optimizer.state
        names = [name for name in layer.parameter_names if self._shards[name] in state]
        return {
            f"{name}.{key}": state[self._shards[name]][key]
            for name in names
            for key in ("step", *MOMENTS)
        }

    def _put_into_optimizer(self, layer: Layer, shards: dict[str, Tensor]) -> None:
        for name in layer.parameter_names:
            shard = self._shards[name]
            self._optimizer.state.pop(shard, None)
            if shards:
                self._optimizer.state[shard] = {
                    key: shards[f"{name}.{key}"].to(shard.device) for key in ("step", *MOMENTS)
                }

    def _whole_moments(self, layer: Layer, shards: dict[str, Tensor]) -> Moments:
        self._reshard()
        parameters = named_parameters(self.module)
        exported = {}
        for name in layer.parameter_names:
            exported[name] = {"step": shards[f"{name}.step"].to("cpu", copy=True)}
            for key in MOMENTS:
                shard = shards[f"{name}.{key}"].to(self._shard_device())
                exported[name][key] = whole_tensor(as_shard_of(parameters[name], shard)).to(
                    "cpu", copy=True
                )
        return exported

    def _cut_moments(self, layer: Layer, state: Moments) -> dict[str, Tensor]:
        self._reshard()
        parameters = named_parameters(self.module)
        shards = {}
        for name in layer.parameter_names:
            own = parameters[name]
            moments = state[name]
            shards[f"{name}.step"] = moments["step"].clone()
            for key in MOMENTS:
                shards[f"{name}.{key}"] = shard_like(
                    moments[key], own, self._master_dtype(name, own)
                )
        return shards

    def _shard_device(self) -> torch.device:
        return next(self.module.parameters()).device

    # ---- 16-bit storage

    @property
    def stores_16_bit(self) -> bool:
        return any(self._stored[name] == torch.bfloat16 for name in self._layer_of)

    def _master_dtype(self, name: str, own: Tensor) -> torch.dtype:
        return torch.float32 if self._stored.get(name) == torch.bfloat16 else own.dtype

    def _cast_to_masters(self, layer: Layer) -> None:
        parked = self._parked_masters.take(layer.name, self._shard_device())
        shards = {}
        for name in layer.parameter_names:
            parameter = self._trained[name]
            if parameter.dtype == torch.bfloat16:
                shards[parameter] = _master(name, local_shard(parameter), parked)
        replace_shards(self._groups, shards)

    def _cast_to_storage(self, layer: Layer) -> None:
        masters = {
            name: local_shard(self._trained[name])
            for name in layer.parameter_names
            if self._stored[name] == torch.bfloat16
        }
        self._park_master(layer.name, masters)
        replace_shards(
            self._groups,
            {self._trained[name]: m.to(torch.bfloat16) for name, m in masters.items()},
        )

    def _park_master(self, layer: str, masters: dict[str, Tensor]) -> None:
        """Park the bits of this rank's `masters` lost in rounding to bf16."""
        if self._parks_masters and masters:
            lacking: dict[str, Tensor] = {}
            for name, master in masters.items():
                lacking[f"{name}.low"], lacking[f"{name}.halfway"] = split(master)
            self._parked_masters.put(layer, lacking)

    def bytes_per_step(self) -> int:
        if self._visit is None:
            return 0
        shards = self._mesh.shape[-1]
        trained = {id(parameter) for parameter in self._trained.values()}
        gathered = reduced = 0
        for group in self._groups:
            gathers = 2 if group._reshard_after_forward and group.unshard_in_backward else 1
            gathered += gathers * self._micro_batches_of_step * _gathered_bytes(group)
            for item in group.fsdp_params:
                if id(item.sharded_param) in trained:
                    dtype = group.mp_policy.reduce_dtype or item.sharded_param.dtype
                    reduced += padded_rows(item.sharded_param) * dtype.itemsize
        gathered -= self._not_gathered_in_step
        exchanged = exchanged_numel([self._trained[name].shape for name in self._stateless], shards)
        exchanged *= next(iter(self._shards.values())).dtype.itemsize
        sent = gathered + reduced + exchanged if shards > 1 else 0
        # The replicas sum each shard of the gradient.
        return sent + reduced // shards if self._replicas > 1 else sent

    def refuse_passing_over(self, layers: Sequence[nn.Module]) -> None:
        for index, layer in enumerate(layers):
            for part in layer.modules():
                if isinstance(part, FSDPModule) and len(part._get_fsdp_state()._modules) > 1:
                    raise UserError(
                        f"layer {index} was wrapped in a list, fully_shard([...]), which gathers"
                        " all of its modules at once; lwo.batches: cycle passes over single layers:"
                        " wrap each on its own, or set lwo.batches: fresh"
                    )

    def pass_over(self, layers: Sequence[nn.Module]) -> None:
        parts = [part for layer in layers for part in layer.modules()]
        self._passed_over = fsdp_groups(part for part in parts if isinstance(part, FSDPModule))

    def _forward_groups(self) -> Sequence[ProcessGroup]:
        return self._mesh.get_all_groups()

    def memory(self) -> dict[str, int]:
        parameters = list(self.module.parameters())
        moments = [t for state in self._optimizer.state.values() for t in state.values() if t.dim()]
        gradients = [p.grad for p in parameters if p.grad is not None]
        if not gradients:  # between steps: the size that the reduction will produce
            gradients = list(self._shards.values())
        return {
            "parameter_bytes": local_bytes(parameters),
            "gradient_bytes": local_bytes(gradients),
            "optimizer_state_bytes": local_bytes(moments),
            "park_bytes": self.park_bytes,
        }

    def _reshard(self) -> None:
        for module in self._modules:  # `reshard` is not recursive
            module.reshard()

    # ---- the ranks

    def _sum_over_mesh(self, tensor: Tensor) -> Tensor:
        """Sum a scalar over the shards; replicas hold the same ones, which count once."""
        for group in self._mesh.get_all_groups():
            distributed.all_reduce(tensor, group)
        return tensor / self._replicas


def _gathered_bytes(group: Any) -> int:
    """Bytes of the whole weights of one all-gather."""
    return sum(
        padded_rows(item.sharded_param) * (item.param_dtype or item.orig_dtype).itemsize
        for item in group.fsdp_params
    )


def _keep_for_backward(module: nn.Module, _: Any, output: Any) -> None:
    """For a layer below the active one whose output requires a gradient all the same: under
    activation checkpointing T5 makes a bias of zeros that does.
    """
    assert isinstance(module, FSDPModule)
    if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(output)):
        for group in fsdp_groups([module]):
            group.unshard_in_backward = True


def _master(name: str, weight: Tensor, parked: dict[str, Tensor]) -> Tensor:
    """The fp32 master of this rank's bf16 shard `weight`; exact if its low bits are parked."""
    if f"{name}.low" not in parked:
        return weight.float()
    return join(
        weight, parked[f"{name}.low"].to(weight.device), parked[f"{name}.halfway"].to(weight.device)
    )
