"""What restarts cost, as the metrics `run/attempt` and `time/lost_seconds`."""

from __future__ import annotations

import time
from collections.abc import Mapping

from lwo_dist.spool import Spool

__all__ = ["Restarts"]


class Restarts:
    """Measures the time that restarts lost, for the attempt that has just been started in the
    spool.

    The lost time runs from the last step that an earlier attempt logged until the run has reached
    that step again: the time without workers, the start, and the repeated steps. It is added once
    that step is reached.
    """

    def __init__(self, spool: Spool) -> None:
        self._attempt = spool.attempts
        self._lost = spool.last_value.get("time/lost_seconds", 0.0)
        self._behind = spool.furthest if self._attempt > 1 else None

    def points(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """The points to log together with the `metrics` of `step`."""
        if self._behind is not None and step >= self._behind[0]:
            last_step, time_ms = self._behind
            trained = (step - last_step) * metrics.get("time/step_seconds", 0.0)
            self._lost += max(0.0, time.time() - time_ms / 1000 - trained)
            self._behind = None
        return {"run/attempt": float(self._attempt), "time/lost_seconds": self._lost}
