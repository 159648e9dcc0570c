"""Line completion: given the lines before, write the next one.

Files are tokenised whole, in training and in evaluation, as in the model's pretraining. Every line
of a training window is an example, because each is predicted from the lines before it.

A held-out line's context ends before the token with the preceding line end, as that token may also
hold the line's indentation. It is the first token to generate, and must begin with the text up to
the line end, which is known; the rest of the answer is free. So no token of the context tells more
about the line than the text before it does. The same holds for a place within a line, with
`completion.mid_line`. Where a middle is filled in, its sides are tokenised on their own instead, as
in the pretraining of models that can.
"""

from __future__ import annotations

import hashlib
import random
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lwo_dist.config import CompletionConfig, Config, DataConfig
from lwo_dist.data.comments import comment_mark, is_comment
from lwo_dist.data.examples import (
    EvalExample,
    LineTokenizer,
    TokenizedText,
    TrainExample,
    context_start,
    continuations,
    cut_windows,
    end_of_text_id,
    token_texts,
)
from lwo_dist.data.fill_in import FillIn, before_gap, ends_of_gap
from lwo_dist.data.retrieval import Retriever, passages_of, query_of
from lwo_dist.data.source_tree import SourceFile, SourceTree, read_source_tree, read_text
from lwo_dist.errors import UserError

from . import metrics
from .base import LOSS, Task, token_losses
from .scores import Column, Score, Scores

__all__ = ["LineCompletion"]

_PROBE = "if x:\n\n    y = f( 'a  b' )\n\treturn\n"


class LineCompletion(Task):
    """`task: completion`."""

    name = "completion"
    example = ("line", "lines")
    version = 2
    scores = (
        Score("exact_match", "exact match", "%", headline=True, count_label="lines exactly right"),
        Score("edit_similarity", "edit similarity", "%"),
        Score("bleu", "BLEU", per_example=False),
        LOSS,
    )

    def read(self, config: DataConfig, cache: Path) -> SourceTree:
        """The usable files, split by file."""
        return read_source_tree(config, cache)

    def training_examples(
        self, source: SourceTree, tokenizer: Any, config: Config
    ) -> Iterator[TrainExample]:
        """Windows of whole lines from one file; the end-of-text token after them is learned too.

        With `completion.fim_rate` a share of them, drawn by the file's hash, fills in a middle.
        With `data.retrieval_in_training` each begins with passages that resemble the lines before
        what is learned; they are not learned.
        """
        tokenize = LineTokenizer(tokenizer)
        rate = config.completion.fim_rate
        fill_in = None if rate is None else FillIn.of(tokenizer, tokenize)
        retrieval = None
        if config.data.retrieval_in_training:
            retrieval = _Retrieval(source, tokenize, config)
        length = config.train.sequence_length - (retrieval.room if retrieval else 0)
        end_of_text = end_of_text_id(tokenizer)
        for file in source.train:
            text = _text(file)
            found = tokenize(text)
            tokens = [*found.tokens, end_of_text]
            edges = [*found.edges[:-1], len(tokens)]
            lines = text.splitlines(keepends=True) if retrieval else []
            draw = random.Random(file.sha256)
            done = 0
            for window in cut_windows(tokens, edges, length):
                example = window
                if fill_in and rate and draw.random() < rate:
                    whole = [token for token in window.input_ids if token != end_of_text]
                    example = fill_in.rearranged(
                        window, continuations(tokenizer, [whole])[0], draw, length
                    )
                if retrieval:
                    before = "".join(lines[: bisect_left(found.breaks, done)])
                    passages = retrieval(before, file.name)
                    example = TrainExample(
                        [*passages, *example.input_ids], len(passages) + example.target_start
                    )
                done += len(window.input_ids) - window.target_start
                yield example

    def evaluation_examples(
        self, source: SourceTree, tokenizer: Any, config: Config
    ) -> list[EvalExample]:
        """`eval.num_lines` lines with a letter or digit from the held-out files, by file and line.

        The choice depends only on the contents: one line from each file in turn until enough are
        found. A file's first line has no context and is never used, nor are blank lines before it.

        Raises:
            UserError: fewer than two such lines, too few for a confidence interval; or the
                tokenizer cannot fill in a middle.
        """
        chosen = _choose_lines(source, config.eval.num_lines, config.completion)
        ask = _Questions(source, tokenizer, config)
        examples: list[EvalExample] = []
        for file in source.held_out:
            if file.sha256 in chosen:
                examples += ask(file, _text(file), sorted(chosen[file.sha256]))
        if len(examples) < 2:
            raise UserError(
                f"data.source = {source.source}: {len(examples)} lines to complete in its"
                f" {len(source.held_out)} held-out files, at least 2 are needed; give a larger"
                " source or raise data.held_out_fraction"
            )
        return examples

    def end_token_ids(self, tokenizer: Any) -> list[int]:
        """The tokens that end a line: any with a "\\n" in it, and the end of the text.

        Raises:
            UserError: the tokenizer has no end-of-text token, or changes code.
        """
        end_of_text = end_of_text_id(tokenizer)
        name = tokenizer.name_or_path or type(tokenizer).__name__
        line_ends = [i for i, text in enumerate(token_texts(tokenizer)) if "\n" in text]
        if not line_ends:
            raise UserError(
                f"the tokenizer {name} cannot write a line end, so it cannot complete lines; use a"
                " model of code or of running text"
            )
        probe = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
        written = tokenizer.decode(probe, clean_up_tokenization_spaces=False)
        if written != _PROBE:
            raise UserError(
                f"the tokenizer {name} turns {_PROBE!r} into {written!r}, so it cannot complete"
                " lines of code; use a model of code or of running text"
            )
        return sorted({*line_ends, end_of_text, *ends_of_gap(tokenizer)})

    def decode(self, tokenizer: Any, example: EvalExample, token_ids: list[int]) -> str:
        """The generated line: the text up to its "\\n" or the end of the text."""
        ends = {end_of_text_id(tokenizer), *ends_of_gap(tokenizer)}
        written = [*takewhile(lambda token: token not in ends, token_ids)]
        text = continuations(tokenizer, [written])[0]
        return text.removeprefix(example.begins_with).partition("\n")[0]

    def context_shown(self, tokenizer: Any, example: EvalExample) -> str:
        """The last three lines before the answer, also where lines after it are given."""
        before = before_gap(tokenizer, example.context)
        return super().context_shown(tokenizer, replace(example, context=before))

    def score(
        self,
        examples: Sequence[EvalExample],
        predictions: Sequence[str],
        losses: Column,
        tokens: npt.NDArray[np.int64],
    ) -> Scores:
        references = [example.text for example in examples]
        exact_match = metrics.exact_matches(predictions, references)
        edit_similarity = metrics.edit_similarities(predictions, references)
        loss, line_losses = token_losses(losses, tokens)
        return Scores(
            totals={
                "exact_match": float(exact_match.mean()),
                "edit_similarity": float(edit_similarity.mean()),
                "bleu": metrics.bleu(predictions, references),
                "loss": loss,
            },
            columns={
                "exact_match": exact_match,
                "edit_similarity": edit_similarity,
                "loss": line_losses,
            },
        )


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


