"""Examples in tokens: what a task makes, what the Arrow files hold, and how a long file is cut into
windows.

A training example is one stretch of tokens, of which those from `target_start` on are learned. A
held-out example is a context, the tokens that should follow, and their text. Every task's examples
have these two shapes. For an encoder-decoder what comes before `target_start`, or the context, is
the encoder's input, and the rest the decoder's output.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from lwo_dist.errors import UserError

__all__ = [
    "EncoderTokenizer",
    "EvalExample",
    "LineTokenizer",
    "Note",
    "PromptTokenizer",
    "PromptedText",
    "TokenizedText",
    "TrainExample",
    "context_start",
    "continuations",
    "cut_windows",
    "end_of_text_id",
    "pad_id",
    "scored_bytes",
    "text_after",
    "text_start",
    "token_texts",
]

_ANCHOR = "x"


@dataclass(frozen=True)
class TrainExample:
    """Tokens to train on; those before `target_start` are context, whose labels are -100."""

    input_ids: Sequence[int]
    target_start: int

    @property
    def label_tokens(self) -> int:
        """Positions that count in the loss: nothing predicts the first token of a sequence."""
        return len(self.input_ids) - max(self.target_start, 1)

    @property
    def learned(self) -> int:
        """Tokens from `target_start` on."""
        return len(self.input_ids) - self.target_start

    def after(self, tokens: Sequence[int]) -> TrainExample:
        """The same with `tokens` before it, which are not learned."""
        return TrainExample([*tokens, *self.input_ids], len(tokens) + self.target_start)


@dataclass(frozen=True)
class Note:
    """Something to count about an example, given beside it or in its place."""

    reason: str
    """Such as "target too long"."""


@dataclass(frozen=True)
class EvalExample:
    """One held-out text to write, or to choose."""

    context: Sequence[int]
    """At least one token."""
    target: Sequence[int]
    """The tokens of `text`, as many as may be generated, and of `begins_with` before it."""
    text: str
    """The whole answer; of a line, without its "\\n"."""
    name: str
    """Of the file, below the source."""
    line: int
    """From 1."""
    begins_with: str = ""
    """Known text between the context and `text`; only tokens that start with it may be generated
    first."""
    target_bytes: int = 0
    """UTF-8 bytes of the text of `target`, from `scored_bytes`."""
    choices: Sequence[Sequence[int]] = field(default_factory=list)
    """The tokens of each possible answer. Where given, nothing is generated: the answer is the one
    with the highest log-probability after the context. All examples of a task have them, or none.
    """
    ends_with: str = ""
    """Text that ends an answer, besides the tokens that do."""


@dataclass(frozen=True)
class TokenizedText:
    """The tokens of a whole text, and where its lines lie in them."""

    tokens: list[int]
    breaks: list[int]
    """[line ends], for each "\\n" of the text the index of the token that contains it."""
    edges: list[int]
    """Token indices between which the text may be cut, ascending, from 0 to the number of tokens:
    behind the token that ends a line, or before it if it also holds the next line's indentation."""


class LineTokenizer:
    """Tokenises whole texts, as the model saw them in its pretraining.

    Line by line the tokens would differ: for many tokenizers a line end and the indentation that
    follows are one token, and others put a space before each text. No special tokens are added
    (`text_start` gives the one that belongs there), and none are recognised in the text.
    """

    def __init__(self, tokenizer: Any):
        self.texts = token_texts(tokenizer)
        self._tokenizer = tokenizer
        self._line_ends = np.array([text.count("\n") for text in self.texts])
        self._is_last = np.array([text.endswith("\n") for text in self.texts])

    def __call__(self, text: str, anchor: str = "") -> TokenizedText:
        """Tokenise a text.

        Args:
            anchor: tokenise `text` as what follows this, where that is possible.

        Raises:
            UserError: the tokens do not hold the line ends of the text.
        """
        tokens = self.tokens(anchor + text)
        if anchor:
            before = self.tokens(anchor)
            is_apart = tokens[: len(before)] == before
            tokens = tokens[len(before) :] if is_apart else self.tokens(text)
        ids = np.array(tokens, dtype=np.int64)
        breaks = np.repeat(np.arange(len(ids)), self._line_ends[ids])
        if len(breaks) != text.count("\n"):
            raise UserError(
                f"the tokenizer {_name(self._tokenizer)} keeps {len(breaks)} of the"
                f" {text.count(chr(10))} line ends of a text that begins with {text[:40]!r}; use a"
                " model of code or of running text"
            )
        inner = np.unique(breaks + self._is_last[ids[breaks]])
        edges = sorted({0, *inner.tolist(), len(tokens)})
        return TokenizedText(tokens, breaks.tolist(), edges)

    def tokens(self, text: str) -> list[int]:
        # verbose=False: a text may be longer than the model's context; it is cut later.
        tokens: list[int] = self._tokenizer(
            text,
            add_special_tokens=False,
            return_attention_mask=False,
            split_special_tokens=True,
            verbose=False,
        )["input_ids"]
        return tokens


