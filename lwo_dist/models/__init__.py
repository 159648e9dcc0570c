"""Builds a tokenizer and a model from a folder or a Hugging Face id."""

from .hub import licence_of
from .limits import refuse_long_sequences, refuse_tokens
from .source import (
    PretrainedSource,
    base_digest,
    base_weights,
    check_model,
    check_prepared,
    code_files,
    load_tokenizer,
)

__all__ = [
    "PretrainedSource",
    "base_digest",
    "base_weights",
    "check_model",
    "check_prepared",
    "code_files",
    "licence_of",
    "load_tokenizer",
    "refuse_long_sequences",
    "refuse_tokens",
]
