"""The base class of tasks whose targets are a few answers: the most probable one is chosen."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from lwo_dist.config import Config, DataConfig
from lwo_dist.data.examples import EvalExample, Note, scored_bytes
from lwo_dist.data.pairs import Pair, Pairs
from lwo_dist.errors import UserError

from .pairs import PairTask, cut_context
from .prompts import Prompts

__all__ = ["ChoiceTask"]


class ChoiceTask(PairTask):
    """A task whose targets are a few answers: the most probable one is chosen.

    The loss is that of the right answer, without the token that ends it.
    """

    answers: ClassVar[tuple[str, ...]]

    def read(self, config: DataConfig, cache: Path) -> Pairs:
        """As `PairTask.read`.

        Raises:
            UserError: also for a target that is not among the answers, and for a side with one
                answer alone.
        """
        found = super().read(config, cache)
        for side, pairs in (("train", found.train), ("held-out", found.held_out)):
            for pair in pairs:
                if pair.target not in self.answers:
                    raise UserError(
                        f"data.source = {found.source}: {pair.name}, line {pair.line} has the"
                        f" answer {pair.target[:40]!r}; give {' or '.join(self.answers)}"
                    )
            if len(kinds := {pair.target for pair in pairs}) == 1:
                raise UserError(
                    f"data.source = {found.source}: the answer of all {len(pairs)} {side} examples"
                    f" is {kinds.pop()!r}; give examples of {' and '.join(self.answers)}"
                )
        return found

    def evaluation_example(
        self, prompts: Prompts, tokenizer: Any, pair: Pair, config: Config
    ) -> list[EvalExample | Note]:
        length = config.train.sequence_length
        found = prompts(pair, self.answers, lambda text: len(text.tokens) <= length)
        if isinstance(found, Note):
            return [found]
        right = found[self.answers.index(pair.target)]
        context = right.tokens[: right.start]
        if any(text.tokens[: text.start] != context for text in found):
            return [Note("answers of which the prompt's tokens depend")]
        choices = [text.tokens[text.start :] for text in found]
        limit = length - max(map(len, choices))
        context, notes = cut_context(context, limit, prompts.begin)
        target = right.tokens[right.start :]
        example = EvalExample(
            context,
            target,
            pair.target,
            pair.name,
            pair.line,
            right.begins_with,
            scored_bytes(tokenizer, self.before_target(context), target),
            choices,
        )
        return [example, *notes]