class EncoderTokenizer:
    """Tokenises a prompt for an encoder and its answer for a decoder, each as a text of its own.

    Both have the special tokens that the tokenizer puts around such texts (T5's and BART's end
    with one); none are recognised in the texts.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._end = end_of_text_id(tokenizer)

    def __call__(self, prompt: str, answer: str) -> PromptedText:
        """Without the end-of-text token of the answer.

        Raises:
            UserError: the tokenizer puts another token after that.
        """
        context = self._tokens(text=prompt)
        target = self._tokens(text_target=answer)
        if target[-1:] == [self._end]:
            target = target[:-1]
        if self._end in target:
            raise UserError(
                f"the tokenizer {_name(self._tokenizer)} ends the answer {answer[:40]!r} with"
                f" {self._tokenizer.decode(target[-1:])!r}; use a model whose answers end with"
                f" {self._tokenizer.eos_token}"
            )
        return PromptedText(context + target, len(context), "")

    @property
    def begin(self) -> list[int]:
        """The tokens before each prompt."""
        whole = self._tokens(text=_ANCHOR)
        inner = self._tokenizer(_ANCHOR, add_special_tokens=False)["input_ids"]
        return whole[: whole.index(inner[0])]

    def _tokens(self, **text: str) -> list[int]:
        # verbose=False: a text may be longer than the model's context; it is cut later.
        tokens: list[int] = self._tokenizer(
            **text, return_attention_mask=False, split_special_tokens=True, verbose=False
        )["input_ids"]
        return tokens


@dataclass(frozen=True)
class PromptedText:
    """The tokens of a prompt and the answer after it."""

    tokens: list[int]
    start: int
    """The prompt's own tokens are those before `start`."""
    begins_with: str
    """The end of the prompt, where it is in the same token as the start of the answer."""


