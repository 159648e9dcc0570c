"""Lines to complete that a benchmark gives with their contexts, for the task `completion`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lwo_dist.config import Config
from lwo_dist.data.examples import (
    EvalExample,
    LineTokenizer,
    Note,
    PromptTokenizer,
    TrainExample,
    cut_windows,
    scored_bytes,
    text_start,
)
from lwo_dist.data.pairs import Pair, Pairs

from .pairs import choose, cut_context

__all__ = ["given_lines", "windows_of"]


def windows_of(source: Pairs, tokenizer: Any, config: Config) -> Iterator[TrainExample]:
    """Windows of whole lines from each context and its line, of which all are learned."""
    tokenize = LineTokenizer(tokenizer)
    start = text_start(tokenizer)
    length = config.train.sequence_length - len(start)
    for pair in source.train:
        found = tokenize(f"{pair.source}{_line(pair)}\n")
        for window in cut_windows(found.tokens, found.edges, length):
            yield window.after(start)


def given_lines(source: Pairs, tokenizer: Any, config: Config) -> list[EvalExample | Note]:
    """`eval.num_lines` of the lines, each up to the token that ends it.

    Raises:
        UserError: fewer than two, too few for a confidence interval.
    """
    tokenize = PromptTokenizer(tokenizer)

    def make(pair: Pair) -> list[EvalExample | Note]:
        found = tokenize(pair.source, f"{_line(pair)}\n")
        if found is None:
            return [Note("no token border before the target")]
        target = found.tokens[found.start :][: config.eval.max_new_tokens]
        limit = config.train.sequence_length - config.eval.max_new_tokens
        context, notes = cut_context(found.tokens[: found.start], limit, tokenize.begin)
        size = scored_bytes(tokenizer, context, target)
        example = EvalExample(
            context,
            target,
            _line(pair),
            pair.name,
            pair.line,
            found.begins_with,
            size,
        )
        return [example, *notes]

    return choose(source, make, config.eval.num_lines, "lines")


def _line(pair: Pair) -> str:
    """The first line of the target: answers end with their line."""
    return pair.target.removesuffix("\n").partition("\n")[0]
