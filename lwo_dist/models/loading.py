"""A folder or a Hugging Face id becomes a tokenizer and a model; under `fsdp` no rank ever holds
the whole model.

Weights are fp32 whatever the checkpoint holds, because they are the masters that the optimizer
steps on, and compute has its own dtype; `fsdp.storage: bf16` asks for less. What one rank refuses
all refuse: the others would wait for it until the collectives time out.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.initialization import no_init_weights

from lwo_dist.config import ModelConfig, TrainConfig
from lwo_dist.errors import UserError
from lwo_dist.strategies.fsdp import strategy as fsdp

from . import weights
from .hub import on_all_ranks, one_line, read_settings, resolve, whole_model

__all__ = ["load_model", "load_tokenizer"]

_SETTINGS = ["*.json", "*.jinja", "*.model", "*.py", "*.tiktoken", "*.txt"]
_SAVE_TOKENIZER = "save one there with tokenizer.save_pretrained(folder)"


def load_tokenizer(config: ModelConfig) -> Any:
    """The model's tokenizer, a `PreTrainedTokenizerBase`, as it was saved. No collective: any
    process may call it.

    Raises:
        UserError: no such folder or id, the hub cannot be reached, or it has no tokenizer.
    """
    folder = resolve(config, _SETTINGS)
    if not any(folder.glob("tokenizer*")) and not any(folder.glob("vocab*")):
        # transformers would make an empty one.
        raise UserError(f"model.name {config.name!r} has no tokenizer; {_SAVE_TOKENIZER}")
    with one_line(config, "tokenizer", _SAVE_TOKENIZER):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=config.trust_remote_code)


def load_model(
    config: ModelConfig,
    train: TrainConfig,
    *,
    strategy: str,
    device: torch.device,
    partition: Callable[[nn.Parameter], None] | None = None,
    storage: str = "fp32",
) -> nn.Module:
    """The model with fp32 weights on `device`, in eval mode as `from_pretrained` leaves it. Every
    rank calls this.

    Args:
        train: `precision` is the compute dtype of the sharded model; `gradient_checkpointing` is
            turned on here.
        strategy: "fsdp" shards the model and reads only this rank's rows of each tensor;
            "replicate" holds it whole.
        partition: DeepSpeed's stage 3; every rank calls it with a whole parameter in turn, of which
            it keeps its part of what rank 0 has there. Without it "deepspeed" holds the model
            whole.
        storage: "fsdp" only; "bf16" rounds the parameters as they are read.

    Raises:
        UserError: on every rank alike. No such folder or id, the hub cannot be reached, a damaged
            or quantised checkpoint, weights that do not fit config.json, an encoder-decoder; under
            fsdp no stack of layers.
    """
    with on_all_ranks():
        folder = resolve(config, [*_SETTINGS, "*.safetensors"])
        if not Path(config.name).exists() and not any(folder.glob("*.safetensors")):
            folder = resolve(config, [*_SETTINGS, "*.bin"])
        settings = read_settings(config, folder)
        if strategy == "fsdp" or partition is not None:
            model = _empty_model(config, folder, settings)
            files = weights.locate(config, folder)
            direct = weights.is_direct(
                model, files
            )  # Before it is sharded, which changes its classes' names.
        else:
            model = whole_model(config, folder, torch.float32).to(device)
            if train.precision == "bf16" and strategy == "replicate":
                # As FSDP2 does by its policy: fp32 weights and gradients, bf16 compute.
                model.forward = torch.autocast(device.type, torch.bfloat16)(model.forward)
        if train.gradient_checkpointing:
            _enable_checkpointing(model)
    if strategy == "fsdp":
        if storage == "bf16":  # parameters only: buffers stay as the model makes them
            for parameter in model.parameters():
                parameter.data = parameter.data.to(torch.bfloat16)
        _shard(model, train.precision, device)
        if direct:
            weights.read(model, config, files)
        else:
            weights.receive(model, config, folder, files, device)
    elif partition is not None:
        weights.receive_partitioned(
            model, config, folder, files if direct else {}, device, partition
        )
    # A cache of keys and values only costs memory in training; generate() asks for one by itself.
    model.config.get_text_config().use_cache = False
    return model.eval()


def _empty_model(config: ModelConfig, folder: Path, settings: Any) -> Any:
    """The model with parameters on the meta device and real buffers."""
    with one_line(config, "model", "give a decoder that this version of transformers knows"):
        with no_init_weights(), init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(
                settings, dtype=torch.float32, trust_remote_code=config.trust_remote_code
            )
        model.tie_weights()
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def _enable_checkpointing(model: Any) -> None:
    # transformers renames this and warns at the old name; 5.10 has only the old one.
    enable = (
        getattr(model, "activation_checkpointing_enable", None)
        or model.gradient_checkpointing_enable
    )
    try:
        enable({"use_reentrant": False})
    except ValueError:
        raise UserError(
            f"{type(model).__name__} cannot recompute activations; set"
            " train.gradient_checkpointing: false"
        ) from None
    # Inputs that require gradients would drag backward through the layers below the active one.
    model.disable_input_require_grads()


def _shard(model: Any, precision: str, device: torch.device) -> None:
    """Shard a model from the meta device and allocate this rank's shards, unfilled."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    fsdp.shard_model(model, precision=precision, device_type=device.type)
    model.to_empty(device=device)
    # No checkpoint holds the rotary frequencies, and to_empty left garbage in them. Ties survive
    # it.
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
