"""The model of a config without its weights, all tensors on the meta device, and its visits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, Qwen2Config

from lwo_dist.config import Config
from lwo_dist.errors import UserError
from lwo_dist.examples.tiny_code import Recipe
from lwo_dist.extras import require
from lwo_dist.layers import Layer, Visit, find_stacks, first_depths, last_depths, separate_layers
from lwo_dist.methods import Method
from lwo_dist.models.gguf import is_gguf
from lwo_dist.models.hub import empty_model, one_line, read_settings, resolve
from lwo_dist.models.source import _enable_checkpointing
from lwo_dist.names import named_parameters

from .held import Shapes, shard_numel
from .peak import Unit
from .rehearsal import ROOT, Batch, Rehearsal, rehearse

__all__ = ["Subject", "made_fake", "read_architecture", "subject"]

_FILES = ["config.json", "generation_config.json", "*.py"]


def read_architecture(config: Config) -> tuple[Path, Any]:
    """The folder of `model.name`, and its config.json; no other file is read. Of a GGUF file: its
    header; of tiny-code: what it will be made of.

    Raises:
        UserError: no such model, or an unknown architecture.
    """
    name = config.model.name
    if name == "tiny-code":
        recipe = Recipe()
        return Path(), Qwen2Config(
            vocab_size=recipe.vocab_size,
            hidden_size=recipe.hidden_size,
            intermediate_size=recipe.intermediate_size,
            num_hidden_layers=recipe.num_hidden_layers,
            num_attention_heads=recipe.num_attention_heads,
            num_key_value_heads=recipe.num_key_value_heads,
            tie_word_embeddings=True,
        )
    if is_gguf(name):
        path = Path(name).expanduser().absolute()
        if not path.is_file():
            raise UserError(f"model.name {name!r} is not a file; give the path of a GGUF file")
        require("gguf", what=f"model.name {name!r}", otherwise="give a plain folder")
        with one_line(config.model, "GGUF header", "give a decoder that transformers reads"):
            settings = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        if hasattr(settings, "quantization_config"):
            del settings.quantization_config  # it is dequantised
        return path.parent, settings
    folder = resolve(config.model, _FILES)
    return folder, read_settings(config.model, folder)


def subject(
    config: Config, method: Method, folder: Path, architecture: Any, *, dtype: torch.dtype
) -> nn.Module:
    """The model with the method's changes, in training mode.

    Args:
        dtype: of the parameters, as the computation has them.

    Raises:
        UserError: the method refuses the model.
    """
    model = empty_model(config.model, folder, architecture)
    method.prepare(model, config)
    if config.train.gradient_checkpointing:
        _enable_checkpointing(model)
    model.config.get_text_config().use_cache = False
    # What is already on the meta device stays the same object, so tied weights stay tied.
    model._apply(_to_meta)
    if dtype != torch.float32:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
    trained: nn.Module = model.train()
    return trained


@torch.no_grad()
def made_fake(model: nn.Module) -> nn.Module:
    """`model` with fake tensors of a CPU in the place of its own: without memory, too, and what
    `torch.autocast` casts.
    """
    made: dict[int, torch.Tensor] = {}
    tensors: Any
    with FakeTensorMode():
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is None:
                        continue
                    if id(tensor) not in made:
                        fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                        is_parameter = isinstance(tensor, nn.Parameter)
                        made[id(tensor)] = nn.Parameter(fake) if is_parameter else fake
                    tensors[name] = made[id(tensor)]
    return model


def _to_meta(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.is_meta else tensor.to("meta")


class Subject:
    """A method's model and its visits; rehearses a visit once for each way to compute it."""

    def __init__(self, config: Config, method: Method, folder: Any, architecture: Any):
        self._arguments = (config, method, folder, architecture)
        self.method = method
        self.config = config
        self.model = subject(*self._arguments, dtype=torch.float32)
        self.layers: Sequence[Layer] = method.layers(self.model, config.lwo)
        self.visits: Sequence[Visit] = method.cycle(self.layers, config.lwo)
        self.shapes: Shapes = {
            name: tuple(p.shape) for name, p in named_parameters(self.model).items()
        }
        self._rehearsals: dict[Any, Rehearsal] = {}

    @cached_property
    def _in_bf16(self) -> nn.Module:
        return subject(*self._arguments, dtype=torch.bfloat16)

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())

    @cached_property
    def _for_autocast(self) -> nn.Module:
        return made_fake(subject(*self._arguments, dtype=torch.float32))

    def numel(self, layers: Sequence[Layer]) -> int:
        names = [name for layer in layers for name in layer.parameter_names]
        return sum(math.prod(self.shapes[name]) for name in names)

    @cached_property
    def samples(self) -> list[int]:
        """Visits that are rehearsed: of the lowest and the highest layer of each stack, of what is
        outside, and of the largest. Those between need no more, and their FLOPs lie on a line.
        """
        if len(self.visits) <= 4:
            return list(range(len(self.visits)))
        ends = {
            depth
            for stack in find_stacks(self.model)
            for depth in stack.depths[:: len(stack.depths) - 1 or 1]
        }
        inside = {depth for stack in find_stacks(self.model) for depth in stack.depths}
        chosen = {
            number
            for number, visit in enumerate(self.visits)
            if visit.depth in ends or visit.depth not in inside
        }
        chosen |= {0, len(self.visits) - 1}
        sizes = [self.numel(visit.layers) for visit in self.visits]
        chosen |= {sizes.index(max(sizes))}
        # Where every visit goes down to the lowest layer (`lwo.stateless: all`), many are alike.
        alike: dict[tuple[int, int, int], int] = {}
        for number in sorted(chosen):
            visit = self.visits[number]
            alike.setdefault((visit.depth, sizes[number], self.numel(visit.stateful)), number)
        return sorted({0, len(self.visits) - 1, *alike.values()})

    def following(self, number: int) -> list[tuple[Layer, ...]]:
        """The layers with optimizer state of each visit that may come after visit `number`."""
        step = {"ascending": 1, "descending": -1}.get(self.config.lwo.order)
        count = len(self.visits)
        numbers = range(count) if step is None else [(number + step) % count]
        return [self.visits[n].stateful for n in numbers]

    def rehearse(
        self,
        visit: Visit,
        batch: Batch,
        *,
        bf16: bool,
        autocast: bool,
        own_gradients: bool,
        on_gpu: bool,
    ) -> Rehearsal:
        used_up = {name for layer in self._used_up(visit) for name in layer.parameter_names}
        key = (visit.active.name, batch, bf16, autocast, own_gradients, on_gpu)
        if key not in self._rehearsals:
            model = self._in_bf16 if bf16 else self._for_autocast if autocast else self.model
            self._rehearsals[key] = rehearse(
                model,
                separate_layers(model),
                set(visit.parameter_names),
                batch,
                own_gradients=own_gradients,
                used_up=used_up,
                autocast=autocast,
                fused_dropout=on_gpu,
            )
        return self._rehearsals[key]

    def _used_up(self, visit: Visit) -> tuple[Layer, ...]:
        """The layers whose gradients are gone before the backward pass is over."""
        return visit.stateless if self.config.lwo.stateless_update == "backward" else ()

    def units(self, visit: Visit) -> dict[int, Unit]:
        kept = [layer for layer in visit.layers if layer not in self._used_up(visit)]
        trained = {name for layer in kept for name in layer.parameter_names}
        names = {id(p): name for name, p in named_parameters(self.model).items()}
        modules = separate_layers(self.model)
        inside: set[int] = set()
        units = {}
        for number, module in enumerate(modules):
            own = {id(p): names[id(p)] for p in module.parameters()}
            inside |= own.keys()
            units[number] = self._unit(list(own.values()), trained, number + 1 >= visit.depth)
        rest = [name for key, name in names.items() if key not in inside]
        return {**units, ROOT: self._unit(rest, trained, True)}

    def gathered_again(self, visit: Visit, world_size: int) -> int:
        """Elements that ZeRO-3 gathers once more in the first step of a visit: before it has seen a
        step it lets go of weights between their uses, also between forward and backward.
        """
        modules = separate_layers(self.model)
        inside = {id(p) for module in modules for p in module.parameters()}
        passed = modules[max(0, visit.depth - 1) :]  # by backward
        twice = {id(p) for module in passed for p in module.parameters()}
        first, last = first_depths(self.model), last_depths(self.model)
        top = max(last.values())
        numel = 0
        for name, parameter in named_parameters(self.model).items():
            embeds, heads = first[name] == 0, last[name] == top
            uses = int(id(parameter) in twice)
            if id(parameter) not in inside:
                uses = heads + (embeds and name in visit.parameter_names) + (embeds and heads)
            numel += uses * world_size * shard_numel(parameter.shape, world_size)
        return numel

    def _unit(self, names: Sequence[str], trained: set[str], in_backward: bool) -> Unit:
        return Unit(
            tuple(tuple(self.shapes[name]) for name in names),
            tuple(tuple(self.shapes[name]) for name in names if name in trained),
            in_backward,
        )
