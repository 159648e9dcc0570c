"""Line completion: given the lines before, write the next one.

Files are tokenised whole, in training and in evaluation, as in the model's pretraining. Every line
of a training window is an example, because each is predicted from the lines before it.

A held-out line's context ends before the token with the preceding line end, as that token may also
hold the line's indentation. It is the first token to generate, and must begin with the text up to
the line end, which is known; the rest of the answer is free. So no token of the context tells more
about the line than the text before it does.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
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
    context_start,
    cut_windows,
    end_of_text_id,
    scored_bytes,
    token_texts,
)
from lwo_dist.data.pairs import Pairs
from lwo_dist.data.public import read_public
from lwo_dist.data.source_tree import SourceFile, SourceTree, read_source_tree, read_text
from lwo_dist.errors import UserError

from . import metrics
from .base import LOSS, LOSS_PER_BYTE, Task, byte_losses, token_losses
from .given_lines import given_lines, windows_of
from .scores import Column, Score, Scores

__all__ = ["LineCompletion"]

_PROBE = "if x:\n\n    y = f( 'a  b' )\n\treturn\n"


class LineCompletion(Task):
    """`task: completion`."""

    name = "completion"
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

    def read(self, config: DataConfig, cache: Path) -> SourceTree | Pairs:
        """The usable files, split by file; of a data set, contexts and their lines."""
        if config.format != "code":
            return read_public(config)
        return read_source_tree(config, cache)

    def training_examples(
        self, source: SourceTree | Pairs, tokenizer: Any, config: Config
    ) -> Iterator[TrainExample]:
        """Windows of whole lines from one file; the end-of-text token after them is learned too."""
        if isinstance(source, Pairs):
            yield from windows_of(source, tokenizer, config)
            return
        end_of_text = end_of_text_id(tokenizer)
        tokenize = LineTokenizer(tokenizer)
        for file in source.train:
            found = tokenize(_text(file))
            tokens = [*found.tokens, end_of_text]
            edges = [*found.edges[:-1], len(tokens)]
            yield from cut_windows(tokens, edges, config.train.sequence_length)

    def evaluation_examples(
        self, source: SourceTree | Pairs, tokenizer: Any, config: Config
    ) -> Sequence[EvalExample | Note]:
        """`eval.num_lines` lines with a letter or digit from the held-out files, by file and line.

        The choice depends only on the contents: one line from each file in turn until enough are
        found. A file's first line has no context and is never used, nor are blank lines before it.

        Raises:
            UserError: fewer than two such lines, too few for a confidence interval.
        """
        if isinstance(source, Pairs):
            return given_lines(source, tokenizer, config)
        chosen = _choose_lines(source, config.eval.num_lines)
        limit = config.train.sequence_length - config.eval.max_new_tokens
        tokenize = LineTokenizer(tokenizer)
        examples = []
        for file in source.held_out:
            if file.sha256 not in chosen:
                continue
            text = _text(file)
            lines = text.split("\n")
            found = tokenize(text)
            for i in sorted(chosen[file.sha256]):
                first, last = found.breaks[i - 1 : i + 1]
                if first == 0 or first == last:  # the line is within one token
                    continue
                context = found.tokens[context_start(found.edges, first, limit) : first]
                target = found.tokens[first : last + 1][: config.eval.max_new_tokens]
                begin, line_end, _ = tokenize.texts[target[0]].rpartition("\n")
                examples.append(
                    EvalExample(
                        context,
                        target,
                        lines[i],
                        file.name,
                        i + 1,
                        begin + line_end,
                        scored_bytes(tokenizer, context, target),
                    )
                )
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
        return sorted({*line_ends, end_of_text})

    def decode(self, tokenizer: Any, example: EvalExample, token_ids: list[int]) -> str:
        """The generated line: the text up to its "\\n" or the end of the text."""
        end_of_text = end_of_text_id(tokenizer)
        if end_of_text in token_ids:
            token_ids = token_ids[: token_ids.index(end_of_text)]
        text = str(tokenizer.decode(token_ids, clean_up_tokenization_spaces=False))
        return text.removeprefix(example.begins_with).partition("\n")[0]

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


def _choose_lines(source: SourceTree, num_lines: int) -> dict[str, list[int]]:
    """Hash of each file -> indices of its lines to complete."""
    candidates: dict[str, list[int]] = {}
    # By hash: if not every file contributes, the choice does not depend on the file names.
    for file in sorted(source.held_out, key=lambda file: file.sha256):
        lines = _text(file).split("\n")
        first = next(i for i, line in enumerate(lines) if line.strip())
        worth = [i for i, line in enumerate(lines) if i > first and any(map(str.isalnum, line))]
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
