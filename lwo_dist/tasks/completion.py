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

import random
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lwo_dist.config import Config, DataConfig
from lwo_dist.data.examples import (
    EvalExample,
    LineTokenizer,
    Note,
    TrainExample,
    continuations,
    cut_windows,
    end_of_text_id,
    text_start,
    token_texts,
)
from lwo_dist.data.fill_in import FillIn, before_gap, ends_of_gap
from lwo_dist.data.pairs import Pairs
from lwo_dist.data.public import read_public
from lwo_dist.data.source_tree import SourceTree, read_source_tree, source_text
from lwo_dist.errors import UserError

from . import metrics
from .base import LOSS, LOSS_PER_BYTE, Task, byte_losses, token_losses
from .chosen_lines import Questions, choose_lines
from .given_lines import given_lines, windows_of
from .passages import Passages
from .scores import Column, Score, Scores

__all__ = ["LineCompletion"]

_PROBE = "if x:\n\n    y = f( 'a  b' )\n\treturn\n"


class LineCompletion(Task):
    """`task: completion`."""

    name = "completion"
    retrieves = True
    example = ("line", "lines")
    formats = ("code", "jsonl", "codexglue-completion", "repobench", "crosscodeeval")
    version = 2
    scores = (
        Score("exact_match", "exact match", "%", headline=True, count_label="lines exactly right"),
        Score("edit_similarity", "edit similarity", "%"),
        Score("bleu", "BLEU", per_example=False),
        LOSS,
        LOSS_PER_BYTE,
    )

    def check(self, config: Config) -> None:
        """Also refuses settings about chosen lines where a data set gives the lines."""
        super().check(config)
        own = config.completion.model_dump(exclude_defaults=True)
        settings = [f"completion.{name}" for name in own]
        settings += ["data.retrieval"] if config.data.retrieval else []
        if config.data.format != "code" and settings:
            raise UserError(
                f"{settings[0]} has no effect with data.format = {config.data.format}, which gives"
                " the lines and their contexts; drop it"
            )

    def read(self, config: DataConfig, cache: Path) -> SourceTree | Pairs:
        """The usable files, split by file; of a data set, contexts and their lines."""
        if config.format != "code":
            return read_public(config)
        return read_source_tree(config, cache)

    def training_examples(
        self, source: SourceTree | Pairs, tokenizer: Any, config: Config
    ) -> Iterator[TrainExample]:
        """Windows of whole lines from one file; the end-of-text token after them is learned too.

        With `completion.fim_rate` a share of them, drawn by the file's hash, fills in a middle.
        With `data.retrieval_in_training` each begins with passages that resemble the lines before
        what is learned; they are not learned.
        """
        if isinstance(source, Pairs):
            yield from windows_of(source, tokenizer, config)
            return
        tokenize = LineTokenizer(tokenizer)
        rate = config.completion.fim_rate
        fill_in = None if rate is None else FillIn.of(tokenizer, tokenize)
        retrieval = None
        if config.data.retrieval_in_training:
            retrieval = Passages(source, tokenize, config)
        start = text_start(tokenizer)
        room = config.train.sequence_length - len(start) - (retrieval.room if retrieval else 0)
        length = max(room - FillIn.extra, 1) if rate else room
        end_of_text = end_of_text_id(tokenizer)
        for file in source.train:
            text = source_text(file)
            found = tokenize(text)
            tokens = [*found.tokens, end_of_text]
            edges = [*found.edges[:-1], len(tokens)]
            lines = text.split("\n") if retrieval else []
            draw = random.Random(file.sha256)
            done = 0
            for window in cut_windows(tokens, edges, length):
                example = window
                if fill_in and rate and draw.random() < rate:
                    whole = [token for token in window.input_ids if token != end_of_text]
                    example = fill_in.rearranged(
                        window, continuations(tokenizer, [whole])[0], draw, room
                    )
                before = start
                if retrieval:
                    known = "".join(
                        f"{line}\n" for line in lines[: bisect_left(found.breaks, done)]
                    )
                    before = [*start, *retrieval(known, file.name)]
                yield example.after(before)
                done += window.learned

    def evaluation_examples(
        self, source: SourceTree | Pairs, tokenizer: Any, config: Config
    ) -> Sequence[EvalExample | Note]:
        """`eval.num_lines` lines with a letter or digit from the held-out files, by file and line.

        The choice depends only on the contents: one line from each file in turn until enough are
        found. A file's first line has no context and is never used, nor are blank lines before it.

        Raises:
            UserError: fewer than two such lines, too few for a confidence interval; or the
                tokenizer cannot fill in a middle.
        """
        if isinstance(source, Pairs):
            return given_lines(source, tokenizer, config)
        chosen = choose_lines(source, config.eval.num_lines, config.completion)
        ask = Questions(source, tokenizer, config)
        examples: list[EvalExample] = []
        for file in source.held_out:
            if file.sha256 in chosen:
                examples += ask(file, source_text(file), sorted(chosen[file.sha256]))
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
        """The last three lines before the answer, without special tokens before and after them."""
        before = list(before_gap(tokenizer, example.context))
        start = text_start(tokenizer)
        if before[: len(start)] == start:
            before = before[len(start) :]
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
        loss_per_byte, byte_column = byte_losses(losses, examples)
        return Scores(
            totals={
                "exact_match": float(exact_match.mean()),
                "edit_similarity": float(edit_similarity.mean()),
                "bleu": metrics.bleu(predictions, references),
                "loss": loss,
                "loss_per_byte": loss_per_byte,
            },
            columns={
                "exact_match": exact_match,
                "edit_similarity": edit_similarity,
                "loss": line_losses,
                "loss_per_byte": byte_column,
            },
        )
