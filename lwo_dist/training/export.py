"""A checkpoint becomes a plain Hugging Face folder."""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

__all__ = ["export_model"]


def export_model(checkpoint: Path, target: Path, *, trust_remote_code: bool = False) -> Path:
    """Write the model of a checkpoint folder, with its tokenizer, to `target`: whole there, or not at all.

    transformers does the writing, so that weights which it holds fused get their published names back.
    """
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)
    model.save_pretrained(temporary)
    AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=trust_remote_code).save_pretrained(temporary)
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    return target
