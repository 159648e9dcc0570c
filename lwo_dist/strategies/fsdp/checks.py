"""What `fsdp` cannot train exactly is refused by name before anything trains."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.tensor import DTensor, Replicate, Shard

from lwo_dist import distributed
from lwo_dist.errors import UserError
from lwo_dist.layers import Layer, parameter_depths
from lwo_dist.names import named_parameters

from .shards import has_all_reduce_hook, local_shard

__all__ = [
    "assert_same_on_mesh",
    "mesh_of",
    "refuse_depths",
    "refuse_uneven_division",
    "refuse_unsupported",
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


def mesh_of(model: nn.Module, groups: Iterable[Any]) -> DeviceMesh:
    """The mesh that all parameters are sharded over; warns if some ranks are not on it.

    There is no warning where a hook of the caller's reduces gradients further.

    Raises:
        UserError: there are several.
    """
    meshes: dict[str, tuple[str, DeviceMesh]] = {}
    for name, parameter in named_parameters(model).items():
        assert isinstance(parameter, DTensor)
        meshes.setdefault(str(parameter.device_mesh.mesh.tolist()), (name, parameter.device_mesh))
    if len(meshes) > 1:
        (one, (first, _)), (another, (second, _)) = list(meshes.items())[:2]
        raise UserError(
            f"parameter {first} is sharded over the ranks {one} and {second} over {another}; pass"
            " the same mesh to every fully_shard"
        )
    ranks, (_, mesh) = meshes.popitem()
    alone = mesh.size() < distributed.world_size() and not any(map(has_all_reduce_hook, groups))
    if alone and distributed.rank() == mesh.mesh.flatten()[0]:
        warnings.warn(
            f"the model is sharded over the ranks {ranks} of {distributed.world_size()}: they train"
            " it on their own, and share no gradients with the others; for one model on all ranks"
            " pass fully_shard a mesh of all, (shard) or (replicate, shard)",
            stacklevel=6,
        )
    return mesh


def assert_same_on_mesh(model: nn.Module, mesh: DeviceMesh) -> None:
    """Raise UserError if ranks have other buffers or shapes, or replicas other weights."""
    parameters = named_parameters(model)
    buffers = dict(model.named_buffers())
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    groups = mesh.get_all_groups()
    distributed.assert_same_on_all_ranks(
        {name: _hash(buffer) for name, buffer in buffers.items()} | shapes,
        "buffers or parameter shapes",
        groups,
    )
    if mesh.ndim > 1:
        shards = {name: _hash(local_shard(parameter)) for name, parameter in parameters.items()}
        of_replica = distributed.gather_objects(shards, groups[-1])
        whole = {name: [hashes[name] for hashes in of_replica] for name in shards}
        distributed.assert_same_on_all_ranks(whole, "initial weights", groups)


def _hash(tensor: Tensor) -> int:
    return int(torch.hash_tensor(tensor).item()) if tensor.numel() else 0


def refuse_depths(model: nn.Module, layers: Iterable[Layer]) -> None:
    """Raise UserError if a layer is used below its depth, where backward would not gather it."""
    depths = parameter_depths(model)
    for layer in layers:
        lowest = min(layer.parameter_names, key=depths.__getitem__)
        if depths[lowest] < layer.depth:
            raise UserError(
                f"layer {layer.name!r} has depth {layer.depth}, but its {lowest} is used at depth"
                f" {depths[lowest]}; give that, or 0, which is always right"
            )


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
