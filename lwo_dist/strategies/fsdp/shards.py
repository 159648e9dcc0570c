"""This rank's part of sharded parameters, and helpers for FSDP2's private parameter groups."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from lwo_dist.memory import padded_numel

__all__ = [
    "as_shard_of",
    "drop_whole_gradients",
    "fsdp_groups",
    "has_all_reduce_hook",
    "local_shard",
    "padded_rows",
    "replace_shards",
    "shard_like",
    "whole_tensor",
]


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


def has_all_reduce_hook(group: Any) -> bool:
    """Whether the caller reduces this group's gradients further (`set_all_reduce_hook`)."""
    return group._all_reduce_hook is not None


def drop_whole_gradients(groups: Iterable[Any]) -> None:
    """Drop what an unfinished accumulation has kept, which no reduction has turned into shards."""
    for item in [item for group in groups for item in group.fsdp_params]:
        item.unsharded_accumulated_grad = None
        if hasattr(item, "_unsharded_param"):  # gathered before
            item._unsharded_param.grad = None


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
