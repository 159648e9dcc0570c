"""One YAML file and dotted overrides -> Config; what is wrong in them is said in one line."""

from __future__ import annotations

from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from lwo_dist.errors import UserError

from .refusals import MAX_SHOWN, one_line
from .run import Config

__all__ = ["load_config", "make_config", "read_values"]

_MAX_BYTES = 2**20
_MAX_NODES = 10_000
_MAX_DEPTH = 20


def load_config(
    path: str | Path | None = None, overrides: list[str] | tuple[str, ...] = ()
) -> Config:
    """Read a YAML file and apply dotted overrides such as `lwo.lr=1e-4`.

    Raises:
        UserError: unreadable file, malformed override, unknown key (with the nearest valid one),
            wrong value.
    """
    return make_config(read_values(path, overrides))


def read_values(
    path: str | Path | None = None, overrides: list[str] | tuple[str, ...] = ()
) -> dict[str, Any]:
    """The values that a YAML file and overrides set, by group; `load_config` without the check.

    Raises:
        UserError: unreadable file, malformed override.
    """
    values = _read_yaml(Path(path)) if path is not None else {}
    for override in overrides:
        _apply_override(values, override)
    return values


def make_config(values: dict[str, Any]) -> Config:
    """The config with these values.

    Raises:
        UserError: unknown key (with the nearest valid one), wrong value.
    """
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise UserError(one_line(error, Config)) from None
    return config.with_steps(config.train.steps) if config.train.steps else config


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
        values = _parse(data.decode(), Config)
    except OSError as error:
        raise UserError(
            f"config file {path}: {error.strerror}; give the path of a YAML file"
        ) from None
    except _TooMuchError as error:
        raise UserError(f"config file {path} {error}") from None
    except _NOT_YAML as error:
        raise UserError(
            f"config file {path} is not YAML: {' '.join(str(error).split())[:MAX_SHOWN]}"
        ) from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(
            f"config file {path} holds a {type(values).__name__}; it must be a mapping of keys to"
            " values"
        )
    return values


class _TooMuchError(Exception):
    """A text exceeds the limits of a config; the message begins with a verb."""


# PyYAML does not wrap errors of its conversions, such as ValueError for the date 2026-99-99.
_NOT_YAML = (yaml.YAMLError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


def _parse(text: str, kind: Any) -> Any:
    """The values of a YAML text, with what `kind` says is text kept as it is written.

    Its events are counted first: nested aliases can expand to more values than fit in memory, and
    deep nesting exhausts the stack.
    """
    if len(text) > _MAX_BYTES:
        raise _TooMuchError(f"is larger than {_MAX_BYTES} bytes")
    depth = 0
    for number, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
        if isinstance(event, yaml.AliasEvent):
            raise _TooMuchError(f"has the alias *{event.anchor}; write the value out instead")
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_DEPTH:
            raise _TooMuchError(f"is nested more than {_MAX_DEPTH} levels deep")
        if number > _MAX_NODES:
            raise _TooMuchError(f"has more than {_MAX_NODES} values")
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _keep_text(node, kind)
        return loader.construct_document(node)
    finally:
        loader.dispose()


_YAML = "tag:yaml.org,2002:"
_NOT_TEXT = {f"{_YAML}bool", f"{_YAML}float", f"{_YAML}int", f"{_YAML}timestamp", f"{_YAML}value"}


def _keep_text(node: yaml.Node, kind: Any) -> None:
    """Make strings of the scalars that are text by `kind`, a type or an annotation.

    YAML reads 20261125 as a number, 2024-11-25 as a date and off as false; as a run's name or a
    commit they are text.
    """
    if isinstance(node, yaml.ScalarNode):
        if node.tag in _NOT_TEXT and any(map(_is_text, _members(kind))):
            node.tag = f"{_YAML}str"
    elif isinstance(node, yaml.SequenceNode):
        (item_kind,) = _arguments(kind, list, tuple)[:1] or (Any,)
        for item in node.value:
            _keep_text(item, item_kind)
    elif isinstance(node, yaml.MappingNode):
        (key_kind,) = _arguments(kind, dict)[:1] or (str,)
        for key, value in node.value:
            _keep_text(key, key_kind)
            _keep_text(value, _kind_of(kind, str(key.value)))


def _members(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def _arguments(kind: Any, *containers: type) -> tuple[Any, ...]:
    """What `kind` says is in such a container; () if it allows none."""
    return next((get_args(k) for k in _members(kind) if get_origin(k) in containers), ())


def _is_text(kind: Any) -> bool:
    return kind is str or (get_origin(kind) is Literal and isinstance(get_args(kind)[0], str))


def _kind_of(kind: Any, name: str) -> Any:
    """The annotation of the entry `name` of a group of settings, or of a mapping."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        field = kind.model_fields.get(name)
        return field.annotation if field is not None else Any
    return (_arguments(kind, dict)[1:] or (Any,))[0]


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r} must read key=value, for example lwo.lr=1e-4")
    *groups, name = key.split(".")
    if len(groups) > _MAX_DEPTH:
        raise UserError(f"override {override[:MAX_SHOWN]!r} has more than {_MAX_DEPTH} groups")
    kind: Any = Config
    for group in groups:
        kind = _kind_of(kind, group)
        values = values.setdefault(group, {})
        if not isinstance(values, dict):
            raise UserError(
                f"override {override!r}: {group!r} is a value, not a group; see the README's table"
                " of keys"
            )
    try:
        values[name] = _parse(text, _kind_of(kind, name))
    except _TooMuchError as error:
        raise UserError(f"override {override[:MAX_SHOWN]!r} {error}") from None
    except _NOT_YAML:
        raise UserError(
            f"override {override[:MAX_SHOWN]!r}: {text[:MAX_SHOWN]!r} is not a YAML value; quote it"
        ) from None
