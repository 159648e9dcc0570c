"""This rank's part of sharded parameters, and helpers for FSDP2's private parameter groups."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from lwo_dist.errors import UserError
from lwo_dist.memory import padded_numel
from lwo_dist.names import named_parameters

__all__ = [
    "as_shard_of",
    "fsdp_groups",
    "local_shard",
    "mesh_of",
    "padded_rows",
    "refuse_uneven_division",
    "refuse_unsupported",
    "replace_shards",
    "shard_like",
    "whole_tensor",
]


_POLICY = "mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)"


def refuse_unsupported(model: nn.Module, groups: Iterable[Any]) -> None:
    """Refuse what `fsdp` cannot train exactly.

    Raises:
        UserError: unsharded parameters, a mesh other than (shard) or (replicate, shard), offload of
            a GPU's shards, a tied parameter in two groups, gradients reduced in 16 bits, or weights
            stored in 16 bits, unless in bf16 with a policy that computes in bf16.
    """
    for name, parameter in named_parameters(model).items():
        if not isinstance(parameter, DTensor):
            raise UserError(
                f"parameter {name} lies outside of every fully_shard'ed module; call fully_shard on"
                " the root module"
            )
        if parameter.placements not in ((Shard(0),), (Replicate(), Shard(0))):
            raise _unsupported_mesh(name, parameter)
    names = {id(parameter): name for name, parameter in named_parameters(model).items()}
    _refuse_untied(groups, names)
    for group in groups:
        policy = group.mp_policy
        if isinstance(group.offload_policy, CPUOffloadPolicy) and group.device.type != "cpu":
            raise UserError(
                "fully_shard was given a CPUOffloadPolicy, which is not supported: the optimizer"
                " works on shards that are on the device; leave offload_policy out"
            )
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
            if item.is_dtensor:  # before it was sharded: for tensor or expert parallelism
                raise _unsupported_mesh(names[id(item.sharded_param)], item.sharded_param)
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


def _refuse_untied(groups: Iterable[Any], names: Mapping[int, str]) -> None:
    first: dict[int, str] = {}
    for item in [item for group in groups for item in group.fsdp_params]:
        name = names[id(item.sharded_param)]
        same: int = getattr(item, "_orig_param_uid", id(item))  # not in torch 2.11
        if first.setdefault(same, name) != name:
            raise UserError(
                f"{first[same]} and {name} were one tied parameter, which fully_shard has split in"
                " two; wrap their modules together: fully_shard([module_a, module_b])"
            )


def _unsupported_mesh(name: str, parameter: DTensor) -> UserError:
    return UserError(
        f"parameter {name} is placed as {parameter.placements} on a mesh of"
        f" {parameter.device_mesh.ndim} dimensions; tensor, expert, pipeline and context-parallel"
        " meshes are not supported: use fully_shard over a data-parallel mesh (shard) or"
        " (replicate, shard), with each parameter split by rows"
    )


def mesh_of(model: nn.Module) -> DeviceMesh:
    """The mesh that all parameters are sharded over.

    Raises:
        UserError: there are several.
    """
    first: tuple[str, DeviceMesh] | None = None
    for name, parameter in named_parameters(model).items():
        assert isinstance(parameter, DTensor)
        mesh = parameter.device_mesh
        if first is None:
            first = name, mesh
        elif mesh is not first[1] and mesh.mesh.tolist() != first[1].mesh.tolist():
            raise UserError(
                f"parameter {first[0]} is sharded over the ranks {first[1].mesh.tolist()} and"
                f" {name} over {mesh.mesh.tolist()}; pass the same mesh to every fully_shard"
            )
    assert first is not None
    return first[1]


def refuse_uneven_division(groups: Iterable[Any]) -> None:
    """Raise UserError if gradients are divided by several factors: their norm has no meaning."""
    factors = {group.gradient_divide_factor: group for group in groups if group.fsdp_params}
    if len(factors) > 1:
        listed = ", ".join(str(factor or "the number of ranks") for factor in factors)
        raise UserError(
            f"gradients are divided by {listed}, depending on the module:"
            " set_gradient_divide_factor is not recursive; call it with one factor on every"
            " FSDPModule of the model"
        )


def fsdp_groups(modules: Iterable[FSDPModule]) -> list[Any]:
    """FSDP2's private parameter groups; modules that were wrapped as a list share one."""
    groups: dict[Any, None] = {}
    for module in modules:
        state = module._get_fsdp_state()
        if hasattr(state, "_fsdp_param_groups"):  # torch 2.11 has one at most
            groups |= dict.fromkeys(state._fsdp_param_groups)
        elif state._fsdp_param_group is not None:
            groups[state._fsdp_param_group] = None
    return list(groups)


@torch.no_grad()
def replace_shards(groups: Iterable[Any], shards: Mapping[nn.Parameter, Tensor]) -> None:
    """Replace the local shards of parameters, possibly with another dtype.

    Like `module.to(dtype)`, but for single parameters, which stay the same objects. FSDP2 must
    then be told their dtypes again (`_init_mp_dtypes`).
    """
    for item in [item for group in groups for item in group.fsdp_params]:
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
    """Elements of a parameter with rows padded to a multiple of the shards, as FSDP2 sends it."""
    assert isinstance(parameter, DTensor)
    rows = parameter.shape[0] if parameter.dim() else 1
    return parameter.numel() // max(rows, 1) * padded_numel(rows, parameter.device_mesh.shape[-1])
