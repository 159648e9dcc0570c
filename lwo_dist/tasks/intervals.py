"""Intervals of paired differences, with numpy alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .scores import Column

__all__ = ["paired_interval"]

_RESAMPLES = 10_000
_CHUNK = 1_000_000


def paired_interval(
    before: Sequence[float] | Column,
    after: Sequence[float] | Column,
    weights: Sequence[float] | npt.NDArray[Any] | None = None,
) -> tuple[float, float, float]:
    """Mean of `after - before` over lines, and its 95 % percentile bootstrap interval.

    Args:
        weights: [lines], such as their tokens, for a weighted mean; None: all alike.

    Bootstrap: Efron (1979). Resamples are drawn with a fixed seed, so that the same scores give the
    same interval.

    Returns:
        mean difference, lower bound, upper bound.
    """
    difference = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    if difference.ndim != 1 or len(difference) < 2:
        raise ValueError(
            f"an interval needs scores of at least 2 lines, got shape {difference.shape}"
        )
    weight = np.ones_like(difference) if weights is None else np.asarray(weights, dtype=np.float64)
    random = np.random.RandomState(0)
    # A few rows of resamples at a time: all at once would take 80 kB per line.
    rows = max(1, _CHUNK // len(difference))
    means = []
    for first in range(0, _RESAMPLES, rows):
        size = (min(rows, _RESAMPLES - first), len(difference))
        lines = random.randint(0, len(difference), size)
        sums = (weight * difference)[lines].sum(axis=1)
        means.append(sums / weight[lines].sum(axis=1))
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return float(np.average(difference, weights=weight)), float(low), float(high)
