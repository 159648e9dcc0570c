"""The interface of a strategy, and the parts that `replicate` and `fsdp` share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from lwo_dist import distributed
from lwo_dist.config import Config, LWOConfig
from lwo_dist.layers import Layer, Visit
from lwo_dist.methods import Method

from .changes import KnownParameters
from .parks import HostParks

__all__ = [
    "MOMENTS",
    "MakeOptimizer",
    "ModelSource",
    "Moments",
    "Strategy",
    "StrategyBuilder",
    "Update",
    "mask_rows",
    "update_shards",
]

MOMENTS = ("exp_avg", "exp_avg_sq")
Moments = dict[str, dict[str, Tensor]]
"""Parameter name -> `exp_avg` and `exp_avg_sq`, shaped like the parameter, and the scalar `step`;
whole tensors on the CPU.
"""

MakeOptimizer = Callable[[Sequence[Sequence[Tensor]]], torch.optim.Optimizer]
"""Takes this rank's plain shards for each layer of a visit; returns an optimizer with one parameter
group per layer and an elementwise update.
"""


class ModelSource(Protocol):
    """Where a builder gets the model from, implemented in `lwo_dist.models.source`.

    Every method is a collective: an error on one rank is raised on all.
    """

    def whole(self, device: torch.device) -> Any:
        """The fp32 model on `device`, prepared by the method."""

    def empty(self) -> Any:
        """`whole` with the base model's parameters on the meta device; buffers are real."""

    def materialize(self, model: nn.Module, device: torch.device) -> None:
        """Allocate the meta tensors of a model from `empty`, without filling them."""

    def fill(self, model: nn.Module, device: torch.device) -> None:
        """Read this rank's rows of each parameter of a materialised, sharded model."""

    def fill_partitioned(
        self, model: nn.Module, device: torch.device, partition: Callable[[nn.Parameter], None]
    ) -> None:
        """Replace each parameter of an `empty` model by a whole one, which `partition` divides."""


class StrategyBuilder(ABC):
    """How a strategy is chosen, configured and built. Importing one needs only torch."""

    name: str
    """The name used in the config."""
    extras: tuple[str, ...] = ()
    """The extras of the package that it needs beyond torch."""
    own_settings: tuple[str, ...] = ()
    """Keys of the config that not every strategy reads, such as `fsdp.storage`."""
    updates_whole_layers = False
    """Whether it can update matrices from their whole gradients (`lwo.stateless`)."""
    updates_in_backward = False
    """Whether it can do so in the backward pass (`lwo.stateless_update: backward`)."""
    masks_rows = False
    """Whether its `step` can set rows of gradients to 0 (`Strategy.kept_rows`, `lwo.head_rows`)."""

    def drives(self, model: nn.Module) -> bool:
        """Whether this strategy can train a model that the caller has already wrapped."""
        return False

    def module(self, model: Any) -> nn.Module:
        """The module with the parameters, without the strategy's wrapper."""
        bare: nn.Module = model
        return bare

    def stores_16_bit(self, config: Config) -> bool:
        """Whether a run with this config stores inactive weights in 16 bits."""
        return False

    def check(self, config: Config) -> None:
        """Refuse run settings that cannot be honoured, before any worker starts.

        Raises:
            UserError: with the value, the rule and the remedy.
        """

    def resolve(self, config: Config) -> Config:
        """The config completed with everything the workers need, such as the contents of a file."""
        return config

    @abstractmethod
    def build(
        self, source: ModelSource, method: Method, config: Config, device: torch.device
    ) -> nn.Module:
        """Load and wrap the model of a run, ready for `attach`. A collective.

        Raises:
            UserError: on all ranks.
        """

    @abstractmethod
    def attach(self, model: nn.Module, layers: Sequence[Layer], config: LWOConfig) -> Strategy:
        """The strategy for a wrapped model.

        Raises:
            UserError: the model cannot be trained layer by layer, with reason and remedy.
        """


