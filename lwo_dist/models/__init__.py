"""Builds a tokenizer and a model from a folder or a Hugging Face id."""

from .source import PretrainedSource, load_tokenizer

__all__ = ["PretrainedSource", "load_tokenizer"]
