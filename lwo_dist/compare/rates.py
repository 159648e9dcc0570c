"""The search for a method's learning rate: the same for every method."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

__all__ = ["EXTENSIONS", "best_rate"]

EXTENSIONS = 3
"""How often the grid grows where the best rate is at its edge."""


def best_rate(rates: Sequence[float], loss_of: Callable[[float], float]) -> float | None:
    """The rate with the lowest loss. While that is the first or last of the grid, the grid grows by
    the ratio of its neighbours there, up to `EXTENSIONS` times.

    Args:
        rates: ascending, at least two, or one that is not searched.
        loss_of: the loss that a rate ends with; NaN if it diverged or failed.

    Returns:
        None if every rate failed.
    """
    losses = {rate: loss_of(rate) for rate in rates}
    for _ in range(EXTENSIONS if len(rates) > 1 else 0):
        best = _lowest(losses)
        grid = sorted(losses)
        if best == grid[0]:
            new = grid[0] * grid[0] / grid[1]
        elif best == grid[-1]:
            new = grid[-1] * grid[-1] / grid[-2]
        else:
            break
        new = float(f"{new:.1e}")
        losses[new] = loss_of(new)
    return _lowest(losses)


def _lowest(losses: dict[float, float]) -> float | None:
    finite = {rate: loss for rate, loss in losses.items() if math.isfinite(loss)}
    return min(finite, key=lambda rate: finite[rate]) if finite else None
