"""The model of a config without its weights: all tensors on the meta device."""

from __future__ import annotations

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
from lwo_dist.methods import Method
from lwo_dist.models.gguf import is_gguf
from lwo_dist.models.hub import empty_model, one_line, read_settings, resolve
from lwo_dist.models.source import _enable_checkpointing

__all__ = ["made_fake", "read_architecture", "subject"]

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
