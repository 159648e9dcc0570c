"""This rank's part of sharded parameters, and helpers for FSDP2's private parameter groups."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from lwo_dist import distributed
from lwo_dist.errors import UserError
from lwo_dist.memory import padded_numel

__all__ = [
    "as_shard_of",
    "fsdp_groups",
    "local_shard",
    "own_parameters",
    "padded_rows",
    "refuse_unsupported",
    "replace_shards",
    "shard_like",
    "whole_tensor",
]


_POLICY = "mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)"


def refuse_unsupported(model: nn.Module, modules: Iterable[FSDPModule]) -> None:
    """Refuse what `fsdp` cannot train exactly.

    Raises:
        UserError: unsharded parameters, a mesh other than one data-parallel dimension, gradients
            reduced in 16 bits, or weights stored in 16 bits, unless in bf16 with a policy that
            computes in bf16.
    """
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, DTensor):
            raise UserError(
                f"parameter {name} lies outside of every fully_shard'ed module; call fully_shard on"
                " the root module"
            )
        if parameter.device_mesh.ndim != 1 or parameter.placements != (Shard(0),):
            raise UserError(
                f"parameter {name} is placed as {parameter.placements} on a mesh of"
                f" {parameter.device_mesh.ndim} dimensions; tensor, pipeline, context-parallel and"
                " hybrid meshes are not supported: use fully_shard over one data-parallel"
                " dimension"
            )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in [group for module in modules for group in fsdp_groups(module)]:
        policy = group.mp_policy
        masters = (torch.float32, torch.float64)
        if group.fsdp_params and (policy.reduce_dtype or policy.param_dtype) not in (
            None,
            *masters,
        ):
            raise UserError(
                "MixedPrecisionPolicy reduces gradients in"
                f" {policy.reduce_dtype or policy.param_dtype}; set reduce_dtype=torch.float32"
            )
        for item in group.fsdp_params:
            dtype = item.sharded_param.dtype
            cast = (
                dtype == policy.param_dtype == torch.bfloat16
                and policy.reduce_dtype == torch.float32
            )
            if dtype not in masters and not cast:
                raise UserError(
                    f"parameter {names[id(item.sharded_param)]} is stored in {dtype}, which would"
                    " round the updates away; load the model with dtype=torch.float32, or in bf16"
                    f" and pass fully_shard(..., {_POLICY})"
                )


def fsdp_groups(module: FSDPModule) -> list[Any]:
    """FSDP2's private parameter groups of a module: a list in torch 2.13, one in 2.11."""
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    return groups if groups is not None else [g for g in [state._fsdp_param_group] if g is not None]


def own_parameters(model: nn.Module, module: FSDPModule) -> set[str]:
    """Names of the parameters in `module`'s group: those whose nearest FSDP module is `module`."""
    own = {id(item.sharded_param) for group in fsdp_groups(module) for item in group.fsdp_params}
    return {name for name, parameter in model.named_parameters() if id(parameter) in own}


@torch.no_grad()
def replace_shards(modules: Iterable[FSDPModule], shards: Mapping[nn.Parameter, Tensor]) -> None:
    """Replace the local shards of parameters, possibly with another dtype.

    Like `module.to(dtype)`, but for single parameters, which stay the same objects. FSDP2 must
    then be told their dtypes again (`_init_mp_dtypes`).
    """
    for module in modules:
        for item in [item for group in fsdp_groups(module) for item in group.fsdp_params]:
            parameter = item.sharded_param
            if parameter in shards:
                new = as_shard_of(parameter, shards[parameter])
                torch.utils.swap_tensors(
                    parameter, nn.Parameter(new, requires_grad=parameter.requires_grad)
                )
                item.reset_sharded_param()


def local_shard(tensor: Tensor) -> Tensor:
    detached = tensor.detach()
    return detached.to_local() if isinstance(detached, DTensor) else detached


def whole_tensor(tensor: Tensor) -> Tensor:
    detached = tensor.detach()
    return detached.full_tensor() if isinstance(detached, DTensor) else detached


def as_shard_of(parameter: Tensor, local: Tensor) -> DTensor:
    """Wrap `local` as this rank's part of a tensor that is placed like `parameter`."""
    assert isinstance(parameter, DTensor)
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def shard_like(tensor: Tensor, own: Tensor, dtype: torch.dtype) -> Tensor:
    """This rank's part of the whole `tensor`, in `dtype`, placed like `own`; no communication."""
    tensor = tensor.to(device=own.device, dtype=dtype)
    if not isinstance(own, DTensor):
        return tensor
    return (
        distribute_tensor(tensor, own.device_mesh, own.placements, src_data_rank=None)
        .to_local()
        .clone()
    )


def padded_rows(parameter: Tensor) -> int:
    """Elements of a parameter with rows padded to a multiple of the ranks, as FSDP2 sends it."""
    rows = parameter.shape[0] if parameter.dim() else 1
    return parameter.numel() // max(rows, 1) * padded_numel(rows, distributed.world_size())
