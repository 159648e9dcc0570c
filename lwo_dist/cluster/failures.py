"""Which failures Ray may answer by starting the workers again. Imports Ray at the top: import it
inside a function.
"""

from __future__ import annotations

import time
from typing import Any

from ray.exceptions import RayTaskError
from ray.train import UserCallback

from lwo_dist.errors import UserError

__all__ = ["Failures", "cannot_connect", "first_line"]

# While Ray waits for a node to be taken away it comes with the same failure at every look, each 0.2
# s; other workers would have needed seconds to start.
_SAME_FAILURE_S = 1.5


class Failures(UserCallback):  # type: ignore[misc]
    """Says what failed, and lets bad input end the run: Ray would try that again too. Lives in
    Ray's controller.
    """

    def __init__(self, max_failures: int):
        self._max_failures = max_failures
        self._count = 0
        self._last = float("-inf")

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Ray calls it before it decides.

        Raises:
            UserError: a worker's; Ray makes it a ControllerError, which it does not try again.
        """
        for error in worker_exceptions.values():
            if isinstance(error, UserError):
                raise error
        before = self._last
        self._last = time.monotonic()
        if self._last - before < _SAME_FAILURE_S:
            return
        self._count += 1
        again = self._max_failures < 0 or self._count <= self._max_failures
        what = "; ".join(
            f"rank {rank}: {first_line(error)}"
            for rank, error in list(worker_exceptions.items())[:3]
        )
        then = "the workers start again from the newest checkpoint" if again else "no more restarts"
        limit = "" if self._max_failures < 0 else f" of at most {self._max_failures}"
        print(f"failure {self._count}{limit} (cluster.max_failures): {what}; {then}", flush=True)


def cannot_connect(error: BaseException) -> bool:
    """The workers' process group could not be made, which Ray takes for a fault of its own and does
    not try again.
    """
    failure = getattr(error, "controller_failure", None)
    # What fails in training is a WorkerGroupError; only the start of the workers ends as a task's
    # error in here.
    return isinstance(failure, RayTaskError) and isinstance(failure.cause, RuntimeError | OSError)


def first_line(error: BaseException) -> str:
    """`RuntimeError: what it says`, without the lines that follow."""
    error = getattr(error, "health_check_failure", error)
    lines = [line for line in str(getattr(error, "cause", error)).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip() if lines else ''}"[:300]
