"""Models in the GGUF format, turned into plain Hugging Face folders.

A GGUF file holds weights, settings and tokenizer of a model, mostly quantised for inference. Its
weights are dequantised once, to fp32, and then trained as those of any other model.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from transformers import AutoModelForCausalLM, AutoTokenizer

from lwo_dist.cache import build_once
from lwo_dist.config import ModelConfig
from lwo_dist.console import say
from lwo_dist.errors import UserError, printable
from lwo_dist.extras import require

from .hub import AGAIN, one_line

__all__ = ["dequantise", "is_gguf"]

_HUB = "https://huggingface.co/"


def is_gguf(name: str) -> bool:
    """Whether `model.name` means a GGUF file."""
    return name.lower().endswith(".gguf")


def dequantise(config: ModelConfig, cache: Path) -> Path:
    """The plain folder of a GGUF file's model in fp32, made at the first use.

    It is in <cache>/models, named after the file and its sha256. Takes the memory of the whole
    model.

    Raises:
        UserError: no such file, no package gguf, an architecture that transformers does not read
            from GGUF, a damaged file, or the cache cannot be written.
    """
    path = Path(config.name).expanduser().absolute()
    if not path.is_file():
        raise UserError(f"model.name {config.name!r} is not a file; give the path of a GGUF file")
    require("gguf", what=f"model.name {config.name!r}", otherwise="give a plain folder")
    with one_line(config, "file", AGAIN), path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()

    def build(folder: Path) -> None:
        say(f"dequantising {printable(path.name)} to fp32, once")
        with one_line(config, "GGUF file", "give a decoder that transformers reads from GGUF"):
            _convert(path, folder)

    return build_once(cache / "models" / f"{path.stem}-{digest[:16]}", build)


def _convert(path: Path, folder: Path) -> None:
    source = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    with contextlib.redirect_stderr(io.StringIO()):  # transformers' progress bars
        tokenizer = AutoTokenizer.from_pretrained(**source)
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        # Otherwise it is saved as a quantised model.
        model.hf_quantizer = None
        model.is_quantized = False
        del model.config.quantization_config
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    _card(path).save(folder / "README.md")


def _card(path: Path) -> ModelCard:
    """Name, licence and origin, as far as the file says them."""
    values = _metadata(path)
    repository = values.get("general.base_model.0.repo_url") or values.get("general.repo_url")
    base = str(repository or "").removeprefix(_HUB)
    data = ModelCardData(
        base_model=base or None,
        license=values.get("general.license"),
        model_name=values.get("general.name"),
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\nDequantised to fp32 from {path.name}.\n")


def _metadata(path: Path) -> dict[str, Any]:
    from gguf import GGUFReader

    fields = GGUFReader(path).fields
    return {name: fields[name].contents() for name in fields if name.startswith("general.")}
