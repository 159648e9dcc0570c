"""Builds a tokenizer and a model from a folder or a Hugging Face id."""

from .hub import licence_of
from .source import (
    PretrainedSource,
    base_digest,
    base_weights,
    check_model,
    check_prepared,
    load_tokenizer,
)

__all__ = [
    "PretrainedSource",
    "base_digest",
    "base_weights",
    "check_model",
    "check_prepared",
    "licence_of",
    "load_tokenizer",
]
