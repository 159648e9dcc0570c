"""A folder or a Hugging Face id becomes a tokenizer and a model."""

from .source import PretrainedSource, load_tokenizer

__all__ = ["PretrainedSource", "load_tokenizer"]
