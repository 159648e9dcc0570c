"""Two evaluations of the same examples side by side: what was gained, in one table.

The console, the report and summary.json all take their numbers from here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .intervals import paired_interval
from .scores import Score, ScoreSheet

__all__ = ["changes", "gains", "score_rows"]

Record = Mapping[str, Any]
"""An evaluation as it is on disk: `scores`, and by example `lines`, `tokens` and `bytes`."""


def gains(sheet: ScoreSheet, before: Record, after: Record) -> dict[str, dict[str, float]]:
    """`mean`, `low` and `high` of the paired difference, for each score with values by example.

    The mean is `after` minus `before` of the totals, positive where it is better; the interval is
    of 95 %.
    """
    # Runs of version 0.1 kept no tokens; their gain is the mean over lines.
    weights = {
        weight: after.get(name) or before.get(name)
        for weight, name in (("token", "tokens"), ("byte", "bytes"))
    }
    first, second = before.get("lines", {}), after.get("lines", {})
    found = {}
    for score in sheet.scores:
        if not score.per_example or score.name not in first or score.name not in second:
            continue
        sign = 1 if score.higher_is_better else -1
        mean, low, high = paired_interval(
            sign * np.array(first[score.name]),
            sign * np.array(second[score.name]),
            weights.get(score.weight),
        )
        found[score.name] = {"mean": mean, "low": low, "high": high}
    return found


def changes(sheet: ScoreSheet, before: Record, after: Record) -> dict[str, dict[str, list[int]]]:
    """For each score that is counted: the indices of the examples that became right, `gained`, and
    wrong, `lost`.
    """
    found = {}
    for score in sheet.scores:
        if score.count_label and score.name in before.get("lines", {}):
            was, now = (np.array(record["lines"][score.name]) >= 100 for record in (before, after))
            found[score.name] = {
                "gained": np.flatnonzero(~was & now).tolist(),
                "lost": np.flatnonzero(was & ~now).tolist(),
            }
    return found


def score_rows(
    sheet: ScoreSheet,
    before: Mapping[str, float],
    after: Mapping[str, float],
    gains: Mapping[str, Mapping[str, float]],
    changed: Mapping[str, Mapping[str, int]],
) -> list[tuple[str, str, str, str]]:
    """The table of scores as text, with its head: label, before, after, gain with its interval.

    Args:
        before: `eval/...` metrics; so is `after`.
        gains: of `gains`.
        changed: score -> numbers of examples `gained` and `lost`.
    """
    sheet = sheet.within(before, after)
    many = sheet.example[1]
    count = after[sheet.count_key]
    rows = [(f"{count:.0f} held-out {many}", "before", "after", "gain (95 % interval)")]
    for score in sheet.scores:
        start, end = (score.show(scores[score.key]) for scores in (before, after))
        gain = _interval(score, gains[score.name]) if score.name in gains else ""
        rows.append((score.heading, start, end, gain))
    for score in sheet.scores:
        if score.count_label:
            start, end = (f"{scores[score.key] * count / 100:.0f}" for scores in (before, after))
            numbers = changed.get(score.name)
            gain = f"{numbers['gained']} gained, {numbers['lost']} lost" if numbers else ""
            rows.append((score.count_label, start, end, gain))
    return rows


def _interval(score: Score, gain: Mapping[str, float]) -> str:
    mean, low, high = (score.show(gain[name], sign="+") for name in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"