@dataclass(frozen=True)
class Update:
    """The result of an optimizer step.

    The tensors are 0-dim and on the device: reading one synchronises.
    """

    grad_norm: Tensor
    """Norm before clipping, over all ranks, of the gradient of the layers with optimizer state."""
    skipped: Tensor
    """1.0 if loss or norm was not finite and the step was skipped, else 0.0; equal on all ranks."""


class Strategy(ABC):
    """How a layer is distributed across ranks. Everything that communicates is called by all ranks.

    Layer moments are kept as flat `shards` in the strategy's own layout: this rank's part by key,
    with the same keys on every rank. Moments of the visit's layers are in its optimizer;
    those of other layers are parked.

    Attributes:
        module: the module with the parameters.
        forward_is_collective: if so, every rank must run the same number of forward passes.
        lr_in_backward: the rate of the step that the next `backward` belongs to; the hook sets it
            for `lwo.stateless_update: backward`.
        kept_rows: parameter name -> [rows], 1 where the next `step` uses a row of the gradient, 0
            where it counts as 0; equal on all ranks. The hook sets it for `lwo.head_rows: batch`.
    """

    forward_is_collective = False
    lr_in_backward = 0.0
    kept_rows: Mapping[str, Tensor] = {}

    def __init__(self, module: nn.Module, layers: Sequence[Layer], config: LWOConfig):
        self.module = module
        self.layers = tuple(layers)
        self._known = KnownParameters(module)
        self._keeps_moments = config.state == "keep"
        self._parks_masters = config.inactive_master == "host"
        self._parked_moments = HostParks()
        self._parked_masters = HostParks()
        self._staying: dict[str, dict[str, Tensor]] = {}  # moments, from one visit to the next
        self._visit: Visit | None = None
        self._non_finite: Tensor | float = 0.0

    # ---- a switch

    @abstractmethod
    def activate(self, visit: Visit, make_optimizer: MakeOptimizer) -> None:
        """Make only the layers of `visit` trainable, with an optimizer for their shards.

        The optimizer starts with a layer's parked moments, or with none.
        """

    @abstractmethod
    def deactivate(self, following: Visit | None = None) -> None:
        """Drop the visit's gradients and optimizer, after parking the moments that are kept.

        Its weights stay exact, unless they are stored in 16 bits and `inactive_master: discard` is
        set.

        Args:
            following: the visit that is activated next; moments that it needs can stay where they
                are.
        """

    def refuse_changes(self) -> None:
        """Raise RuntimeError if the visit's parameters are no longer those of the model.

        Called before each update; `refuse_any_change` before a visit.
        """
        assert self._visit is not None
        self._known.refuse_replaced(self._visit.parameter_names)

    def refuse_any_change(self) -> None:
        """Raise RuntimeError if the model no longer has the parameters it had at `attach`."""
        self._known.refuse_any_change()

    def prefetch(self, visit: Visit) -> None:
        """Start moving the next visit's parked tensors to the device."""
        for layer in visit.stateful:
            for parks in (self._parked_moments, self._parked_masters):
                parks.prefetch(layer.name, self._shard_device())

    def detach(self) -> None:
        """Leave the model as a plain training loop expects it.

        The hook calls it after `deactivate`, and after it has restored `requires_grad`.
        """

    @property
    def park_bytes(self) -> int:
        """Host memory used by this rank's parks."""
        return self._parked_moments.nbytes + self._parked_masters.nbytes

    @property
    def stores_16_bit(self) -> bool:
        """Whether inactive weights are stored in 16 bits, so that their fp32 masters are parked."""
        return False

    # ---- a step

    def learning_rate(self, scheduled: float) -> float:
        """The next step's rate: `scheduled`, unless the wrapped model has its own scheduler."""
        return scheduled

    def backward(self, loss: Tensor, boundary: bool) -> None:
        """Accumulate the gradient of `loss`; `boundary` means that `step` follows."""
        # 0 x loss is NaN exactly if the loss is not finite; it is sent with the norm at no extra
        # cost.
        self._non_finite = self._non_finite + 0.0 * loss.detach()
        loss.backward()

    @abstractmethod
    def step(self, lr: float, max_norm: float) -> Update:
        """Reduce gradients, clip them (0: no clipping), update, and publish the new weights."""

    def step_ahead(self, lr: float, max_norm: float) -> Update:
        """As `step`, but publishing may go on until the next forward pass needs the new weights.

        Until then, or until `flush`, a read of them gives NaN.
        """
        return self.step(lr, max_norm)

    @abstractmethod
    def flush(self) -> None:
        """Finish pending work, so that the model's weights can be read or used."""

    @abstractmethod
    def masters(self) -> list[Tensor]:
        """This rank's fp32 master shards of the active layer.

        Across ranks, or those of a replica, each element appears once; padding is zero.
        """

    # ---- what the ranks have in common

    def any_rank(self, mask: Tensor) -> Tensor:
        """Per element of a uint8 tensor, the maximum over the ranks that share a step."""
        for group in self._forward_groups():
            distributed.all_reduce_max(mask, group)
        return mask

    # ---- layers that a forward pass does not run (`batches: cycle`)

    def agree(self, *values: int) -> list[bool]:
        """For each value, whether the ranks that run a forward pass together have the same one.

        A collective if `forward_is_collective`; it waits for the device.
        """
        if not self.forward_is_collective:
            return [True] * len(values)
        rows = [[1, value, value**2] for value in values]
        device = next(self.module.parameters()).device
        sums = torch.tensor(rows, dtype=torch.float64, device=device)
        for group in self._forward_groups():
            distributed.all_reduce(sums, group)
        # Equal numbers alone have a variance of zero.
        return [ranks * squares == total**2 for ranks, total, squares in sums.tolist()]

    def _forward_groups(self) -> Sequence[ProcessGroup | None]:
        """The groups whose sums one after the other are those over all ranks of a forward pass."""
        return [None]

    def refuse_passing_over(self, layers: Sequence[nn.Module]) -> None:
        """Refuse a model of which a forward pass cannot leave some of these layers out.

        Raises:
            UserError: with reason and remedy.
        """

    def pass_over(self, layers: Sequence[nn.Module]) -> None:
        """The forward pass that follows does not run these layers. Called before each one."""

    # ---- weights and moments of any layer

    @abstractmethod
    def read_layer(self, layer: Layer) -> dict[str, Tensor]:
        """Whole tensors on the CPU by name: the exact fp32 masters."""

    @abstractmethod
    def write_layer(self, tensors: dict[str, Tensor]) -> None:
        """Set parameters or buffers from whole tensors; every rank passes the same ones."""

    def export_state(self, layer: Layer) -> Moments:
        """The moments of `layer`, active or not; {} if it has none."""
        if self._is_active(layer):
            shards = self._shards_of_optimizer(layer)
        else:
            shards = self._staying.get(layer.name) or self._parked_moments.get(layer.name)
        return self._whole_moments(layer, shards) if shards else {}

    def import_state(self, layer: Layer, state: Moments) -> None:
        """Replace the moments of `layer` with those of `export_state`; {} clears them.

        They may come from any strategy and world size. Moments of a layer outside the visit are
        parked, or dropped under `state: reset`.
        """
        self._staying.pop(layer.name, None)
        if self._is_active(layer):
            self._put_into_optimizer(layer, self._cut_moments(layer, state) if state else {})
        elif self._keeps_moments:
            self._parked_moments.drop(layer.name)
            self._parked_moments.put(layer.name, self._cut_moments(layer, state) if state else {})

    @abstractmethod
    def _shards_of_optimizer(self, layer: Layer) -> dict[str, Tensor]:
        """The moments of a layer in the visit; {} before its first step."""

    @abstractmethod
    def _put_into_optimizer(self, layer: Layer, shards: dict[str, Tensor]) -> None:
        """Set the moments of a layer in the visit to `shards`; {} resets them."""

    @abstractmethod
    def _whole_moments(self, layer: Layer, shards: dict[str, Tensor]) -> Moments:
        """Assemble the shards of all ranks. A collective."""

    @abstractmethod
    def _cut_moments(self, layer: Layer, state: Moments) -> dict[str, Tensor]:
        """This rank's shards of whole moments; no communication."""

    @abstractmethod
    def _shard_device(self) -> torch.device:
        """Where the optimizer's shards are."""

    def _is_active(self, layer: Layer) -> bool:
        return self._visit is not None and layer in self._visit.stateful

    def _park_moments(self, following: Visit | None, *, in_place: bool = True) -> None:
        """Keep the moments that outlive the visit: all with `state: keep`, else those of layers
        that both visits train alongside their active one.

        Args:
            in_place: moments that `following` needs stay on the device, and are not parked.
        """
        if self._visit is None:
            return
        kept = self._visit.stateful if self._keeps_moments else self._visit.also_in(following)
        for layer in kept:
            shards = self._shards_of_optimizer(layer)
            if in_place and following is not None and layer in following.stateful:
                self._staying[layer.name] = shards
            else:
                self._parked_moments.put(layer.name, shards)

    def _unpark_moments(self) -> None:
        assert self._visit is not None
        for layer in self._visit.stateful:
            shards = self._staying.pop(layer.name, None) or self._parked_moments.take(
                layer.name, self._shard_device()
            )
            if shards:
                self._put_into_optimizer(layer, shards)

    # ---- cost

    @abstractmethod
    def bytes_per_step(self) -> int:
        """Bytes of weights and gradients in a step's collectives, each as a whole tensor."""

    @abstractmethod
    def memory(self) -> dict[str, int]:
        """This rank's current `parameter_bytes`, `gradient_bytes`, `optimizer_state_bytes`,
        `park_bytes`.
        """

    def _take_non_finite(self) -> Tensor | float:
        value = self._non_finite
        self._non_finite = 0.0
        return value


