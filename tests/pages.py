"""The tables of the pages that are made from the code.

    python -m tests.pages    # writes them anew

A page marks where one stands: `<!-- NAME, made by python -m tests.pages -->` ... `<!-- end -->`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

from pydantic import BaseModel

from lwo_dist.config import Config
from lwo_dist.config.reading import load_config
from lwo_dist.plan.gpus import USABLE
from tests import families, sizes

__all__ = ["GENERATED", "TABLES", "filled", "fits", "memory", "names", "settings"]

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
            # Some defaults depend on settings above them: `{}` is where none of those is set.
            default = field.get_default(call_default_factory=True, validated_data={})
            shown = "" if default in (None, {}) else f"`{default}`"
            table.append(f"| `{prefix}{name}` | {shown} | {field.description} |")
    return table


_GPUS = ((1, 24), (1, 80), (2, 80), (8, 24), (8, 80))
_IN_BF16 = ["train.precision=bf16", "fsdp.storage=bf16"]
_METHODS = {
    "LWO": [],
    "LWO, `fsdp.storage: bf16`": _IN_BF16,
    "LWO, `stateless: all`": ["lwo.stateless=all"],
    "full": ["method=full"],
    "LoRA, rank 16": ["method=lora", *_IN_BF16],
}


_FITS = (("1.5B", 1, 24), ("7B", 1, 80), ("14B", 1, 80), ("32B", 2, 80), ("32B", 8, 80))


def memory() -> str:
    """GB of each GPU for models, methods and numbers of GPUs."""
    gpus = [f"{count} x {gigabytes} GB" for count, gigabytes in _GPUS]
    table = [f"| model | method | {' | '.join(gpus)} |", "|---" * (2 + len(gpus)) + "|"]
    for size in sizes.QWEN_CODER:
        for method in _METHODS:
            cells = [_need(size, method, *gpu) for gpu in _GPUS]
            table.append(f"| {size} | {method} | {' | '.join(cells)} |")
    return "\n".join(table)


def fits() -> str:
    """Some of `memory`, for the front page: a row for each model, a column for each method."""
    table = [f"| model | GPUs | {' | '.join(_METHODS)} |", "|---" * (2 + len(_METHODS)) + "|"]
    for size, *gpu in _FITS:
        cells = [_need(size, method, *gpu) for method in _METHODS]
        table.append(f"| {size} | {gpu[0]} x {gpu[1]} GB | {' | '.join(cells)} |")
    return "\n".join(table)


@cache
def _need(size: str, method: str, count: int, gigabytes: int) -> str:
    batch = ["train.sequence_length=2048", f"train.global_batch_size={count}"]
    settings = [*batch, "train.gradient_checkpointing=true", *_METHODS[method]]
    if "stateless" in method and count == 1:
        settings += ["strategy=replicate", "lwo.stateless_update=backward"]
    need = sizes.peak(size, load_config(None, settings), count) / 1e9
    return f"{need:.0f}" if need <= USABLE * gigabytes else f"no ({need:.0f})"


TABLES: dict[str, Callable[[], str]] = {
    "settings": settings,
    "memory": memory,
    "fits": fits,
    "families": families.table,
}
GENERATED = [
    ("README.md", "fits"),
    ("lwo_dist/config/README.md", "settings"),
    ("lwo_dist/models/README.md", "families"),
    ("lwo_dist/strategies/README.md", "memory"),
]
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
