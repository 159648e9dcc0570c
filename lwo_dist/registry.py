"""What a config chooses by name: methods, strategies and tasks, and where each is implemented.

A new one is a class in a file of its own and a line here. One that lives outside of the package
needs no line: the config names it as `module:Class`, and every worker imports it from there.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import cache
from typing import Any

from .errors import UserError, first_line

__all__ = ["METHODS", "STRATEGIES", "TASKS", "Registry"]


class Registry:
    """Names and the classes behind them. Nothing is imported before it is asked for.

    Args:
        key: the setting that holds the name, for messages.
        known: name -> `module:Class`.
    """

    def __init__(self, key: str, known: Mapping[str, str]):
        self.key = key
        self._known = dict(known)

    @property
    def names(self) -> tuple[str, ...]:
        """The names that the package itself knows."""
        return tuple(self._known)

    def check(self, name: str) -> str:
        """Return `name` if it is known or has the form `module:Class`; nothing is imported.

        Raises:
            ValueError: neither.
        """
        if name in self._known or all(name.partition(":")):
            return name
        raise ValueError(
            f"{name!r} must be one of {', '.join(self.names)}, or module:Class of your own"
        )

    def get(self, name: str) -> Any:
        """The one instance behind `name`.

        Raises:
            UserError: an unknown name, or a `module:Class` that cannot be imported or made.
        """
        try:
            target = self._known.get(self.check(name), name)
        except ValueError as error:
            raise UserError(f"{self.key}: {error}") from None
        return _instance(self.key, target)

    def all(self) -> list[Any]:
        """Every implementation of the package itself, in the order of the names."""
        return [self.get(name) for name in self.names]


@cache
def _instance(key: str, target: str) -> Any:
    module, _, name = target.partition(":")
    try:
        return getattr(importlib.import_module(module), name)()
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{key} = {target} cannot be used ({type(error).__name__}: {first_line(error)}); "
            "give module:Class of a module that every worker can import"
        ) from error


METHODS = Registry(
    "method",
    {
        "lwo": "lwo_dist.methods.lwo:LayerWise",
        "full": "lwo_dist.methods.full:FullFineTuning",
    },
)
STRATEGIES = Registry(
    "strategy",
    {
        "replicate": "lwo_dist.strategies.replicate:ReplicateBuilder",
        "fsdp": "lwo_dist.strategies.fsdp.builder:FSDPBuilder",
        "deepspeed": "lwo_dist.strategies.deepspeed.builder:DeepSpeedBuilder",
    },
)
TASKS = Registry("task", {"completion": "lwo_dist.tasks.completion:LineCompletion"})
