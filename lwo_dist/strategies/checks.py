"""Combinations of method, strategy and settings that are refused before anything starts."""

from __future__ import annotations

from typing import Any

from lwo_dist.config import Config
from lwo_dist.errors import UserError
from lwo_dist.extras import require
from lwo_dist.methods import Method
from lwo_dist.registry import METHODS, STRATEGIES, Registry

from .base import StrategyBuilder

__all__ = ["check_config", "refuse_settings_of_others", "require_extras"]


def check_config(config: Config, *, elsewhere: bool = False) -> None:
    """Refuse run settings that contradict each other or would have no effect.

    Args:
        elsewhere: the run is for another machine, which may have a `module:Class` that is not
            here; what it would check is left to that machine.

    Raises:
        UserError: naming the first such setting.
    """
    names = {config.method, config.strategy}
    if elsewhere and not names <= {*METHODS.names, *STRATEGIES.names}:
        return
    method: Method = METHODS.get(config.method)
    chosen: StrategyBuilder = STRATEGIES.get(config.strategy)
    refuse_settings_of_others(config, "strategy", chosen, STRATEGIES)
    refuse_settings_of_others(config, "method", method, METHODS)
    method.check(config)
    method.refuse_unset_rate(config.lwo)
    chosen.check(config)
    if config.lwo.inactive_master == "discard" and not chosen.stores_16_bit(config):
        raise UserError(
            "lwo.inactive_master: discard has no effect where weights are stored in fp32; drop it, "
            "or set fsdp.storage: bf16, or strategy: deepspeed with train.precision: bf16"
        )


def require_extras(config: Config) -> None:
    """Refuse a method or a strategy whose packages are not installed here. Raises: UserError."""
    method: Method = METHODS.get(config.method)
    chosen: StrategyBuilder = STRATEGIES.get(config.strategy)
    require(*method.extras, what=f"method: {method.name}")
    require(*chosen.extras, what=f"strategy: {chosen.name}")


def refuse_settings_of_others(
    config: Config, kind: str, chosen: Method | StrategyBuilder, registry: Registry
) -> None:
    """Refuse settings that only other methods, or only other strategies, read.

    Args:
        kind: "method" or "strategy", as `chosen` and `registry` are.

    Raises:
        UserError: with the value and the remedy.
    """
    readers: dict[str, list[str]] = {}
    others: list[Method | StrategyBuilder] = registry.all()
    for other in others:
        for key in other.own_settings:
            readers.setdefault(key, []).append(other.name)
    for key, names in readers.items():
        value = _at(config, key)
        if key not in chosen.own_settings and value != _at(Config(), key) and _is_set(config, key):
            raise UserError(
                f"{key} = {value} has no effect with {kind}: {getattr(config, kind)}; set "
                f"{kind}: {' or '.join(names)}, or drop it"
            )


def _is_set(config: Config, key: str) -> bool:
    """Whether it was given; some defaults depend on other settings."""
    group, _, name = key.rpartition(".")
    return name in (_at(config, group) if group else config).model_fields_set


def _at(config: Config, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value
