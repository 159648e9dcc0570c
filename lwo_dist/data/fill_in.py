"""Fill-in-the-middle (Bavarian et al., 2022): what is before a gap, what is after it, then the gap.

The three parts are tokenised on their own, between special tokens of the model's pretraining.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from lwo_dist.errors import UserError

from .examples import LineTokenizer, TrainExample, context_start, end_of_text_id

__all__ = ["FillIn", "before_gap", "ends_of_gap"]

# Before the prefix, before the suffix, before the middle; after the middle, or the end of text.
_FAMILIES = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", ""),  # Qwen2.5-Coder, CodeGemma
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>", ""),  # StarCoder, Granite
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>", ""),  # SantaCoder
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>", ""),  # noqa: RUF001  DeepSeek-Coder
    ("\u2581<PRE>", "\u2581<SUF>", "\u2581<MID>", "\u2581<EOT>"),  # CodeLlama
)
_ANCHOR = "\u263a"
"""Put before text that does not start a file, where the tokenizer would add a space to its start;
CodeLlama's own code does the same."""


@dataclass(frozen=True)
class FillIn:
    """The special tokens of a model, in the order of the parts: prefix, suffix, middle."""

    tokenize: LineTokenizer
    prefix: int
    suffix: int
    middle: int
    end: int
    """After the middle."""
    anchor: str

    extra: ClassVar[int] = 8
    """Tokens that rearranging a text may add: four, and some where a word is cut."""

    @classmethod
    def of(cls, tokenizer: Any, tokenize: LineTokenizer) -> FillIn:
        """Raises: UserError, if the tokenizer has no such tokens."""
        for names in _FAMILIES:
            tokens = _ids(tokenizer, names)
            if tokens is not None:
                prefix, suffix, middle, end = tokens
                if end is None:
                    return cls(tokenize, prefix, suffix, middle, end_of_text_id(tokenizer), "")
                return cls(tokenize, prefix, suffix, middle, end, _ANCHOR)
        known = ", ".join(names[0] for names in _FAMILIES)
        raise UserError(
            "completion.fim_rate needs a model with tokens for filling in the middle, but the"
            f" tokenizer {tokenizer.name_or_path or type(tokenizer).__name__} has none of"
            f" {known}; drop it, or take such a model"
        )

    def context(self, prefix: str, suffix: str, room: int) -> list[int]:
        """The nearest whole lines on both sides in at most `room` tokens, of which a quarter is for
        the suffix; what one side does not need goes to the other.
        """
        before = self.tokenize(prefix)
        after = self.tokenize(suffix, self.anchor)
        room -= 3
        ahead = min(len(after.tokens), max(room // 4, room - len(before.tokens)))
        fitting = [edge for edge in after.edges if 0 < edge <= ahead]
        ahead = fitting[-1] if fitting else ahead
        end = len(before.tokens)
        start = context_start(before.edges, end, room - ahead)
        return [
            self.prefix,
            *before.tokens[start:],
            self.suffix,
            *after.tokens[:ahead],
            self.middle,
        ]

    def target(self, middle: str) -> list[int]:
        """The tokens of the gap, and the one that ends it."""
        return [*self.tokenize(middle, self.anchor).tokens, self.end]

    def rearranged(
        self, example: TrainExample, text: str, draw: random.Random, length: int
    ) -> TrainExample:
        """A training example whose text is cut at two positions, drawn uniformly.

        All of it is learned. Where it would exceed `length` tokens, its start is left out.

        Args:
            text: that of the example; where it has broken characters, the example stays as it is.
        """
        if "\ufffd" in text or len(text) < 2:
            return example
        first, second = sorted(draw.randrange(len(text) + 1) for _ in range(2))
        after = self.tokenize(text[second:], self.anchor).tokens
        rest = [self.suffix, *after, self.middle, *self.target(text[first:second])]
        room = length - len(rest) - 1
        before = self.tokenize(text[:first]).tokens
        if room < 0:
            return example
        return TrainExample([self.prefix, *before[max(len(before) - room, 0) :], *rest], 0)


def ends_of_gap(tokenizer: Any) -> list[int]:
    """The tokens that end a middle and are not the end of the text."""
    found = (_ids(tokenizer, names) for names in _FAMILIES)
    return [tokens[3] for tokens in found if tokens is not None and tokens[3] is not None]


def before_gap(tokenizer: Any, context: Sequence[int]) -> Sequence[int]:
    """A context without its suffix; as it is, if it has none."""
    for names in _FAMILIES:
        tokens = _ids(tokenizer, names)
        if tokens is not None and tokens[1] in context:
            return context[: context.index(tokens[1])]
    return context


def _ids(tokenizer: Any, names: Sequence[str]) -> list[Any] | None:
    """Prefix, suffix, middle, end; None if the tokenizer lacks one. The end may be None."""
    found = [tokenizer.convert_tokens_to_ids(name) if name else None for name in names]
    unknown = (None, tokenizer.unk_token_id)
    has_all = all(i not in unknown for i, name in zip(found, names, strict=True) if name)
    return found if has_all else None
