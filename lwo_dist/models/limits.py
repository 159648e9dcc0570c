"""What a model has no rows for: tokens beyond its embedding, positions beyond its tables."""

from __future__ import annotations

from typing import Any

from torch import nn

from lwo_dist.errors import UserError

__all__ = ["learned_positions", "refuse_long_sequences", "refuse_tokens", "refuse_tokenizer"]

_OFFSET = 2  # OPT and BART keep two more rows than positions


def refuse_tokenizer(name: str, settings: Any, tokenizer: Any) -> None:
    """Refuse a tokenizer whose texts or padding may hold tokens that the embedding has no row for.

    Special tokens that nothing uses may lie beyond it: text never becomes one (Gemma 3 has such).

    Raises: UserError.
    """
    rows = getattr(settings.get_text_config(), "vocab_size", None)
    if not isinstance(rows, int):
        return
    used = {tokenizer.pad_token_id, tokenizer.eos_token_id}
    unused = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} - used
    beyond = {
        i: token for token, i in tokenizer.get_vocab().items() if i >= rows and i not in unused
    }
    if beyond:
        first = min(beyond)
        raise UserError(
            f"model.name {name!r}: its tokenizer has the token {beyond[first]!r} ({first}), and its"
            f" embedding only {rows} rows; use the tokenizer that the model was saved with, or call"
            f" model.resize_token_embeddings({max(beyond) + 1}) and save both"
        )


def refuse_tokens(name: str, model: Any, highest: int) -> None:
    """Refuse examples with a token that the embedding has no row for.

    Args:
        highest: the largest token id of all examples.

    Raises: UserError.
    """
    rows = model.get_input_embeddings().num_embeddings
    if highest >= rows:
        raise UserError(
            f"the examples hold the token {highest}, and the embedding of model.name {name!r} has"
            f" only {rows} rows; call model.resize_token_embeddings({highest + 1}) and save the"
            " model, or take the token out of the tokenizer or the data"
        )


def refuse_long_sequences(name: str, model: Any, length: int) -> None:
    """Refuse sequences longer than the positions that a model has a table of.

    Raises: UserError.
    """
    positions = learned_positions(model)
    if positions is not None and length > positions:
        raise UserError(
            f"train.sequence_length = {length} is more than the {positions} positions of model.name"
            f" {name!r}; set it to {positions} or less"
        )


def learned_positions(model: Any) -> int | None:
    """How many positions a model has a table of; None if it computes them for any (rotary, ALiBi).

    The table is an embedding or a buffer with as many rows as config.json says positions.
    """
    settings = model.config.get_text_config()
    if getattr(getattr(settings, "attn_config", None), "alibi", False):
        return int(settings.max_seq_len)  # MPT: ALiBi of a fixed length
    limit = getattr(settings, "max_position_embeddings", None)
    if not isinstance(limit, int):
        return None
    words = model.get_input_embeddings()
    rows = [
        module.num_embeddings
        for module in model.modules()
        if isinstance(module, nn.Embedding) and module is not words
    ]
    tables = [buffer.shape for buffer in model.buffers() if buffer.ndim > 1]
    found = any(limit <= n <= limit + _OFFSET for n in rows) or any(limit in s for s in tables)
    return limit if found else None
