"""What MLflow's pages show of a spool, and under which names.

MLflow draws a chart for each metric. It sorts the charts by group, the part of the name before "/",
and shows `system/` on a page of its own. Hence: scores and losses come first (`eval/`, `train/`),
then what explains them (`update/`, `visit/`); time and memory are in `system/`; constants and
details are in the spool and the report only, and all settings in config.yaml.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from lwo_dist.spool import Point

__all__ = ["shown_parameters", "shown_points"]


class _Shown(NamedTuple):
    name: str
    unit: float = 1.0
    """The value is divided by it."""
    omitted: float | None = None
    """A value that says nothing, such as no lost seconds."""


_GB = 1e9

# Metrics that are in neither table keep their names.
_SHOWN = {
    "train/learning_rate": _Shown("update/learning_rate"),
    "train/grad_norm": _Shown("update/grad_norm"),
    "train/skipped_steps": _Shown("update/skipped_steps", omitted=0.0),
    "train/elapsed_seconds": _Shown("system/training_seconds"),
    "train/tokens": _Shown("system/training_tokens"),
    "memory/peak_bytes": _Shown("system/peak_memory_GB", _GB),
    "memory/optimizer_state_bytes": _Shown("system/optimizer_state_GB", _GB),
    "time/lost_seconds": _Shown("system/lost_seconds", omitted=0.0),
    "run/attempt": _Shown("system/attempt", omitted=1.0),
}
_SPOOL_ONLY = (
    "checkpoint/",
    "comm/",
    "lwo/",
    "memory/",
    "time/",
    "visit/grad_norm",
    "visit/seconds",
)

_OF_THE_MACHINE = ("checkpoint.", "cluster.", "tracking.")
_OTHERS = {"access", "data.cache", "host", "run_name", "storage"}
_REPEATED = {"lwo.seed": "seed", "lwo.max_steps": "train.steps"}
_EMPTY = {"", "null", "{}", "[]"}


def shown_points(points: Iterable[Point]) -> list[Point]:
    """The points that MLflow gets, renamed and in units that people read."""
    found = []
    for point in points:
        shown = _SHOWN.get(point.name)
        if shown is None and not point.name.startswith(_SPOOL_ONLY):
            found.append(point)
        elif shown is not None and point.value != shown.omitted:
            found.append(point._replace(name=shown.name, value=point.value / shown.unit))
    return found


def shown_parameters(parameters: Mapping[str, str]) -> dict[str, str]:
    """The parameters that MLflow gets: what may change a result, without empty and repeated ones.

    >>> shown_parameters({"seed": "1", "lwo.seed": "1", "zero_stage": "null", "a": "[0.9, 1]"})
    {'seed': '1', 'a': '0.9, 1'}
    """
    return {
        name: _on_one_line(value)
        for name, value in parameters.items()
        if value not in _EMPTY
        and name not in _OTHERS
        and not name.startswith(_OF_THE_MACHINE)
        and not (name.startswith("data.") and name.endswith("_asked"))
        and (name not in _REPEATED or value != parameters.get(_REPEATED[name]))
    }


def _on_one_line(value: str) -> str:
    """A list without brackets: MLflow would show it as JSON of one line an item."""
    if not value.startswith("["):
        return value
    try:
        return ", ".join(map(str, json.loads(value)))
    except (TypeError, ValueError):
        return value
