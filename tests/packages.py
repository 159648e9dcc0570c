"""Environments that hold exactly the packages that some extras of ours ask for, made in no time:
folders of links to what is installed here.
"""

from __future__ import annotations

import importlib.metadata
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

__all__ = ["PYTHON_OPTIONS", "asked_for", "link_environment"]

REPOSITORY = Path(__file__).parents[1]
# With these an interpreter sees the standard library and what it puts on sys.path itself.
PYTHON_OPTIONS = ("-I", "-S")


def asked_for(extra: str | None = None) -> list[Requirement]:
    """What pyproject.toml lists under `extra`; None: what every installation brings."""
    project: dict[str, Any] = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    lines = project["optional-dependencies"][extra] if extra else project["dependencies"]
    return [Requirement(line) for line in lines]


def link_environment(folder: Path, extras: Iterable[str] = ()) -> None:
    """Fill `folder` with links to this checkout, to what it asks for with `extras`, to what that
    asks for, and so on.

    Raises:
        PackageNotFoundError: something of it is not installed here.
    """
    folder.mkdir(exist_ok=True)
    (folder / "lwo_dist").symlink_to(REPOSITORY / "lwo_dist")
    wanted = [*asked_for(), *(line for extra in extras for line in asked_for(extra))]
    for distribution in _closure(wanted):
        for name in _top_levels(distribution):
            if not (folder / name).exists():  # Parts of a namespace package share its folder.
                (folder / name).symlink_to(str(distribution.locate_file(name)))


def _closure(wanted: list[Requirement]) -> Iterator[importlib.metadata.Distribution]:
    done: set[tuple[str, str]] = set()  # A name with one of its extras, "" for none.
    while wanted:
        requirement = wanted.pop()
        name = canonicalize_name(requirement.name)
        new = {(name, extra) for extra in ("", *requirement.extras)} - done
        done |= new
        if not new:
            continue
        distribution = importlib.metadata.distribution(name)
        for line in distribution.requires or []:
            needed = Requirement(line)
            if needed.marker is None or any(
                needed.marker.evaluate({"extra": extra}) for _, extra in new
            ):
                wanted.append(needed)
        yield distribution


def _top_levels(distribution: importlib.metadata.Distribution) -> set[str]:
    """The files and folders in site-packages that belong to it; its programs do not count."""
    tops = {file.parts[0] for file in distribution.files or []}
    return {top for top in tops if top not in ("..", "/", "__pycache__")}
