"""The files that, with the weights, make a folder a Hugging Face model."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["save_model_files"]


def save_model_files(
    model: Any, tokenizer: Any, folder: Path, *, code: Sequence[Path] = ()
) -> None:
    """Write the config, generation config and tokenizer of `model` to `folder`; no weights.

    The config says float32, whatever the published dtype: the layer files of a checkpoint hold fp32
    masters.

    Args:
        code: Python files that the model needs beside them.

    Raises:
        OSError
    """
    values = {**model.config.to_dict(), "dtype": "float32", "use_cache": True}
    config = type(model.config).from_dict(values)
    config.architectures = [type(model).__name__.removeprefix("FSDP")]
    config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for file in code:
        shutil.copyfile(file, folder / file.name)
