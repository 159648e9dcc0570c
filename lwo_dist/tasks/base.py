"""The contract of a task: which examples there are, what an answer is, and how it is scored.

A new task is one file with a subclass of `Task`, and a line in `registry.TASKS`. One that lives
outside of the package needs no line: `task: my_package.my_module:MyTask`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from lwo_dist.config import Config, DataConfig
from lwo_dist.data.examples import EvalExample, TrainExample
from lwo_dist.errors import UserError

from .scores import Column, Score, Scores, ScoreSheet

__all__ = ["LOSS", "Source", "Task", "token_losses"]

LOSS = Score("loss", "loss", "nats", higher_is_better=False, digits=3, headline=True)
"""Of the reference answer, as `token_losses` gives it. Every task that learns tokens has it."""


class Source(Protocol):
    """What a task reads its examples from."""

    @property
    def identity(self) -> Any:
        """JSON values that change when the examples would."""

    @property
    def counts(self) -> Mapping[str, Any]:
        """Numbers for people: how much was read and skipped."""


class Task(ABC):
    """What is learned. The package keeps one instance of a class, made without arguments."""

    name: ClassVar[str]
    """Begins the names of its folders of prepared examples: letters, digits and underscores."""
    scores: ClassVar[tuple[Score, ...]]
    """In the order of every table, the most telling first."""
    example: ClassVar[tuple[str, str]] = ("example", "examples")
    """What people call one held-out example and many; the second is a word without spaces, as
    `eval/<many>` counts them."""
    version: ClassVar[int] = 1
    """Raise it when the same source would give other examples: those prepared before are then not
    used."""

    @property
    def sheet(self) -> ScoreSheet:
        return ScoreSheet(self.scores, self.example)

    def score_named(self, name: str) -> Score:
        """The score of this name. Raises: KeyError."""
        return {score.name: score for score in self.scores}[name]

    def check(self, config: Config) -> None:
        """Refuse what cannot work, before anything is read.

        Raises:
            UserError: `eval.metric` is not a score of this task, or an answer leaves no room for
                its context.
        """
        names = [score.name for score in self.scores]
        if config.eval.metric not in names:
            raise UserError(
                f"eval.metric = {config.eval.metric!r} is not a score of the task {self.name}; give"
                f" one of {', '.join(names)}"
            )
        if config.eval.max_new_tokens >= config.train.sequence_length:
            raise UserError(
                f"eval.max_new_tokens = {config.eval.max_new_tokens} leaves no room for a context"
                f" in train.sequence_length = {config.train.sequence_length}; make it smaller"
            )

    @abstractmethod
    def read(self, config: DataConfig, cache: Path) -> Source:
        """Find the data and judge it. Raises: UserError where there is none to use."""

    @abstractmethod
    def training_examples(
        self, source: Any, tokenizer: Any, config: Config
    ) -> Iterator[TrainExample]:
        """Examples of at most `train.sequence_length` tokens, in a fixed order."""

    @abstractmethod
    def evaluation_examples(self, source: Any, tokenizer: Any, config: Config) -> list[EvalExample]:
        """Up to `eval.num_lines` examples, at least two, in a fixed order; context and target
        together have at most `train.sequence_length` tokens, the target at most
        `eval.max_new_tokens`.
        """

    @abstractmethod
    def end_token_ids(self, tokenizer: Any) -> list[int]:
        """The tokens after which an answer has ended.

        Raises:
            UserError: the tokenizer has none, so it cannot be used for this task.
        """

    @abstractmethod
    def decode(self, tokenizer: Any, token_ids: list[int]) -> str:
        """The answer in the generated tokens, which may go on beyond its end."""

    @abstractmethod
    def score(
        self,
        examples: Sequence[EvalExample],
        predictions: Sequence[str],
        losses: Column,
        tokens: npt.NDArray[np.int64],
    ) -> Scores:
        """The value of everything in `scores`: a total each, and a column where it is per example.

        Args:
            predictions: what `decode` made of each example's answer.
            losses: [examples], nats; the summed loss of each target.
            tokens: [examples], tokens of each target.
        """

    def context_shown(self, tokenizer: Any, example: EvalExample) -> str:
        """The end of the context, to show beside an answer: its last three lines."""
        text = str(tokenizer.decode(list(example.context), clean_up_tokenization_spaces=False))
        return "\n".join(text.removesuffix("\n").split("\n")[-3:])


def token_losses(losses: Column, tokens: npt.NDArray[np.int64]) -> tuple[float, Column]:
    """`LOSS` in nats: the mean over the tokens of all examples, and [examples] the mean over each
    one's own tokens.
    """
    return float(losses.sum() / tokens.sum()), losses / tokens
