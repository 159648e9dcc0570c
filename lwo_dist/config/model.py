"""Which model is tuned."""

from __future__ import annotations

from pydantic import Field

from .base import Settings

__all__ = ["ModelConfig"]


class ModelConfig(Settings):
    """Which model is tuned."""

    name: str = Field(
        "tiny-code",
        description="a Hugging Face id, a folder, a GGUF file, or tiny-code (made here, offline)",
    )
    revision: str | None = Field(None, description="branch, tag or commit of a Hugging Face id")
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")
