"""The base class of tasks from text to text: given a source, write or choose the target.

Prompt, target and the token that ends them are tokenised as one text, and only what follows the
prompt is learned. Prompts are plain text, for base models; the page of the tasks shows them. Each
ends with a line break, which is a border of tokens for most tokenizers: where the target's
indentation is in the same token, that token is the first to generate, as in line completion.

With `data.chat` the prompt is a user's message, written by the model's own chat template, and the
target ends as that template ends a message.

For an encoder-decoder the prompt is the encoder's text and the target the decoder's, each with the
special tokens that the tokenizer puts around texts.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy.typing as npt

from lwo_dist.config import Config, DataConfig
from lwo_dist.data.examples import (
    EvalExample,
    Note,
    PromptedText,
    TrainExample,
    end_of_text_id,
    scored_bytes,
    text_after,
)
from lwo_dist.data.pairs import Pair, Pairs
from lwo_dist.data.public import read_public
from lwo_dist.errors import UserError

from . import metrics
from .base import LOSS, LOSS_PER_BYTE, Task, byte_losses, token_losses
from .prompts import Prompts, end_of_message
from .scores import Column, Score, Scores

__all__ = ["CODE_SCORES", "PairTask", "choose", "cut_context"]

EXACT_MATCH = Score(
    "exact_match", "exact match", "%", headline=True, count_label="answers exactly right"
)
EDIT_SIMILARITY = Score("edit_similarity", "edit similarity", "%")
BLEU = Score("bleu", "BLEU", headline=True, per_example=False)
CODEXGLUE_BLEU = Score("codexglue_bleu", "CodeXGLUE's BLEU", per_example=False)
CODE_SCORES = (EXACT_MATCH, BLEU, CODEXGLUE_BLEU, EDIT_SIMILARITY, LOSS, LOSS_PER_BYTE)
"""Of a task that writes code."""


class PairTask(Task):
    """What tasks from text to text have in common."""

    example = ("answer", "answers")
    retrieves = True
    fits_encoder_decoders = True

    def read(self, config: DataConfig, cache: Path) -> Pairs:
        """The usable pairs of the source, split.

        Raises:
            UserError: a source that cannot be read, or has too few pairs.
        """
        if config.format == "code":
            return self.read_code(config, cache)
        return read_public(config)

    @abstractmethod
    def read_code(self, config: DataConfig, cache: Path) -> Pairs:
        """The pairs in files of code, or in a git history."""

    @abstractmethod
    def prompt(self, pair: Pair) -> str:
        """The text before the target, for a base model."""

    @abstractmethod
    def request(self, pair: Pair) -> str:
        """What a user asks of a chat model."""

    def training_examples(
        self, source: Pairs, tokenizer: Any, config: Config
    ) -> Iterator[TrainExample | Note]:
        """One example a pair. A pair that is longer than `train.sequence_length` is left out.

        With `data.retrieval_in_training` each begins with worked examples; they are not learned.
        """
        prompts = self._prompts(
            tokenizer, config.data, source, with_examples=config.data.retrieval_in_training
        )

        def fits(text: PromptedText) -> bool:
            return len(text.tokens) + 1 <= config.train.sequence_length

        for pair in source.train:
            found = prompts(pair, [pair.target], fits)
            if isinstance(found, Note):
                yield found
            elif not fits(found[0]):
                yield Note("longer than train.sequence_length")
            else:
                yield TrainExample([*found[0].tokens, prompts.end], found[0].start)

    def evaluation_examples(
        self, source: Pairs, tokenizer: Any, config: Config
    ) -> list[EvalExample | Note]:
        """`eval.num_lines` of the held-out pairs, those with the lowest hashes, in their order.

        A context that leaves no room for an answer is cut at its front. With `data.retrieval` it
        begins with as many worked examples as leave room for all of it.

        Raises:
            UserError: fewer than two, too few for a confidence interval.
        """
        prompts = self._prompts(
            tokenizer, config.data, source, with_examples=config.data.retrieval > 0
        )
        return choose(
            source,
            lambda pair: self.evaluation_example(prompts, tokenizer, pair, config),
            config.eval.num_lines,
            self.example[1],
        )

    def _prompts(
        self, tokenizer: Any, config: DataConfig, source: Pairs, *, with_examples: bool
    ) -> Prompts:
        ask = self.request if config.chat else self.prompt
        return Prompts(
            ask, tokenizer, config, source, with_examples=with_examples, encodes=self.encodes
        )

    def evaluation_example(
        self, prompts: Prompts, tokenizer: Any, pair: Pair, config: Config
    ) -> list[EvalExample | Note]:
        """The example of a held-out pair, if it can be scored, and notes on it."""
        limit = config.train.sequence_length - config.eval.max_new_tokens
        found = prompts(pair, [pair.target], lambda text: text.start <= limit)
        if isinstance(found, Note):
            return [found]
        (text,) = found
        target = [*text.tokens[text.start :], prompts.end]
        context, notes = cut_context(text.tokens[: text.start], limit, prompts.begin)
        if self.encodes and text_after(tokenizer, [], target) != pair.target:
            notes.append(Note("target that the tokenizer does not keep"))
        if len(target) > config.eval.max_new_tokens:
            notes.append(Note("target cut to eval.max_new_tokens"))
            target = target[: config.eval.max_new_tokens]
        example = EvalExample(
            context,
            target,
            pair.target,
            pair.name,
            pair.line,
            text.begins_with,
            scored_bytes(tokenizer, self.before_target(context), target),
            ends_with=prompts.ends_with,
        )
        return [example, *notes]

    def before_target(self, context: Sequence[int]) -> Sequence[int]:
        """The tokens that a target's text follows."""
        return [] if self.encodes else context

    def end_token_ids(self, tokenizer: Any) -> list[int]:
        """The end of the text, and of a message where the tokenizer has a chat template.

        Raises:
            UserError: the tokenizer has no end-of-text token.
        """
        ends = {end_of_text_id(tokenizer)}
        with suppress(UserError):  # no template, or one that a chat would be refused for
            ends.add(end_of_message(tokenizer))
        return sorted(ends)

    def decode(self, tokenizer: Any, example: EvalExample, token_ids: list[int]) -> str:
        """The text up to the first token that ends an answer; its first line, where no target has
        more."""
        ends = set(self.end_token_ids(tokenizer))
        end = next((i for i, token in enumerate(token_ids) if token in ends), len(token_ids))
        text = text_after(tokenizer, self.before_target(example.context), token_ids[:end])
        text = text.removeprefix(example.begins_with)
        if example.ends_with:
            text = text.lstrip(example.ends_with).partition(example.ends_with)[0]
        return text

    def score(
        self,
        examples: Sequence[EvalExample],
        predictions: Sequence[str],
        losses: Column,
        tokens: npt.NDArray[Any],
    ) -> Scores:
        """Those of `compare`, and the losses."""
        found = self.compare(predictions, [example.text for example in examples])
        loss, token_column = token_losses(losses, tokens)
        per_byte, byte_column = byte_losses(losses, examples)
        return Scores(
            totals={**found.totals, "loss": loss, "loss_per_byte": per_byte},
            columns={**found.columns, "loss": token_column, "loss_per_byte": byte_column},
        )

    def compare(self, predictions: Sequence[str], references: Sequence[str]) -> Scores:
        """The scores of the answers alone: of code."""
        columns = {
            "exact_match": metrics.exact_matches(predictions, references),
            "edit_similarity": metrics.edit_similarities(predictions, references),
        }
        totals = {name: float(column.mean()) for name, column in columns.items()}
        totals["bleu"] = metrics.bleu(predictions, references)
        totals["codexglue_bleu"] = metrics.codexglue_bleu(predictions, references)
        return Scores(totals, columns)


