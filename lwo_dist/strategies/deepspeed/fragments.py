"""A rank's part of a parameter, wherever ZeRO cuts it: a flat tensor, and where it begins in the
flat parameter.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lwo_dist import distributed

from . import private as private

__all__ = ["Fragment", "own_storage", "put", "share", "slice_of", "total_numel", "whole"]

Fragment = tuple[Tensor, int]


def total_numel(parameter: Any) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def whole(parameter: Any, part: Fragment) -> Tensor:
    """Put the ranks' parts together: each element is one rank's, and zero on the others."""
    tensor, start = part
    flat = torch.zeros(total_numel(parameter), device=parameter.device)
    flat[start : start + tensor.numel()] = tensor.to(flat.device)
    return (
        distributed.all_reduce(flat)
        .view(getattr(parameter, "ds_shape", parameter.shape))
        .to("cpu", copy=True)
    )


def share(parameter: Any) -> Fragment:
    """This rank's part of a weight as it is stored while it is not active: stage 3's own, else an
    equal share.
    """
    stored, start = private.stored(parameter)
    if hasattr(parameter, "ds_id"):
        return stored, start
    size = -(-stored.numel() // distributed.world_size())
    start = min(distributed.rank() * size, stored.numel())
    return stored[start : start + size], start


def slice_of(parameter: Any, start: int, numel: int) -> Tensor:
    """`numel` elements of the stored weight from `start` on: all of them on this rank."""
    stored, offset = private.stored(parameter)
    return stored[start - offset :][:numel]


def put(part: Fragment, whole: Tensor) -> None:
    """Copy what `part` covers out of the whole tensor."""
    tensor, start = part
    tensor.copy_(whole.reshape(-1)[start : start + tensor.numel()])


@torch.no_grad()
def own_storage(parameters: Iterable[Any]) -> None:
    """Give each weight its own storage: a flat buffer of the whole model would live until the last
    weight left it.
    """
    for parameter in parameters:
        tensor = parameter.ds_tensor if hasattr(parameter, "ds_id") else parameter
        if tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size():
            tensor.data = tensor.data.clone()