class PromptTokenizer:
    """Tokenises a prompt and its answer as one text, as the model saw texts in its pretraining.

    A text begins with the token that the tokenizer puts before texts, if it has one.

    Args:
        chat: prompts come from the tokenizer's chat template: special tokens in them are
            recognised, and none is put before them.
    """

    def __init__(self, tokenizer: Any, *, chat: bool = False):
        self._tokenizer = tokenizer
        self._texts = token_texts(tokenizer)
        self._split = not chat
        self._before = [] if chat else text_start(tokenizer)

    def __call__(self, prompt: str, answer: str) -> PromptedText | None:
        """None if no token of the text ends within the prompt, or none holds what is left of it."""
        tokens = self._tokens(prompt + answer)
        alone = self._tokens(prompt)
        known = self._text(alone)
        same = (a == b for a, b in zip(tokens, alone, strict=False))
        start = next(
            (i for i, equal in enumerate(same) if not equal), min(map(len, (tokens, alone)))
        )
        while start < len(tokens) and known.startswith(self._text(tokens[: start + 1])):
            start += 1
        while not known.startswith(self._text(tokens[:start])):  # within a character
            start -= 1
        begins_with = known.removeprefix(self._text(tokens[:start]))
        if start in (len(self._before), len(tokens)):
            return None
        if not self._texts[tokens[start]].startswith(begins_with):
            return None
        return PromptedText(tokens, start, begins_with)

    @property
    def begin(self) -> list[int]:
        """The token before each text, or nothing."""
        return list(self._before)

    def _tokens(self, text: str) -> list[int]:
        # verbose=False: a text may be longer than the model's context; it is cut later.
        tokens: list[int] = self._tokenizer(
            text,
            add_special_tokens=False,
            return_attention_mask=False,
            split_special_tokens=self._split,
            verbose=False,
        )["input_ids"]
        return self._before + tokens

    def _text(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
        return text


def text_after(tokenizer: Any, context: Sequence[int], tokens: Sequence[int]) -> str:
    """The text that `tokens` add to `context`; special tokens have none.

    Alone they may read otherwise: many tokenizers leave out the space at the start of a text.
    """
    nearest = list(context[-8:])  # enough to complete a character
    known, whole = (
        str(tokenizer.decode(part, clean_up_tokenization_spaces=False, skip_special_tokens=True))
        for part in (nearest, [*nearest, *tokens])
    )
    return whole[len(known) :]


def scored_bytes(tokenizer: Any, context: Sequence[int], target: Sequence[int]) -> int:
    """UTF-8 bytes of the text that `target` adds to `context`, at least 1; without a character that
    it does not complete.
    """
    for end in range(len(target), 0, -1):
        text = text_after(tokenizer, context, target[:end])
        if not text.endswith("\ufffd"):
            return max(len(text.encode()), 1)
    return 1


def text_start(tokenizer: Any) -> list[int]:
    """The token that the tokenizer puts before every text, or nothing.

    Such a model has never seen text without it: Gemma's losses are useless then.
    """
    before: list[int] = tokenizer("")["input_ids"][:1]
    return before if before == [tokenizer.bos_token_id] else []


def token_texts(tokenizer: Any) -> list[str]:
    """[vocabulary], what each token reads after other text."""
    return continuations(tokenizer, [[i] for i in range(len(tokenizer))])


def continuations(tokenizer: Any, tokens: Sequence[Sequence[int]]) -> list[str]:
    """What each list of tokens reads after other text.

    Alone it could read less: many tokenizers take a space from the start of a text.
    """
    before = tokenizer(_ANCHOR, add_special_tokens=False)["input_ids"]
    known = tokenizer.decode(before, clean_up_tokenization_spaces=False)
    texts = tokenizer.batch_decode(
        [[*before, *ids] for ids in tokens], clean_up_tokenization_spaces=False
    )
    return [text[len(known) :] for text in texts]


def cut_windows(tokens: Sequence[int], edges: Sequence[int], length: int) -> Iterator[TrainExample]:
    """Cut one file into windows of at most `length` tokens, so that each token is a target exactly
    once.

    A window after the first begins with the nearest context of what it is to learn, whole lines of
    up to a quarter of the window (the nearest tokens, where the line before is longer than that),
    and then holds as many whole lines as fit. A line that does not fit behind its context is cut
    into pieces that do.

    Args:
        edges: where a line may be cut from the next, ascending, from 0 to the number of tokens.
    """
    context = length // 4
    ends = [
        end
        for a, b in pairwise(edges)
        for end in (*range(a + length - context, b, length - context), b)
    ]
    start = 0
    while start < len(tokens):
        begin = context_start(edges, start, context)
        end = ends[bisect_right(ends, begin + length) - 1]
        yield TrainExample(tokens[begin:end], start - begin)
        start = end


def context_start(edges: Sequence[int], end: int, limit: int) -> int:
    """Where the context of at most `limit` tokens before token `end` begins: at a line, unless the
    nearest is too long.

    Args:
        edges: where the lines of the file start, ascending, in tokens.
    """
    earliest = max(end - limit, 0)
    nearest = bisect_left(edges, earliest)
    return edges[nearest] if nearest < len(edges) and edges[nearest] < end else earliest


def end_of_text_id(tokenizer: Any) -> int:
    """The token that ends a file.

    Raises:
        UserError: the tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer {_name(tokenizer)} has no eos_token,"
            " which ends a file; add eos_token to its tokenizer_config.json"
        )
    return int(tokenizer.eos_token_id)


def pad_id(tokenizer: Any) -> int:
    """A token to pad with, under attention mask 0: neither the end of a text nor of a line, and
    known to the model.

    The pad token where it is fit (many models pad with their end-of-text token), else the first
    token that will do: masked positions are neither attended to nor labelled, so it only has to
    exist. Not any special token: those that nothing uses may have no row in the model's embedding.
    """
    for token in (tokenizer.pad_token_id, *range(len(tokenizer))):
        if (
            token is not None
            and token != tokenizer.eos_token_id
            and "\n" not in tokenizer.decode([token])
        ):
            return int(token)
    raise UserError(f"the tokenizer {_name(tokenizer)} has no token to pad with")


def _name(tokenizer: Any) -> str:
    return str(tokenizer.name_or_path or type(tokenizer).__name__)
