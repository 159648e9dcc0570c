"""A model's folder: found or downloaded; its settings; its weights loaded as one whole model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import ModelCard, hf_hub_download, snapshot_download
from huggingface_hub import errors as hub
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
)
from transformers.initialization import no_init_weights

from lwo_dist.config import ModelConfig
from lwo_dist.errors import DamagedError, UserError
from lwo_dist.files import is_plain

__all__ = [
    "AGAIN",
    "check_indexes",
    "empty_model",
    "licence_of",
    "model_class",
    "one_line",
    "read_settings",
    "resolve",
    "whole_model",
]

AGAIN = "download or save the folder again"
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_LAYERS = "../../layers/"
_NOT_NEEDED = ["*/*", "consolidated*", "training_args*"]


def resolve(config: ModelConfig, patterns: list[str]) -> Path:
    """The folder with the model's files; for a Hugging Face id, downloaded or from its cache."""
    folder = Path(config.name).expanduser()
    name = f"model.name {config.name!r}"
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(
                f"{name} is a folder without config.json; save a model there with"
                " save_pretrained(folder)"
            )
        return folder
    if folder.exists() or config.name.count("/") > 1 or config.name.startswith((".", "~", "/")):
        raise UserError(
            f"{name} is not a folder; give a folder written by save_pretrained, or a Hugging"
            " Face id"
        )
    try:
        found = snapshot_download(
            config.name,
            revision=config.revision,
            allow_patterns=patterns,
            ignore_patterns=_NOT_NEEDED,
        )
        return Path(found)
    except hub.HFValidationError:
        why = (
            "is no folder and cannot be a Hugging Face id; give a folder, or an id such as"
            " Qwen/Qwen2.5-Coder-0.5B"
        )
    except hub.GatedRepoError:
        why = (
            "is gated; ask for access on its page at huggingface.co and set HF_TOKEN to a token"
            " that has it"
        )
    except hub.RepositoryNotFoundError:
        why = (
            "is no folder, and no model on the Hugging Face hub that this HF_TOKEN may read; mind"
            " the spelling"
        )
    except hub.RevisionNotFoundError:
        why = (
            f"has no revision {config.revision!r}; give one of its branches, tags or commits, or"
            " none"
        )
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled):
        why = (
            "is no folder, is not in the cache (HF_HOME), and the Hugging Face hub cannot be"
            " reached; give a folder, go online (HF_HUB_OFFLINE unset), or use model.name:"
            " tiny-code"
        )
    except (hub.HfHubHTTPError, OSError) as error:
        why = f"could not be downloaded ({_first_line(error)}); try again, or give a folder"
    raise UserError(f"{name} {why}")


def read_settings(config: ModelConfig, folder: Path) -> Any:
    with one_line(config, "config.json", "give a model that this version of transformers knows"):
        settings = AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    if getattr(settings, "quantization_config", None) is not None:
        raise UserError(
            f"model.name {config.name!r} is quantised and cannot be trained; give the model it was"
            " made from"
        )
    return settings


def model_class(settings: Any) -> Any:
    """The class of transformers that makes a language model of `settings`."""
    return AutoModelForSeq2SeqLM if settings.is_encoder_decoder else AutoModelForCausalLM


def whole_model(config: ModelConfig, folder: Path, dtype: torch.dtype) -> Any:
    """`from_pretrained`, but mismatched weights are errors: it would skip or randomise them."""
    with one_line(config, "weights", AGAIN):
        check_indexes(folder)
        model, found = model_class(read_settings(config, folder)).from_pretrained(
            folder,
            dtype=dtype,
            trust_remote_code=config.trust_remote_code,
            output_loading_info=True,
        )
    for problem in ("missing", "unexpected"):
        keys = sorted(found[f"{problem}_keys"])
        if keys:
            raise UserError(
                f"model.name {config.name!r}: {len(keys)} {problem} weights, first {keys[0]}; "
                f"its weights and its config.json must belong to the same {type(model).__name__}"
            )
    _refuse_untied(config, folder, model)
    return model


def _refuse_untied(config: ModelConfig, folder: Path, model: Any) -> None:
    """Refuse a model whose config.json ties what its file holds as two: it would be trained untied,
    and loaded tied."""
    tensors = model.state_dict(keep_vars=True)
    first: dict[int, str] = {}
    settings = read_settings(config, folder)
    for name, tensor in empty_model(config, folder, settings).state_dict(keep_vars=True).items():
        other = first.setdefault(id(tensor), name)
        if tensors.get(name) is not tensors.get(other):
            remedy = "set tie_word_embeddings to false there"
            if settings.is_encoder_decoder:  # T5's setting means another thing
                remedy = "give a model that has one matrix for both, such as CodeT5 or BART"
            raise UserError(
                f"model.name {config.name!r}: config.json ties {other} and {name}, but the saved"
                f" weights differ; {remedy}"
            )


def empty_model(config: ModelConfig, folder: Path, settings: Any) -> Any:
    """The model with parameters on the meta device and real buffers."""
    with one_line(config, "model", "give a model that this version of transformers knows"):
        with no_init_weights(), init_empty_weights(include_buffers=False):
            model = model_class(settings).from_config(
                settings, dtype=torch.float32, trust_remote_code=config.trust_remote_code
            )
        model.tie_weights()
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def check_indexes(folder: Path) -> None:
    """Refuse a folder with an index of weights that leads out of it, but for a checkpoint's, which
    names the layers of its run. A file may be a link: those of a Hugging Face snapshot are, into
    its cache.

    Raises:
        DamagedError
    """
    layers = _LAYERS if folder.absolute().parent.name == "checkpoints" else ""
    for index in (folder / name for name in _INDEXES if (folder / name).is_file()):
        for file in {*json.loads(index.read_text())["weight_map"].values()}:
            if not is_plain(file.removeprefix(layers)):
                raise DamagedError(f"{index.name} names {file[:100]!r}, which is no file beside it")


def licence_of(name: str, revision: str | None = None) -> str | None:
    """The licence in a model's card, for a folder or a Hugging Face id; None without one."""
    try:
        folder = Path(name)
        if folder.is_dir():
            card = ModelCard.load(folder / "README.md")
        else:
            card = ModelCard.load(hf_hub_download(name, "README.md", revision=revision))
        found = card.data.get("license")
    except Exception:  # no card, no network or invalid YAML: the licence is optional
        return None
    licences = found if isinstance(found, list) else [found]
    return ", ".join(str(licence) for licence in licences if licence) or None


@contextmanager
def one_line(config: ModelConfig, what: str, remedy: str) -> Iterator[None]:
    """Turn any library error about a model's files into one line."""
    try:
        yield
    except DamagedError as error:
        raise UserError(
            f"model.name {config.name!r}: its {what} cannot be read: {error}; {remedy}"
        ) from None
    except UserError:
        raise
    except Exception as error:
        if "trust_remote_code" in str(error):
            remedy = "read the code that comes with it, then set model.trust_remote_code: true"
        raise UserError(
            f"model.name {config.name!r}: its {what} cannot be read ({_first_line(error)});"
            f" {remedy}"
        ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
