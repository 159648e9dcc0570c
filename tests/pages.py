"""The tables of the pages that are made from the code.

    python -m tests.pages    # writes them anew

A page marks where one stands: `<!-- NAME, made by python -m tests.pages -->` ... `<!-- end -->`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from pydantic import BaseModel

from lwo_dist.config import Config

__all__ = ["GENERATED", "TABLES", "filled", "names", "settings"]

REPOSITORY = Path(__file__).parents[1]

_MARKED = re.compile(
    r"(<!-- (\w+), made by python -m tests\.pages -->\n).*?(<!-- end -->)", re.DOTALL
)


def settings() -> str:
    """A row for each setting."""
    return "\n".join(["| key | default | what it is |", "|---|---|---|", *_rows(Config)])


def _rows(model: type[BaseModel], prefix: str = "") -> list[str]:
    table = []
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            table += _rows(field.annotation, f"{prefix}{name}.")
        else:
            default = field.get_default(call_default_factory=True)
            shown = "" if default in (None, {}) else f"`{default}`"
            table.append(f"| `{prefix}{name}` | {shown} | {field.description} |")
    return table


TABLES: dict[str, Callable[[], str]] = {"settings": settings}
GENERATED = [("lwo_dist/config/README.md", "settings")]
"""(page, table), all there are."""


def names(text: str) -> list[str]:
    """The tables that a page has a place for."""
    return [match[2] for match in _MARKED.finditer(text)]


def filled(text: str, tables: Mapping[str, str]) -> str:
    """The page with the given tables in their places."""

    def fill(match: re.Match[str]) -> str:
        begin, name, end = match.groups()
        return f"{begin}\n{tables[name]}\n\n{end}" if name in tables else match[0]

    return _MARKED.sub(fill, text)


def main() -> None:
    tables = {name: make() for name, make in TABLES.items()}
    for page in sorted({page for page, _ in GENERATED}):
        path = REPOSITORY / page
        path.write_text(filled(path.read_text(), tables))


if __name__ == "__main__":
    main()
