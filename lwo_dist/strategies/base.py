"""What a strategy must do, and the parts that `replicate` and `fsdp` share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lwo_dist import distributed
from lwo_dist.config import LWOConfig
from lwo_dist.layers import Layer

from .parks import HostParks

__all__ = ["MOMENTS", "MakeOptimizer", "Moments", "Strategy", "Update", "update_shards"]

MOMENTS = ("exp_avg", "exp_avg_sq")
Moments = dict[str, dict[str, Tensor]]
"""Parameter name -> `exp_avg` and `exp_avg_sq`, shaped like the parameter, and the scalar `step`;
whole, on the CPU.
"""

MakeOptimizer = Callable[[Sequence[Tensor]], torch.optim.Optimizer]
"""This rank's plain shards of the active layer -> an optimizer whose update is elementwise."""


@dataclass(frozen=True)
class Update:
    """The outcome of an optimizer step. The tensors are 0-dim and on the device: reading one
    synchronises.
    """

    grad_norm: Tensor
    """Norm of the active layer's gradient before clipping, over all ranks."""
    skipped: Tensor
    """1.0 where loss or norm was not finite and nothing was changed, else 0.0; equal on all ranks.
    """


class Strategy(ABC):
    """How a layer lives on the ranks. Everything that communicates is called by all ranks alike.

    A strategy knows a layer's moments as flat `shards` of its own making: this rank's part, key ->
    tensor, the same keys on every rank. Those of the active layer are its optimizer's, those of the
    others are parked.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Layer], config: LWOConfig):
        self.model = model
        self.layers = tuple(layers)
        self.accumulation = config.gradient_accumulation_steps
        self._keeps_moments = config.state == "keep"
        self._parks_masters = config.inactive_master == "host"
        self._parked_moments, self._parked_masters = HostParks(), HostParks()
        self._active: Layer | None = None
        self._non_finite: Tensor | float = 0.0

    # ---- a switch

    @abstractmethod
    def activate(self, layer: Layer, make_optimizer: MakeOptimizer) -> None:
        """Make `layer` the only trainable one, with an optimizer for this rank's shards of it.

        The optimizer is fresh, or has the moments that the layer has parked.
        """

    @abstractmethod
    def deactivate(self) -> None:
        """Drop the active layer's gradients and optimizer; park its moments first, if they are
        kept.

        Its weights stay exact, unless they are stored in 16 bits and `inactive_master: discard`
        gives that up.
        """

    def prefetch(self, layer: Layer) -> None:
        """`layer` is about to be activated: begin to bring its parks to where they will be
        needed.
        """
        for parks in (self._parked_moments, self._parked_masters):
            parks.prefetch(layer.name, self._shard_device())

    @property
    def park_bytes(self) -> int:
        """Host memory of this rank's parks."""
        return self._parked_moments.nbytes + self._parked_masters.nbytes

    @property
    def stores_16_bit(self) -> bool:
        """Weights are stored in 16 bits while they are not active, so that their fp32 masters must
        be parked.
        """
        return False

    # ---- a step

    def learning_rate(self, scheduled: float) -> float:
        """The rate of the coming step: ours, unless what the model is wrapped in has a scheduler of
        its own.
        """
        return scheduled

    def backward(self, loss: Tensor, boundary: bool) -> None:
        """Add this micro-batch's gradient; `boundary` says that `step` follows."""
        # 0 x loss is NaN exactly where the loss is not finite; it travels with the norm, at no
        # further cost.
        self._non_finite = self._non_finite + 0.0 * loss.detach()
        (loss / self.accumulation if self.accumulation > 1 else loss).backward()

    @abstractmethod
    def step(self, lr: float, max_norm: float) -> Update:
        """Reduce, clip (0: do not), update, publish."""

    @abstractmethod
    def flush(self) -> None:
        """Finish pending work, so that the model's weights may be read or used."""

    @abstractmethod
    def masters(self) -> list[Tensor]:
        """This rank's fp32 master shards of the active layer; over all ranks each element once,
        padding zero.
        """

    # ---- weights and moments of any layer

    @abstractmethod
    def read_layer(self, layer: Layer) -> dict[str, Tensor]:
        """Whole tensors on the CPU by name, exact (fp32 masters)."""

    @abstractmethod
    def write_layer(self, tensors: dict[str, Tensor]) -> None:
        """Set parameters or buffers from whole tensors, the same ones on every rank."""

    def export_state(self, layer: Layer) -> Moments:
        """The moments of `layer`, whether it is active or not; {} where it has none."""
        shards = (
            self._shards_of_optimizer()
            if layer == self._active
            else self._parked_moments.get(layer.name)
        )
        return self._whole_moments(layer, shards) if shards else {}

    def import_state(self, layer: Layer, state: Moments) -> None:
        """Put moments of `export_state` (of any strategy and world size) in place of what `layer`
        has; {}: none.

        Moments of a layer that is not active are parked, or dropped where `state: reset` will not
        ask for them.
        """
        if layer == self._active:
            self._put_into_optimizer(self._cut_moments(layer, state) if state else {})
        elif self._keeps_moments:
            self._parked_moments.drop(layer.name)
            self._parked_moments.put(layer.name, self._cut_moments(layer, state) if state else {})

    @abstractmethod
    def _shards_of_optimizer(self) -> dict[str, Tensor]:
        """The active layer's moments; {} before its first step."""

    @abstractmethod
    def _put_into_optimizer(self, shards: dict[str, Tensor]) -> None:
        """Make `shards` the active layer's moments; {} makes them fresh."""

    @abstractmethod
    def _whole_moments(self, layer: Layer, shards: dict[str, Tensor]) -> Moments:
        """Put the shards of all ranks together: a collective."""

    @abstractmethod
    def _cut_moments(self, layer: Layer, state: Moments) -> dict[str, Tensor]:
        """This rank's shards of whole moments; nothing is sent."""

    @abstractmethod
    def _shard_device(self) -> torch.device:
        """Where the optimizer's shards are."""

    def _park_moments(self) -> None:
        if self._keeps_moments and self._active is not None:
            self._parked_moments.put(self._active.name, self._shards_of_optimizer())

    def _unpark_moments(self) -> None:
        assert self._active is not None
        shards = self._parked_moments.take(self._active.name, self._shard_device())
        if shards:
            self._put_into_optimizer(shards)

    # ---- what it costs

    @abstractmethod
    def bytes_per_step(self) -> int:
        """Bytes of the weights and gradients in the collectives of one optimizer step (payload of
        whole tensors).
        """

    @abstractmethod
    def memory(self) -> dict[str, int]:
        """This rank's `parameter_bytes`, `gradient_bytes`, `optimizer_state_bytes`, `park_bytes`,
        as held now.
        """

    def _take_non_finite(self) -> Tensor | float:
        value, self._non_finite = self._non_finite, 0.0
        return value


def update_shards(
    optimizer: torch.optim.Optimizer, lr: float, max_norm: float, non_finite: Tensor | float
) -> Update:
    """Clip by the norm over all ranks and update this rank's shards; skip where the norm is not
    finite.

    The shards of all ranks together are the active layer, each element once. One scalar is sent.
    The host never waits: as under a GradScaler, the fused optimizer reads `found_inf` on the device
    and does nothing if it is 1.

    Args:
        optimizer: a fused AdamW over this rank's shards, their `.grad` set, equal in dtype.
        max_norm: as in `torch.nn.utils.clip_grad_norm_`; 0 measures and does not clip.
        non_finite: NaN if the loss was not finite, else 0.
    """
    shards = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = [p.grad for p in shards]
    square = torch.stack(torch._foreach_norm(gradients)).square().sum() + non_finite
    norm = distributed.all_reduce(square).sqrt()
    if max_norm > 0:
        torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    skipped = (~norm.isfinite()).to(torch.float32)
    optimizer.found_inf = skipped  # type: ignore[attr-defined]
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    return Update(norm, skipped)
