"""What a strategy must do, and the parts that `replicate` and `fsdp` share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lwo_dist import distributed
from lwo_dist.layers import Layer

__all__ = ["MakeOptimizer", "Strategy", "Update", "update_shards"]

MakeOptimizer = Callable[[Sequence[Tensor]], torch.optim.Optimizer]
"""This rank's plain shards of the active layer -> an optimizer whose update is elementwise."""


@dataclass(frozen=True)
class Update:
    """The outcome of an optimizer step. The tensors are 0-dim and on the device: reading one synchronises."""

    grad_norm: Tensor
    """Norm of the active layer's gradient before clipping, over all ranks."""
    skipped: Tensor
    """1.0 where loss or norm was not finite and nothing was changed, else 0.0; equal on all ranks."""


class Strategy(ABC):
    """How a layer lives on the ranks. Everything that communicates is called by all ranks alike."""

    def __init__(self, model: nn.Module, layers: Sequence[Layer], accumulation: int):
        self.model = model
        self.layers = tuple(layers)
        self.accumulation = accumulation
        self._non_finite: Tensor | float = 0.0

    @abstractmethod
    def activate(self, layer: Layer, make_optimizer: MakeOptimizer) -> None:
        """Make `layer` the only trainable one, with a fresh optimizer for this rank's shards of it."""

    @abstractmethod
    def deactivate(self) -> None:
        """Drop the active layer's gradients and optimizer. Its weights stay exact."""

    def learning_rate(self, scheduled: float) -> float:
        """The rate of the coming step: ours, unless what the model is wrapped in has a scheduler of its own."""
        return scheduled

    def backward(self, loss: Tensor, boundary: bool) -> None:
        """Add this micro-batch's gradient; `boundary` says that `step` follows."""
        # 0 x loss is NaN exactly where the loss is not finite; it travels with the norm, at no further cost.
        self._non_finite = self._non_finite + 0.0 * loss.detach()
        (loss / self.accumulation if self.accumulation > 1 else loss).backward()

    @abstractmethod
    def step(self, lr: float, max_norm: float) -> Update:
        """Reduce, clip (0: do not), update, publish."""

    @abstractmethod
    def flush(self) -> None:
        """Finish pending work, so that the model's weights may be read or used."""

    @abstractmethod
    def read_layer(self, layer: Layer) -> dict[str, Tensor]:
        """Whole tensors on the CPU by name, exact (fp32 masters)."""

    @abstractmethod
    def write_layer(self, tensors: dict[str, Tensor]) -> None:
        """Set parameters or buffers from whole tensors, the same ones on every rank."""

    @abstractmethod
    def export_state(self) -> dict[str, dict[str, Tensor]]:
        """The active layer's moments as whole CPU tensors: name -> {exp_avg, exp_avg_sq, step}; {} when fresh."""

    @abstractmethod
    def import_state(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Put moments of `export_state` (of any strategy and world size) into the active layer's optimizer."""

    @abstractmethod
    def bytes_per_step(self) -> int:
        """Bytes of the weights and gradients in the collectives of one optimizer step (payload of whole tensors)."""

    @abstractmethod
    def memory(self) -> dict[str, int]:
        """This rank's `parameter_bytes`, `gradient_bytes`, `optimizer_state_bytes`, as held now."""

    def _take_non_finite(self) -> Tensor | float:
        value, self._non_finite = self._non_finite, 0.0
        return value


def update_shards(optimizer: torch.optim.Optimizer, lr: float, max_norm: float, non_finite: Tensor | float) -> Update:
    """Clip by the norm over all ranks and update this rank's shards; skip where the norm is not finite.

    The shards of all ranks together are the active layer, each element once. One scalar is sent. The host never
    waits: as under a GradScaler, the fused optimizer reads `found_inf` on the device and does nothing if it is 1.

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
