"""A method and a strategy of one's own: each a class that a config names as `tests.dummies:Class`.

The method trains a gain per layer that it adds to the model, at every step for the active layer and
all above it, beside the active layer's own weights: more than one layer moves, and the model is
changed before it is sharded. The strategy is DDP's way: whole gradients are summed, whole layers
are stepped on.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from lwo_dist import distributed
from lwo_dist.config import Config, LWOConfig
from lwo_dist.layers import Layer, Visit, find_layers, find_stacks
from lwo_dist.memory import local_bytes
from lwo_dist.methods import Method, Saved
from lwo_dist.strategies import Moments, Strategy, StrategyBuilder, Update
from lwo_dist.strategies.base import MOMENTS, MakeOptimizer, ModelSource


class Gains(Method):
    """Transformer layer i has its weights as `layer_i`, and its gain as `gain_i`."""

    name = "gains"
    changes_model = True
    rate_times_width = 0.6

    def prepare(self, model: nn.Module, config: Config) -> None:
        (stack,) = find_stacks(model)
        for layer in stack.modules:
            layer.register_parameter("gain", nn.Parameter(torch.ones(1)))
            layer.register_forward_hook(lambda module, inputs, output: output * module.gain)

    def layers(self, model: nn.Module, config: LWOConfig) -> list[Layer]:
        layers = []
        for layer in find_layers(model, train_embeddings=False, train_head=False):
            gain = next(name for name in layer.parameter_names if name.endswith(".gain"))
            others = tuple(name for name in layer.parameter_names if name != gain)
            layers.append(Layer(layer.name, others, layer.depth))
            layers.append(Layer(layer.name.replace("layer", "gain"), (gain,), layer.depth))
        return layers

    def visits(self, layers: Sequence[Layer]) -> list[Visit]:
        own = [layer for layer in layers if layer.name.startswith("layer")]
        gains = [layer for layer in layers if layer.name.startswith("gain")]
        return [Visit(layer, tuple(gains[i:])) for i, layer in enumerate(own)]

    def export(self, saved: Saved) -> Iterator[tuple[str, Tensor]]:
        return (pair for pair in super().export(saved) if not pair[0].endswith(".gain"))


class SummedBuilder(StrategyBuilder):
    name = "summed"

    def build(
        self, source: ModelSource, method: Method, config: Config, device: torch.device
    ) -> nn.Module:
        model: nn.Module = source.whole(device)
        return model

    def attach(self, model: nn.Module, layers: Sequence[Layer], config: LWOConfig) -> Strategy:
        return Summed(model, layers, config)


class Summed(Strategy):
    def __init__(self, model: nn.Module, layers: Sequence[Layer], config: LWOConfig):
        super().__init__(model, layers, config)
        self._parameters = dict(model.named_parameters())

    def activate(self, visit: Visit, make_optimizer: MakeOptimizer) -> None:
        for name, parameter in self._parameters.items():
            parameter.requires_grad_(name in visit.parameter_names)
        self._visit = visit
        self._optimizer = make_optimizer(
            [[self._parameters[name] for name in layer.parameter_names] for layer in visit.layers]
        )
        self._unpark_moments()

    def deactivate(self, following: Visit | None = None) -> None:
        self._park_moments(following)
        for parameter in self._parameters.values():
            parameter.grad = None
        self._visit = None

    def step(self, lr: float, max_norm: float) -> Update:
        trained = [p for group in self._optimizer.param_groups for p in group["params"]]
        for parameter in trained:
            distributed.all_reduce(parameter.grad).div_(distributed.world_size())
        norm = torch.nn.utils.clip_grad_norm_(trained, max_norm or float("inf"))
        norm = norm + self._take_non_finite()
        if norm.isfinite():
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            self._optimizer.step()
        self._optimizer.zero_grad()
        return Update(norm, (~norm.isfinite()).float())

    def flush(self) -> None:
        pass

    def masters(self) -> list[Tensor]:
        assert self._visit is not None
        mine = distributed.rank() == 0
        names = self._visit.active.parameter_names
        return [self._parameters[name].detach() for name in names] if mine else [torch.zeros(1)]

    def read_layer(self, layer: Layer) -> dict[str, Tensor]:
        own = self.module.state_dict(keep_vars=True)
        return {name: own[name].detach().clone() for name in layer.parameter_names}

    def write_layer(self, tensors: dict[str, Tensor]) -> None:
        own = self.module.state_dict(keep_vars=True)
        for name, tensor in tensors.items():
            own[name].detach().copy_(tensor)

    def _shards_of_optimizer(self, layer: Layer) -> dict[str, Tensor]:
        state = self._optimizer.state
        names = [name for name in layer.parameter_names if self._parameters[name] in state]
        keys = ("step", *MOMENTS)
        return {f"{n}.{key}": state[self._parameters[n]][key] for n in names for key in keys}

    def _put_into_optimizer(self, layer: Layer, shards: dict[str, Tensor]) -> None:
        for name in layer.parameter_names if shards else ():
            self._optimizer.state[self._parameters[name]] = {
                key: shards[f"{name}.{key}"].clone() for key in ("step", *MOMENTS)
            }

    def _whole_moments(self, layer: Layer, shards: dict[str, Tensor]) -> Moments:
        keys = ("step", *MOMENTS)
        return {n: {k: shards[f"{n}.{k}"].clone() for k in keys} for n in layer.parameter_names}

    def _cut_moments(self, layer: Layer, state: Moments) -> dict[str, Tensor]:
        return {f"{n}.{k}": t.clone() for n in state for k, t in state[n].items()}

    def _shard_device(self) -> torch.device:
        return torch.device("cpu")

    def bytes_per_step(self) -> int:
        assert self._visit is not None
        return sum(4 * self._parameters[name].numel() for name in self._visit.parameter_names)

    def memory(self) -> dict[str, int]:
        moments = [t for s in self._optimizer.state.values() for t in s.values() if t.dim()]
        return {
            "parameter_bytes": local_bytes(self.module.parameters()),
            "gradient_bytes": 0,
            "optimizer_state_bytes": local_bytes(moments),
            "park_bytes": self.park_bytes,
        }


class Dying(Method):
    """Its run dies without a word, as under a kernel that is out of memory."""

    name = "dying"
    rate_times_width = 0.6

    def prepare(self, model: nn.Module, config: Config) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def layers(self, model: nn.Module, config: LWOConfig) -> list[Layer]:
        return find_layers(model)
