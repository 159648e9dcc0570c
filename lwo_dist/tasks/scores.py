"""What a score is called, which way it is better, and how people see it.

A task names its scores once. The results, the progress line, the report, the tables and the model
card go through what it names, and none of them knows a score by itself. A run writes the names
beside its numbers (`ScoreSheet.record`), so a reader of its files needs no task, and imports no
code that a file names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Column", "Score", "ScoreSheet", "Scores"]

Column = npt.NDArray[np.float64]
"""[examples]"""


@dataclass(frozen=True)
class Score:
    """One score of a task."""

    name: str
    """The metric is `eval/<name>`."""
    label: str
    """For people, without the unit."""
    unit: str = ""
    higher_is_better: bool = True
    per_example: bool = True
    """Every example has a value, so that a difference has a paired interval."""
    digits: int = 2
    """Decimals that are shown."""
    headline: bool = False
    """Whether it is among the few figures at the top of a report."""
    count_label: str = ""
    """Of a share in percent: what it is the share of, such as "lines exactly right"; the summary
    then gives the count, too."""

    @property
    def key(self) -> str:
        """The name of the metric."""
        return f"eval/{self.name}"

    @property
    def heading(self) -> str:
        """Label and unit, for the head of a column."""
        return f"{self.label}, {self.unit}" if self.unit else self.label

    def show(self, value: float, sign: str = "") -> str:
        """`value` with the score's decimals; `sign="+"` for a difference."""
        return f"{value:{sign}.{self.digits}f}"


@dataclass(frozen=True)
class Scores:
    """The scores of one evaluation, by their names without `eval/`."""

    totals: Mapping[str, float]
    """Over all examples."""
    columns: Mapping[str, Column]
    """[examples] each, of the scores that are per example."""


@dataclass(frozen=True)
class ScoreSheet:
    """The scores of a run in the order of its tables, and what they are taken over."""

    scores: tuple[Score, ...]
    example: tuple[str, str]
    """One example and many, such as ("line", "lines")."""

    @property
    def count_key(self) -> str:
        """The metric that counts the examples."""
        return f"eval/{self.example[1]}"

    def record(self) -> dict[str, Any]:
        """As JSON values, under the keys `scores` and `example`."""
        return {"scores": [asdict(score) for score in self.scores], "example": list(self.example)}

    @classmethod
    def read(cls, record: Mapping[str, Any], metrics: Iterable[str]) -> ScoreSheet:
        """What `record` was written into; without it, the plain names of what was measured.

        Runs of version 0.1 did not write it. They completed lines.

        Args:
            metrics: names of metrics, of which those that begin with `eval/` count.
        """
        try:
            scores = tuple(Score(**fields) for fields in record["scores"])
            one, many = record["example"]
            return cls(scores, (one, many))
        except (KeyError, TypeError, ValueError):
            names = [name.removeprefix("eval/") for name in metrics if name.startswith("eval/")]
            plain = [Score(name, name, digits=3, headline=True) for name in names]
            return cls(tuple(score for score in plain if score.name != "lines"), ("line", "lines"))
