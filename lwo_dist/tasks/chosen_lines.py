"""Lines to complete that are chosen from held-out files, for the task `completion`."""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from lwo_dist.config import CompletionConfig, Config
from lwo_dist.data.comments import is_comment
from lwo_dist.data.examples import (
    EvalExample,
    LineTokenizer,
    TokenizedText,
    context_start,
    continuations,
    scored_bytes,
    text_start,
)
from lwo_dist.data.fill_in import FillIn
from lwo_dist.data.source_tree import SourceFile, SourceTree, source_text

from .passages import Passages

__all__ = ["Questions", "choose_lines"]


@dataclass(frozen=True)
class _Place:
    """Where an answer begins. All but `line` are indices of characters of a file's text."""

    line: int
    """From 0."""
    start: int
    """Of the line."""
    at: int
    end: int
    """Of the line: the place of its line end."""


class Questions:
    """Makes examples of the lines of held-out files."""

    def __init__(self, source: SourceTree, tokenizer: Any, config: Config):
        self._tokenizer = tokenizer
        self._tokenize = LineTokenizer(tokenizer)
        self._settings = config.completion
        self._start = text_start(tokenizer)
        self._longest = config.eval.max_new_tokens
        self._room = config.train.sequence_length - self._longest - len(self._start)
        self._retrieval = None
        if config.data.retrieval:
            self._retrieval = Passages(source, self._tokenize, config)
        self._fill_in = None
        if self._settings.fim_rate is not None:
            self._fill_in = FillIn.of(tokenizer, self._tokenize)

    def __call__(self, file: SourceFile, text: str, lines: Sequence[int]) -> Iterator[EvalExample]:
        """An example for each of the `lines`, but for those that are within one token."""
        found = self._tokenize(text)
        starts = [0, *accumulate(len(line) + 1 for line in text.split("\n"))]
        for i in lines:
            start, end = starts[i], starts[i + 1] - 1
            places = [start]
            if self._settings.mid_line:
                places = _within(text[start:end], start, f"{file.sha256}:{i}")
            for at in places:
                place = _Place(i, start, at, end)
                if self._fill_in is not None:
                    example = self._gap(self._fill_in, file.name, text, place, starts)
                else:
                    example = self._continuation(file.name, text, found, place)
                if example is not None:
                    yield example
                    break

    def _continuation(
        self, name: str, text: str, found: TokenizedText, place: _Place
    ) -> EvalExample | None:
        first, known = self._border(text, found, place)
        last = found.breaks[place.line]
        is_within_token = place.at == place.start and first == last
        if (
            first == 0
            or is_within_token
            or not self._tokenize.texts[found.tokens[first]].startswith(known)
        ):
            return None
        passages = self._passages(text[: place.at])
        start = context_start(found.edges, first, self._room - len(passages))
        if self._settings.context_lines is not None and place.line > self._settings.context_lines:
            before = found.breaks[place.line - self._settings.context_lines - 1]
            before += self._tokenize.texts[found.tokens[before]].endswith("\n")
            start = min(max(start, before), first - 1)
        return self._asked(
            [*passages, *found.tokens[start:first]],
            found.tokens[first : last + 1],
            text[place.at : place.end],
            name,
            place,
            known,
        )

    def _border(self, text: str, found: TokenizedText, place: _Place) -> tuple[int, str]:
        """The token with the last known character, and its text up to there.

        (0, ""), which is no border, where the known text alone has other tokens before it: those
        would tell what follows.
        """
        first, last = found.breaks[place.line - 1 : place.line + 1]
        begin, line_end, _ = self._tokenize.texts[found.tokens[first]].rpartition("\n")
        known = begin + line_end + text[place.start : place.at]
        if place.at == place.start:
            return first, known
        ends = range(first + 1, last + 2)
        read = ["", *continuations(self._tokenizer, [found.tokens[first:end] for end in ends])]
        skipped = bisect_left([len(part) for part in read], len(known)) - 1
        token = first + skipped
        is_whole = known.startswith(read[skipped])  # no part of a character
        alone = self._tokenize.tokens(text[: place.at])
        if not is_whole or alone[:token] != found.tokens[:token]:
            return 0, ""
        return token, known[len(read[skipped]) :]

    def _gap(
        self, fill_in: FillIn, name: str, text: str, place: _Place, starts: Sequence[int]
    ) -> EvalExample | None:
        nearest = self._settings.context_lines or len(starts)
        before = text[starts[max(place.line - nearest, 0)] : place.at]
        after = text[place.end : starts[min(place.line + 1 + nearest, len(starts) - 1)]]
        passages = self._passages(text[: place.at])
        context = fill_in.context(before, after, self._room - len(passages))
        middle = text[place.at : place.end]
        target = fill_in.target(middle)
        return self._asked([*passages, *context], target, middle, name, place)

    def _asked(
        self,
        context: list[int],
        target: list[int],
        text: str,
        name: str,
        place: _Place,
        known: str = "",
    ) -> EvalExample:
        context = [*self._start, *context]
        target = target[: self._longest]
        size = scored_bytes(self._tokenizer, context, target)
        return EvalExample(context, target, text, name, place.line + 1, known, size)

    def _passages(self, before: str) -> list[int]:
        # Of other files: none of the training files is held out.
        return self._retrieval(before, None) if self._retrieval else []


def _within(line: str, start: int, seed: str) -> list[int]:
    """Places within a line, in an order that `seed` draws: at least a sign that is no space lies
    before each, and one after it.
    """
    first = len(line) - len(line.lstrip()) + 1
    places = [start + place for place in range(first, len(line.rstrip()))]
    random.Random(seed).shuffle(places)
    return places


def _is_worth(line: str, name: str, settings: CompletionConfig) -> bool:
    if settings.skip_comments and is_comment(line, name):
        return False
    if settings.mid_line and len(line.strip()) < 2:
        return False
    return any(map(str.isalnum, line))


def choose_lines(
    source: SourceTree, num_lines: int, settings: CompletionConfig
) -> dict[str, list[int]]:
    """Hash of each file -> indices of its lines to complete."""
    candidates: dict[str, list[int]] = {}
    # By hash: if not every file contributes, the choice does not depend on the file names.
    for file in sorted(source.held_out, key=lambda file: file.sha256):
        lines = source_text(file).split("\n")
        first = next(i for i, line in enumerate(lines) if line.strip())
        worth = [
            i for i, line in enumerate(lines) if i > first and _is_worth(line, file.name, settings)
        ]
        random.Random(file.sha256).shuffle(worth)
        if worth:
            candidates[file.sha256] = worth
    chosen: dict[str, list[int]] = {key: [] for key in candidates}
    missing = min(num_lines, sum(map(len, candidates.values())))
    turn = 0
    while missing:
        for key in [key for key, worth in candidates.items() if len(worth) > turn][:missing]:
            chosen[key].append(candidates[key][turn])
            missing -= 1
        turn += 1
    return {key: lines for key, lines in chosen.items() if lines}