def choose(
    source: Pairs,
    make: Callable[[Pair], list[EvalExample | Note]],
    count: int,
    many: str,
) -> list[EvalExample | Note]:
    """The examples of `count` of the held-out pairs, those with the lowest hashes, in their order.

    Args:
        make: the example of a pair, and notes on it.
        many: what they are called.

    Raises:
        UserError: fewer than two, too few for a confidence interval.
    """
    made: dict[Pair, list[EvalExample | Note]] = {}
    missing = count
    for pair in sorted(source.held_out, key=lambda pair: pair.sha256):
        if missing:
            made[pair] = make(pair)
            missing -= any(isinstance(item, EvalExample) for item in made[pair])
    found = [item for pair in source.held_out for item in made.get(pair, [])]
    usable = sum(isinstance(item, EvalExample) for item in found)
    if usable < 2:
        reasons = Counter(item.reason for item in found if isinstance(item, Note))
        shown = ", ".join(f"{n} {reason}" for reason, n in sorted(reasons.items()))
        raise UserError(
            f"data.source = {source.source}: {usable} of {len(source.held_out)} held-out {many} can"
            f" be scored (skipped: {shown or 'none'}), at least 2 are needed; give a larger source"
            " or raise data.held_out_fraction"
        )
    return found


def cut_context(
    context: Sequence[int], limit: int, begin: Sequence[int]
) -> tuple[list[int], list[EvalExample | Note]]:
    """The last `limit` tokens of a context, of which `begin` are still the first; and a note if it
    was cut.
    """
    if len(context) <= limit:
        return list(context), []
    cut = [*begin, *context[len(context) - limit + len(begin) :]]
    return cut, [Note("context cut at its front")]