def mask_rows(gradients: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> None:
    """Multiply each row of a gradient by its element of `kept`, in place; NaN stays NaN."""
    for name, mask in kept.items():
        gradient = gradients[name]
        rows = mask.to(gradient.device, gradient.dtype)
        gradient.mul_(rows.view(-1, *[1] * (gradient.dim() - 1)))


def update_shards(
    optimizer: torch.optim.Optimizer,
    lr: float,
    max_norm: float,
    non_finite: Tensor | float,
    sum_over_ranks: Callable[[Tensor], Tensor] = distributed.all_reduce,
) -> Update:
    """Clip by the norm over all ranks and update this rank's shards; skip if it is not finite.

    Across ranks the shards form the active layer, each element once. One scalar is sent. The host
    never waits: as under a GradScaler, the fused optimizer reads `found_inf` on the device and does
    nothing if it is 1.

    Args:
        optimizer: a fused AdamW over this rank's shards, with `.grad` set in the same dtype.
        max_norm: as in `torch.nn.utils.clip_grad_norm_`; 0 only measures the norm.
        non_finite: NaN if the loss was not finite, else 0.
        sum_over_ranks: of a scalar of each rank whose shards are part of the layer; every rank gets
            the same bits.
    """
    shards = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = [p.grad for p in shards]
    square = torch.stack(torch._foreach_norm(gradients)).square().sum() + non_finite
    norm = sum_over_ranks(square).sqrt()
    if max_norm > 0:
        torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    skipped = (~norm.isfinite()).to(torch.float32)
    optimizer.found_inf = skipped  # type: ignore[attr-defined]
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    return Update(norm, skipped)
