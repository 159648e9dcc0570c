"""`lwo-dist config`: every setting of a run, with its value and what it is."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from lwo_dist.errors import UserError
from lwo_dist.extras import require

from .arguments import Subparsers, add_config_arguments, read_config

if TYPE_CHECKING:
    from pydantic import BaseModel

    from lwo_dist.config import Config

__all__ = ["add_parser", "as_yaml", "run"]

_WIDTH = 100
_END = "...\n"  # what YAML puts after a lone scalar


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser("config", help="show every setting of a run, and what it is")
    parser.description = (
        "Check the settings that a run would have and print all of them, each with its meaning, as"
        " YAML that -c reads."
    )
    add_config_arguments(parser)
    parser.add_argument("--defaults", action="store_true", help="show the defaults")
    return parser


def run(arguments: argparse.Namespace) -> None:
    require("run", what="lwo-dist config")
    if arguments.defaults and (arguments.config or arguments.overrides):
        raise UserError("--defaults shows what holds without a file; leave -c and key=value out")
    config = read_config(arguments)
    from lwo_dist.strategies.checks import check_config

    check_config(config)
    print(as_yaml(config), end="")


def as_yaml(config: Config) -> str:
    """All settings, without secrets; read again they are the same config."""
    from lwo_dist.run_info import public_config

    values = public_config(config)
    if config.lwo.max_steps == config.train.steps:
        # Filled in from train.steps: written out, it would not follow a change there.
        values["lwo"]["max_steps"] = None
    return "\n".join(_lines(type(config), values, "")) + "\n"


def _lines(group: type[BaseModel], values: Mapping[str, Any], indent: str) -> Iterator[str]:
    import yaml
    from pydantic import BaseModel

    before: dict[str, Any] = {}
    for name, field in group.model_fields.items():
        value = values[name]
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield f"\n{indent}# {(kind.__doc__ or '').splitlines()[0]}"
            yield f"{indent}{name}:"
            yield from _lines(kind, value, f"{indent}  ")
            continue
        comment = f"{indent}# "
        yield from textwrap.wrap(
            field.description or "", _WIDTH, initial_indent=comment, subsequent_indent=comment
        )
        flow = yaml.safe_dump(
            value, default_flow_style=True, allow_unicode=True, sort_keys=False, width=10**6
        )
        unset = ""
        if field.default_factory not in (None, dict):
            default = field.get_default(call_default_factory=True, validated_data=before)
            # Written out, it would not follow the setting that its default depends on.
            unset = "# " if value == default else ""
        before[name] = value
        yield f"{indent}{unset}{name}: {flow.removesuffix(_END).strip()}"
