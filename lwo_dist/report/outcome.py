"""What a run achieved, as the report shows it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lwo_dist.tasks.comparison import changes, gains, score_rows
from lwo_dist.tasks.scores import ScoreSheet

from .tables import first_and_best

__all__ = ["Outcome"]


@dataclass(frozen=True)
class Outcome:
    """The scores before training and at its best step; all empty without two evaluations."""

    sheet: ScoreSheet
    before: Mapping[str, float] = field(default_factory=dict)
    after: Mapping[str, float] = field(default_factory=dict)
    rows: list[tuple[str, str, str, str]] = field(default_factory=list)
    """The table of scores, with its head."""
    change: str = ""
    """How many examples became right and wrong, in words."""

    @classmethod
    def read(
        cls, sheet: ScoreSheet, evaluations: dict[int, dict[str, Any]], best_step: int | None
    ) -> Outcome:
        if len(evaluations) < 2:
            return cls(sheet)
        first, best = first_and_best(evaluations, best_step)
        before, after = first["scores"], best["scores"]
        sheet = sheet.within(before, after)
        if not sheet.scores or not all(sheet.count_key in found for found in (before, after)):
            return cls(sheet)  # a run whose task has changed
        found = changes(sheet, first, best)
        counts = {
            name: {change: len(indices) for change, indices in by_change.items()}
            for name, by_change in found.items()
        }
        rows = score_rows(sheet, before, after, gains(sheet, first, best), counts)
        change = ""
        if counts:
            gained, lost = next(iter(counts.values())).values()
            total = int(after[sheet.count_key])
            change = (
                f"Of {total} held-out {sheet.example[1]}, {gained} became right (gained) and {lost}"
                " became wrong (lost). Shown are some of both, and some of the others at random."
            )
        return cls(sheet, before, after, rows, change)
