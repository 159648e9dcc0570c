"""Names of scores, which direction is better, and how they are displayed.

A task declares its scores once. The results, progress line, report, tables and model card use that
declaration, and none of them knows a specific score. A run stores it with its numbers
(`ScoreSheet.record`), so that reading its files needs no task and imports no code named in a file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict, Field, TypeAdapter

__all__ = ["Column", "Score", "ScoreSheet", "Scores"]

Column = npt.NDArray[np.float64]
"""[examples]"""


@dataclass(frozen=True)
class Score:
    """One score of a task."""

    name: str
    """The metric is `eval/<name>`."""
    label: str
    """Display name, without the unit."""
    unit: str = ""
    higher_is_better: bool = True
    per_example: bool = True
    """Every example has a value, so a difference has a paired interval."""
    digits: Annotated[int, Field(ge=0, le=12)] = 2
    """Number of decimals shown."""
    headline: bool = False
    """Whether it is one of the few figures at the top of a report."""
    weight: Literal["example", "token", "byte"] = "example"
    """What the total is a mean over, and so its gain: all examples, or all tokens or bytes of
    them."""
    count_label: str = ""
    """For a percentage: what is counted, such as "lines exactly right"; the summary then also shows
    the count."""

    @property
    def key(self) -> str:
        """The name of the metric."""
        return f"eval/{self.name}"

    @property
    def heading(self) -> str:
        """Label and unit, for a column heading."""
        return f"{self.label}, {self.unit}" if self.unit else self.label

    def best_step(self, evaluations: Mapping[int, Mapping[str, float]]) -> int:
        """The trained step with the best value of this score; 0 if none was evaluated."""
        sign = 1 if self.higher_is_better else -1

        def goodness(step: int) -> float:
            value = evaluations[step].get(self.key, math.nan)
            return -math.inf if math.isnan(value) else sign * value

        return max((step for step in evaluations if step > 0), key=goodness, default=0)

    def show(self, value: float, sign: str = "") -> str:
        """Format `value` with the score's decimals; `sign="+"` for a difference."""
        return f"{value:{sign}.{self.digits}f}"


@dataclass(frozen=True)
class Scores:
    """The scores of one evaluation, by name without `eval/`."""

    totals: Mapping[str, float]
    """Over all examples."""
    columns: Mapping[str, Column]
    """[examples] for each score that is per example."""


@dataclass(frozen=True)
class ScoreSheet:
    """The scores of a run in table order, and what they are computed over."""

    scores: tuple[Score, ...]
    example: tuple[str, str]
    """Singular and plural of an example, such as ("line", "lines")."""

    @property
    def count_key(self) -> str:
        """The metric that counts the examples."""
        return f"eval/{self.example[1]}"

    def within(self, *evaluations: Mapping[str, float]) -> ScoreSheet:
        """This sheet without the scores that one of these lacks: what a run that goes on under a
        newer version has in common.
        """
        scores = (s for s in self.scores if all(s.key in found for found in evaluations))
        return replace(self, scores=tuple(scores))

    def record(self) -> dict[str, Any]:
        """JSON values under the keys `scores` and `example`."""
        return {"scores": [asdict(score) for score in self.scores], "example": list(self.example)}

    @classmethod
    def read(cls, record: Mapping[str, Any], metrics: Iterable[str]) -> ScoreSheet:
        """The sheet stored in `record`; if there is none, the plain names of the measured scores.

        Runs of version 0.1 did not store it. Their task was line completion.

        Args:
            metrics: names of metrics; only those that begin with `eval/` are used.
        """
        try:
            scores = tuple(_SCORES.validate_python(record["scores"]))
            one, many = _EXAMPLE.validate_python(record["example"])
            return cls(scores, (one, many))
        except (KeyError, TypeError, ValueError):
            names = [name.removeprefix("eval/") for name in metrics if name.startswith("eval/")]
            plain = [Score(name, name, digits=3, headline=True) for name in names]
            return cls(tuple(score for score in plain if score.name != "lines"), ("line", "lines"))


_STRICT = ConfigDict(strict=True)
_SCORES = TypeAdapter(list[Score])
_EXAMPLE = TypeAdapter(list[str], config=_STRICT)
