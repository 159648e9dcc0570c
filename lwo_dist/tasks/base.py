"""The interface of a task: its examples, its answers and their scores.

A new task is a subclass of `Task` in its own file, and a line in `registry.TASKS`. A task outside
the package needs no line: `task: my_package.my_module:MyTask`.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from lwo_dist.config import Config, DataConfig
from lwo_dist.data.examples import EvalExample, Note, TrainExample
from lwo_dist.errors import UserError

from .scores import Column, Score, Scores, ScoreSheet

__all__ = ["LOSS", "LOSS_PER_BYTE", "Source", "Task", "byte_losses", "token_losses"]

LOSS = Score(
    "loss",
    "loss",
    "nats per token",
    higher_is_better=False,
    digits=3,
    headline=True,
    weight="token",
)
"""Loss of the reference answer, from `token_losses`. Every task that learns tokens has it."""

LOSS_PER_BYTE = Score(
    "loss_per_byte",
    "loss per byte",
    "nats per UTF-8 byte",
    higher_is_better=False,
    digits=4,
    weight="byte",
)
"""The same loss, from `byte_losses`: it compares models whose tokens differ."""


class Source(Protocol):
    """What a task reads its examples from."""

    @property
    def identity(self) -> Any:
        """JSON values that change whenever the examples would change."""

    @property
    def counts(self) -> Mapping[str, Any]:
        """Counts for display: how much was read and skipped."""


class Task(ABC):
    """What is learned. The package keeps one instance per class, created without arguments."""

    name: ClassVar[str]
    """Prefix of its folders of prepared examples: letters, digits and underscores."""
    scores: ClassVar[tuple[Score, ...]]
    """In the order of every table, most informative first."""
    formats: ClassVar[tuple[str, ...]] = ("code",)
    """The values of `data.format` that it reads."""
    retrieves: ClassVar[bool] = False
    """Whether it puts `data.retrieval` pieces of the training data before its contexts."""
    fits_encoder_decoders: ClassVar[bool] = False
    """Whether its examples can be a text for an encoder and one for a decoder; `encodes` then says
    that they are to be."""
    encodes: bool = False
    example: ClassVar[tuple[str, str]] = ("example", "examples")
    """Display name of one held-out example and of many; the plural has no spaces, because
    `eval/<many>` counts them."""
    version: ClassVar[int] = 1
    """Increase it when the same source would yield different examples; existing prepared ones are
    then not used."""

    @property
    def sheet(self) -> ScoreSheet:
        return ScoreSheet(self.scores, self.example)

    def score_named(self, name: str) -> Score:
        """The score with this name. Raises: KeyError."""
        return {score.name: score for score in self.scores}[name]

    def check(self, config: Config) -> None:
        """Refuse settings that cannot work, before anything is read.

        Raises:
            UserError: `eval.metric` is not a score of this task, `data.format` is not one that it
                reads, or answers leave no room for their context.
        """
        if config.data.format not in self.formats:
            raise UserError(
                f"data.format = {config.data.format} does not fit the task {self.name}, which reads"
                f" {', '.join(self.formats)}; change one of the two"
            )
        if config.data.retrieval and not self.retrieves:
            raise UserError(
                f"data.retrieval = {config.data.retrieval} has no effect with the task"
                f" {self.name}; drop it"
            )
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

    def for_encoder_decoder(self, config: Config) -> Task:
        """This task with examples for an encoder-decoder.

        Raises:
            UserError: it has none, or a setting is for decoders alone.
        """
        model = f"model.name {config.model.name!r} is an encoder-decoder"
        if not self.fits_encoder_decoders:
            raise UserError(
                f"the task {self.name} needs a decoder-only model, and {model}; give a decoder,"
                " such as Qwen2, or a task from text to text, such as summarisation"
            )
        settings = {
            "train.packing": config.train.packing,
            "data.chat": config.data.chat,
            "data.retrieval": config.data.retrieval,
        }
        for key, value in settings.items():
            if value:
                raise UserError(f"{key} = {value} is for decoders, and {model}; drop it")
        found = copy.copy(self)
        found.encodes = True
        return found

    @abstractmethod
    def read(self, config: DataConfig, cache: Path) -> Source:
        """Locate and filter the data. Raises: UserError if there is none to use."""

    @abstractmethod
    def training_examples(
        self, source: Any, tokenizer: Any, config: Config
    ) -> Iterator[TrainExample | Note]:
        """Examples of at most `train.sequence_length` tokens, in a fixed order; and a note on each
        that is left out."""

    @abstractmethod
    def evaluation_examples(
        self, source: Any, tokenizer: Any, config: Config
    ) -> Sequence[EvalExample | Note]:
        """Up to `eval.num_lines` examples, at least two, in a fixed order; and notes on them.

        Context and target together have at most `train.sequence_length` tokens, the target at most
        `eval.max_new_tokens`.
        """

    @abstractmethod
    def end_token_ids(self, tokenizer: Any) -> list[int]:
        """The tokens that end an answer.

        Raises:
            UserError: the tokenizer has none, so it cannot be used for this task.
        """

    @abstractmethod
    def decode(self, tokenizer: Any, example: EvalExample, token_ids: list[int]) -> str:
        """The answer in the generated tokens, which begin with `example.begins_with` and may
        continue past the answer's end."""

    @abstractmethod
    def score(
        self,
        examples: Sequence[EvalExample],
        predictions: Sequence[str],
        losses: Column,
        tokens: npt.NDArray[np.int64],
    ) -> Scores:
        """Compute all of `scores`: a total for each, and per-example values where they exist.

        Args:
            predictions: the answer to each example, from `decode`.
            losses: [examples], nats; the summed loss of each target.
            tokens: [examples], tokens of each target.
        """

    def context_shown(self, tokenizer: Any, example: EvalExample) -> str:
        """The end of the context to show beside an answer: its last three lines."""
        text = str(
            tokenizer.decode(
                list(example.context),
                clean_up_tokenization_spaces=False,
                skip_special_tokens=self.encodes,  # they end the text
            )
        )
        text += example.begins_with
        return "\n".join(text.removesuffix("\n").split("\n")[-3:])


def token_losses(losses: Column, tokens: npt.NDArray[np.int64]) -> tuple[float, Column]:
    """`LOSS` in nats: the mean over all tokens, and [examples] the mean over each one's tokens."""
    return float(losses.sum() / tokens.sum()), losses / tokens


def byte_losses(losses: Column, examples: Sequence[EvalExample]) -> tuple[float, Column]:
    """`LOSS_PER_BYTE` in nats: the mean over all bytes, and [examples] over each one's bytes."""
    sizes = np.array([example.target_bytes for example in examples])
    return float(losses.sum() / sizes.sum()), losses / sizes