class _Questions:
    """Makes examples of the lines of held-out files."""

    def __init__(self, source: SourceTree, tokenizer: Any, config: Config):
        self._tokenizer = tokenizer
        self._tokenize = LineTokenizer(tokenizer)
        self._settings = config.completion
        self._longest = config.eval.max_new_tokens
        self._room = config.train.sequence_length - self._longest
        self._retrieval = None
        if config.data.retrieval:
            self._retrieval = _Retrieval(source, self._tokenize, config)
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
                example = self._example(file.name, text, found, _Place(i, start, at, end))
                if example is not None:
                    yield example
                    break

    def _example(
        self, name: str, text: str, found: TokenizedText, place: _Place
    ) -> EvalExample | None:
        if self._fill_in is not None:
            return self._gap(self._fill_in, name, text, place)
        return self._continuation(name, text, found, place)

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
        return EvalExample(
            [*passages, *found.tokens[start:first]],
            found.tokens[first : last + 1][: self._longest],
            text[place.at : place.end],
            name,
            place.line + 1,
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

    def _gap(self, fill_in: FillIn, name: str, text: str, place: _Place) -> EvalExample:
        lines = text.splitlines(keepends=True)
        nearest = self._settings.context_lines or len(lines)
        before = "".join(lines[max(place.line - nearest, 0) : place.line])
        after = "".join(lines[place.line + 1 : place.line + 1 + nearest])
        passages = self._passages(text[: place.at])
        context = fill_in.context(
            before + text[place.start : place.at], "\n" + after, self._room - len(passages)
        )
        middle = text[place.at : place.end]
        target = fill_in.target(middle)[: self._longest]
        return EvalExample([*passages, *context], target, middle, name, place.line + 1)

    def _passages(self, before: str) -> list[int]:
        # Of other files: none of the training files is held out.
        return self._retrieval(before, None) if self._retrieval else []


class _Retrieval:
    """The tokens of passages that resemble the end of a text, the best one last."""

    def __init__(self, source: SourceTree, tokenize: LineTokenizer, config: Config):
        self.room = (config.train.sequence_length - config.eval.max_new_tokens) // 2
        self._k = config.data.retrieval
        self._tokenize = tokenize
        self._retriever = Retriever(
            [passage for file in source.train for passage in passages_of(file.name, _text(file))]
        )

    def __call__(self, before: str, name: str | None) -> list[int]:
        """As many whole lines of the best passages as fit in `room`, none of the file `name`."""
        line_end = self._tokenize("\n", "x").tokens
        pieces: list[list[int]] = []
        left = self.room
        for passage in self._retriever.nearest(query_of(before), self._k, name):
            header = f"{comment_mark(passage.name)} {passage.name}\n"
            found = self._tokenize(header + passage.text)
            fitting = [edge for edge in found.edges if edge <= left - len(line_end)]
            if len(fitting) < 3:  # no line of it after the header
                break
            piece = found.tokens[: fitting[-1]]
            if not self._tokenize.texts[piece[-1]].endswith("\n"):
                piece = [*piece, *line_end]
            pieces.append(piece)
            left -= len(piece)
        return [token for piece in reversed(pieces) for token in piece]


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


def _choose_lines(
    source: SourceTree, num_lines: int, settings: CompletionConfig
) -> dict[str, list[int]]:
    """Hash of each file -> indices of its lines to complete."""
    candidates: dict[str, list[int]] = {}
    # By hash: if not every file contributes, the choice does not depend on the file names.
    for file in sorted(source.held_out, key=lambda file: file.sha256):
        lines = _text(file).split("\n")
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


def _text(file: SourceFile) -> str:
    try:
        text = read_text(file.path)
    except OSError as error:
        raise UserError(
            f"{file.path}: {error.strerror}; let no other program change the source meanwhile"
        ) from None
    if text is None or hashlib.sha256(text.encode()).hexdigest() != file.sha256:
        raise UserError(
            f"{file.path} changed while it was read; let no other program change the source"
            " meanwhile"
        )
    return text
