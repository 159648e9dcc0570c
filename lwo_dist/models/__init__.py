"""A folder or a Hugging Face id becomes a tokenizer and a model."""

from .loading import load_model, load_tokenizer

__all__ = ["load_model", "load_tokenizer"]
