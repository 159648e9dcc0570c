"""Builds a tokenizer and a model from a folder or a Hugging Face id."""

from .hub import licence_of, model_class
from .limits import refuse_long_sequences, refuse_tokens
from .source import (
    PretrainedSource,
    base_digest,
    base_weights,
    check_model,
    check_prepared,
    code_files,
    decoder_start,
    load_tokenizer,
)

__all__ = [
    "PretrainedSource",
    "base_digest",
    "base_weights",
    "check_model",
    "check_prepared",
    "code_files",
    "decoder_start",
    "licence_of",
    "load_tokenizer",
    "model_class",
    "refuse_long_sequences",
    "refuse_tokens",
]
