"""Methods, strategies and tasks that a config selects by name, and where each is implemented.

To add one, write a class in its own file and add a line here. A class outside the package needs no
line: the config names it as `module:Class`, and every worker imports it from there.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import cache
from typing import Any

from .errors import UserError, first_line

__all__ = ["METHODS", "STRATEGIES", "TASKS", "Registry"]


class Registry:
    """Names and the classes behind them. Nothing is imported until it is requested.

    Args:
        key: the setting that holds the name, used in messages.
        known: built-in name -> `module:Class`.
    """

    def __init__(self, key: str, known: Mapping[str, str]):
        self.key = key
        self._known = dict(known)

    @property
    def names(self) -> tuple[str, ...]:
        """Built-in names."""
        return tuple(self._known)

    def check(self, name: str) -> str:
        """Return `name` if it is built in or has the form `module:Class`; nothing is imported.

        Raises:
            ValueError: `name` is neither.
        """
        if name in self._known or all(name.partition(":")):
            return name
        raise ValueError(
            f"{name!r} must be one of {', '.join(self.names)}, or module:Class of your own"
        )

    def get(self, name: str) -> Any:
        """The single instance for `name`.

        Raises:
            UserError: an unknown name, or a `module:Class` that cannot be imported or instantiated.
        """
        try:
            target = self._known.get(self.check(name), name)
        except ValueError as error:
            raise UserError(f"{self.key}: {error}") from None
        return _instance(self.key, target)

    def instance(self, chosen: Any) -> Any:
        """`get` of a name; anything else is an instance already.

        Raises:
            UserError: as `get`.
        """
        return self.get(chosen) if isinstance(chosen, str) else chosen

    def all(self) -> list[Any]:
        """Every built-in implementation, in the order of the names."""
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
        "lora": "lwo_dist.methods.lora:LoRA",
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
TASKS = Registry(
    "task",
    {
        "completion": "lwo_dist.tasks.completion:LineCompletion",
        "generation": "lwo_dist.tasks.generation:Generation",
        "summarisation": "lwo_dist.tasks.summarisation:Summarisation",
        "translation": "lwo_dist.tasks.translation:Translation",
        "repair": "lwo_dist.tasks.repair:Repair",
        "defect": "lwo_dist.tasks.defect:DefectDetection",
    },
)
