"""A rank's part of a parameter as ZeRO divides it: a flat tensor and its offset."""

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
    """Assemble the ranks' parts; each element is held by one rank and zero on the others."""
    tensor, start = part
    flat = torch.zeros(total_numel(parameter), device=parameter.device)
    flat[start : start + tensor.numel()] = tensor.to(flat.device)
    return (
        distributed.all_reduce(flat)
        .view(getattr(parameter, "ds_shape", parameter.shape))
        .to("cpu", copy=True)
    )


def share(parameter: Any) -> Fragment:
    """This rank's part of an inactive weight: stage 3's own partition, otherwise an equal share."""
    stored, start = private.stored(parameter)
    if hasattr(parameter, "ds_id"):
        return stored, start
    size = -(-stored.numel() // distributed.world_size())
    start = min(distributed.rank() * size, stored.numel())
    return stored[start : start + size], start


def slice_of(parameter: Any, start: int, numel: int) -> Tensor:
    """`numel` elements of the stored weight from `start`; this rank must hold all of them."""
    stored, offset = private.stored(parameter)
    return stored[start - offset :][:numel]


def put(part: Fragment, whole: Tensor) -> None:
    """Copy the range that `part` covers from the whole tensor."""
    tensor, start = part
    tensor.copy_(whole.reshape(-1)[start : start + tensor.numel()])


@torch.no_grad()
def own_storage(parameters: Iterable[Any]) -> None:
    """Give each weight its own storage; a shared flat buffer would live as long as any of them."""
    for parameter in parameters:
        tensor = parameter.ds_tensor if hasattr(parameter, "ds_id") else parameter
        if tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size():
            tensor.data = tensor.data.clone()
