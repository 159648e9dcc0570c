"""Builds a tokenizer and a model from a folder or a Hugging Face id.

A strategy decides how the model is created (`StrategyBuilder.build`) and requests it from a
`PretrainedSource`: whole, or empty and then filled with this rank's rows. Weights are fp32 whatever
the checkpoint's dtype, because they are the masters that the optimizer updates; compute has its own
dtype. An error on one rank is raised on all, as otherwise the others would wait until the
collectives time out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, GenerationConfig

from lwo_dist import distributed
from lwo_dist.config import ModelConfig
from lwo_dist.errors import UserError

from . import weights
from .hub import AGAIN, empty_model, one_line, read_settings, resolve, whole_model
from .limits import refuse_long_sequences, refuse_tokenizer

__all__ = [
    "BaseWeights",
    "PretrainedSource",
    "base_digest",
    "base_weights",
    "check_model",
    "check_prepared",
    "code_files",
    "decoder_start",
    "load_tokenizer",
]

_SETTINGS = ["*.json", "*.jinja", "*.model", "*.py", "*.tiktoken", "*.txt"]
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin")
_SAVE_TOKENIZER = "save one there with tokenizer.save_pretrained(folder)"


@dataclass(frozen=True)
class BaseWeights:
    """The weights of a saved model, a tensor at a time."""

    names: tuple[str, ...]
    """As in the model; one of a tied tensor's."""
    read: Callable[[str], Tensor]
    """In the stored dtype."""


def base_weights(config: ModelConfig, model: nn.Module) -> BaseWeights:
    """The weights that `config` names, for a model of the same kind on the meta device.

    The whole model is in memory if its files have other names for them. No collective.

    Raises:
        UserError: no such folder or id, the hub is unreachable, or damaged files.
    """
    folder = _find(config)
    read_settings(config, folder)
    files = weights.locate(config, folder)
    if weights.is_direct(model, files):
        return BaseWeights(*weights.direct(model, config, files))
    whole = whole_model(config, folder, torch.float32).state_dict(keep_vars=True)
    names = {id(tensor): name for name, tensor in whole.items()}
    return BaseWeights(tuple(names.values()), lambda name: whole[name].detach())


def base_digest(config: ModelConfig) -> str | None:
    """Identifies the weights that `config` names, from a few rows of each tensor; None unless they
    are in safetensors files. No collective.

    Raises:
        UserError: as `base_weights`.
    """
    files = weights.locate(config, _find(config))
    return weights.digest(config, files) if files else None


def check_model(config: ModelConfig, sequence_length: int = 0, *, elsewhere: bool = False) -> None:
    """Refuse a model that cannot be loaded, before any worker starts. Reads no weights.

    Args:
        sequence_length: tokens of the longest sequence that it will see.
        elsewhere: it is loaded on other machines; only a folder that is also here is checked.

    Raises:
        UserError: no such folder or id, the hub is unreachable, no language model, no weights, no
            tokenizer, tokens that the model does not have, too few positions.
    """
    if elsewhere and not Path(config.name).expanduser().exists():
        return
    folder = resolve(config, _SETTINGS)
    settings = read_settings(config, folder)
    if Path(config.name).expanduser().is_dir() and not any(
        any(folder.glob(pattern)) for pattern in _WEIGHTS
    ):
        raise UserError(
            f"model.name {config.name!r} is a folder without weights; save a model there with"
            " save_pretrained(folder)"
        )
    load_tokenizer(config)
    text = settings.get_text_config()
    limits = (getattr(text, name, None) for name in ("max_position_embeddings", "max_seq_len"))
    if any(isinstance(limit, int) and limit < sequence_length for limit in limits):
        refuse_long_sequences(config.name, empty_model(config, folder, settings), sequence_length)


def decoder_start(config: ModelConfig) -> int | None:
    """The token that a decoder begins with, if the model is an encoder-decoder. No collective.

    Raises:
        UserError: its files do not name one.
    """
    folder = resolve(config, _SETTINGS)
    settings = read_settings(config, folder)
    if not settings.is_encoder_decoder:
        return None
    found = getattr(settings, "decoder_start_token_id", None)
    if found is None and (folder / "generation_config.json").is_file():
        with one_line(config, "generation_config.json", AGAIN):
            found = GenerationConfig.from_pretrained(folder).decoder_start_token_id
    if found is None:
        raise UserError(
            f"model.name {config.name!r} is an encoder-decoder, and its config.json has no"
            " decoder_start_token_id; add the one that it was trained with"
        )
    return int(found)


def code_files(config: ModelConfig) -> list[Path]:
    """The Python files that come with a model; none unless they are trusted."""
    return sorted(resolve(config, _SETTINGS).glob("*.py")) if config.trust_remote_code else []


def check_prepared(
    config: ModelConfig, prepare: Callable[[nn.Module], None], *, elsewhere: bool = False
) -> None:
    """Let a method refuse the model, before any worker starts. Reads no weights.

    Args:
        elsewhere: as for `check_model`.

    Raises:
        UserError
    """
    if elsewhere and not Path(config.name).expanduser().exists():
        return
    folder = resolve(config, _SETTINGS)
    prepare(empty_model(config, folder, read_settings(config, folder)))


