"""What is learned: each task is a module of the same shape, named in `TASKS`."""

from __future__ import annotations

from typing import Any, Protocol

from lwo_dist.data.dataset import ExampleMaker

from . import completion

__all__ = ["TASKS", "Task"]


class Task(ExampleMaker, Protocol):
    """What a task module offers: `ExampleMaker` makes examples of the input, the rest reads what a
    model writes.
    """

    def decode(self, tokenizer: Any, token_ids: list[int]) -> str:
        """The answer in the generated tokens, which may go on beyond its end."""


TASKS: dict[str, Task] = {completion.NAME: completion}
