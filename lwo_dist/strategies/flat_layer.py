"""A layer that is trained as one flat tensor, of which each rank updates its part (`replicate`)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lwo_dist import distributed
from lwo_dist.layers import Layer

__all__ = ["FlatLayer"]


class FlatLayer:
    """A layer of the visit: its flat weights and gradient, and this rank's shard of each.

    The gradient has memory only from the moment that its first large part arrives until the update,
    so it is not there while activations are at their most.

    Args:
        weights: [numel], padded to a multiple of the world size; the parameters are views of it.
        views: parameter name -> the view of `gradient` that holds its gradient.
        owner: the rank whose shard is the whole layer; None: each rank has an equal part.
    """

    def __init__(
        self,
        layer: Layer,
        weights: Tensor,
        gradient: Tensor,
        views: dict[str, Tensor],
        owner: int | None = None,
    ):
        self.layer = layer
        self.weights = weights
        self.gradient = gradient
        self.gradient_views = views
        ends = [view.storage_offset() + view.numel() for view in views.values()]
        starts = [*(view.storage_offset() for view in views.values()), gradient.numel()][1:]
        self._padding = [gradient[a:b] for a, b in zip(ends, starts, strict=True) if a < b]
        self._gathering: dist.Work | None = None
        self.owner = owner
        numel = weights.numel() // distributed.world_size()
        start = distributed.rank() * numel
        if owner is not None:
            start, numel = 0, weights.numel() if owner == distributed.rank() else 0
        self.weight_shard = nn.Parameter(weights[start : start + numel])
        self.gradient_shard = gradient
        if distributed.world_size() > 1 and owner != distributed.rank():
            self.gradient_shard = torch.empty_like(self.weight_shard)
        self.weight_shard.grad = self.gradient_shard
        self.release_gradient()

    @cached_property
    def absent(self) -> Tensor:
        """What a read of the parameters gives while weights are on their way."""
        return self.weights.new_full((), torch.nan)

    @property
    def gradient_bytes(self) -> int:
        """What they take once they have memory."""
        shard = self.gradient_shard.nbytes if self.gradient_shard is not self.gradient else 0
        return self.gradient.nbytes + shard

    def take(self, view: Tensor, parameter: Tensor) -> None:
        """Move `.grad` into `view`, a part of the gradient, and make it that view."""
        assert parameter.grad is not None
        self._allocate()
        if parameter.grad.data_ptr() != view.data_ptr():
            view.copy_(parameter.grad)
            parameter.grad = view

    def _allocate(self) -> None:
        if _allocated(self.gradient):
            for padding in self._padding:  # it is part of the norm
                padding.zero_()

    def collect(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Move every `.grad` that is not there yet into its part of the gradient; drop them all.

        Had autograd accumulated into the gradient, it would have read and written it once more,
        after it had been set to zero.
        """
        self._allocate()
        views, gradients = [], []
        for name, view in self.gradient_views.items():
            gradient, parameters[name].grad = parameters[name].grad, None
            if gradient is None:
                view.zero_()
            elif gradient.data_ptr() != view.data_ptr():
                views.append(view)
                gradients.append(gradient)
        if views:
            torch._foreach_copy_(views, gradients)

    def release_gradient(self) -> None:
        for tensor in (self.gradient, self.gradient_shard):
            tensor.untyped_storage().resize_(0)

    def reduce(self) -> None:
        _allocated(self.gradient_shard)
        if self.owner is None:
            distributed.reduce_scatter(self.gradient_shard, self.gradient)
        else:
            distributed.reduce_to(self.gradient, self.owner)
        if distributed.world_size() > 1:
            self.gradient_shard.div_(distributed.world_size())

    def start_publishing(self) -> None:
        if self.owner is not None:
            self._gathering = distributed.start_broadcast(self.weights, self.owner)
            return
        self._gathering = distributed.start_all_gather(self.weights, self.weight_shard.detach())

    def finish_publishing(self) -> None:
        if self._gathering is not None:
            self._gathering.wait()
            self._gathering = None


def _allocated(tensor: Tensor) -> bool:
    """Give `tensor` its memory back; whether it had none."""
    storage = tensor.untyped_storage()
    if storage.nbytes():
        return False
    storage.resize_(tensor.nbytes)
    return True