def load_tokenizer(config: ModelConfig) -> Any:
    """The model's saved tokenizer, a `PreTrainedTokenizerBase`. No collective.

    Raises:
        UserError: no such folder or id, the hub is unreachable, there is no tokenizer, or it has
            tokens that the model does not have.
    """
    folder = resolve(config, _SETTINGS)
    if not any(folder.glob("tokenizer*")) and not any(folder.glob("vocab*")):
        # transformers would create an empty one.
        raise UserError(f"model.name {config.name!r} has no tokenizer; {_SAVE_TOKENIZER}")
    with one_line(config, "tokenizer", _SAVE_TOKENIZER):
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=config.trust_remote_code
        )
    refuse_tokenizer(config.name, read_settings(config, folder), tokenizer)
    return tokenizer


class PretrainedSource:
    """A pretrained model, for a strategy to build (`lwo_dist.strategies.base.ModelSource`).

    Args:
        config: which model.
        gradient_checkpointing: recompute activations in backward (non-reentrant).
            prepare: the method's changes to the model, made before it is sharded.

        Every method is a collective and raises on all ranks:
            UserError: no such folder or id, an unreachable hub, a damaged or quantised checkpoint,
                weights that do not match config.json.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        gradient_checkpointing: bool = False,
        prepare: Callable[[nn.Module], None] = lambda model: None,
    ):
        self._config = config
        self._gradient_checkpointing = gradient_checkpointing
        self._prepare = prepare
        self._folder = Path()
        self._files: dict[str, Path] = {}
        self._stored_names: dict[str, str] = {}
        self._added: dict[str, Tensor] = {}
        self._buffers: dict[str, Tensor] = {}

    def whole(self, device: torch.device) -> Any:
        """The model in fp32 on `device`, in eval mode as `from_pretrained` leaves it."""
        with distributed.errors_on_all_ranks():
            folder = _find(self._config)
            read_settings(self._config, folder)
            model = whole_model(self._config, folder, torch.float32)
            self._prepare(model)
            return self._finished(model.to(device))

    def empty(self) -> Any:
        """`whole` with the base model's parameters on the meta device; buffers are real."""
        with distributed.errors_on_all_ranks():
            self._folder = _find(self._config)
            settings = read_settings(self._config, self._folder)
            model = empty_model(self._config, self._folder, settings)
            files = weights.locate(self._config, self._folder)
            # Before sharding, which renames the classes.
            self._files = files if weights.is_direct(model, files) else {}
            stored = {id(t): name for name, t in model.state_dict(keep_vars=True).items()}
            own = {name: id(t) for name, t in model.state_dict(keep_vars=True).items()}
            self._prepare(model)
            prepared = model.state_dict(keep_vars=True)
            # A method may wrap modules, which renames their contents; the tensors stay the same.
            self._stored_names = {
                name: name if own.get(name) == id(tensor) else stored[id(tensor)]
                for name, tensor in prepared.items()
                if id(tensor) in stored
            }
            self._added = {
                name: tensor.detach().clone()
                for name, tensor in prepared.items()
                if name not in self._stored_names
            }
            self._buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
            return self._finished(model)

    def materialize(self, model: nn.Module, device: torch.device) -> None:
        """Allocate this rank's shards of an `empty` model; only added parameters have values."""
        model.to_empty(device=device)
        # No checkpoint contains the rotary frequencies, and to_empty left garbage in them. Tied
        # weights stay tied.
        for name, buffer in model.named_buffers():
            buffer.copy_(self._buffers[name])
        weights.write(model, self._added)

    def fill(self, model: nn.Module, device: torch.device) -> None:
        """Read this rank's rows of each tensor of a sharded, materialised model from `empty`."""
        if self._files:
            weights.read(model, self._config, self._files, self._stored_names)
        else:
            weights.receive(model, self._config, self._folder, self._stored_names, device)

    def fill_partitioned(
        self, model: nn.Module, device: torch.device, partition: Callable[[nn.Parameter], None]
    ) -> None:
        """Materialise the parameters of a model from `empty` one at a time.

        Args:
            partition: called with a whole parameter; keeps this rank's part of rank 0's values.
        """
        weights.receive_partitioned(
            model,
            self._config,
            self._folder,
            self._files,
            self._stored_names,
            self._added,
            device,
            partition,
        )

    def _finished(self, model: Any) -> Any:
        if self._gradient_checkpointing:
            _enable_checkpointing(model)
        # A key-value cache only costs memory in training; generate() requests one.
        model.config.get_text_config().use_cache = False
        return model.eval()


def _find(config: ModelConfig) -> Path:
    folder = resolve(config, [*_SETTINGS, "*.safetensors"])
    if not Path(config.name).exists() and not any(folder.glob("*.safetensors")):
        folder = resolve(config, [*_SETTINGS, "*.bin"])
    return folder


def _enable_checkpointing(model: Any) -> None:
    # transformers renames this and warns about the old name; 5.10 has only the old one.
    enable = getattr(model, "activation_checkpointing_enable", None)
    if enable is None:
        enable = model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except ValueError:
        raise UserError(
            f"{type(model).__name__} cannot recompute activations; set "
            "train.gradient_checkpointing: false"
        ) from None
    # Inputs that require gradients would extend backward to the layers below the active one.
    model.disable_input_require_grads()
