"""Which failures Ray may answer by starting the workers again. Imports Ray at the top: import it inside a function."""

from __future__ import annotations

from typing import Any

from ray.exceptions import RayTaskError
from ray.train import UserCallback

from lwo_dist.config import UserError

__all__ = ["Failures", "cannot_connect", "first_line"]


class Failures(UserCallback):
    """Says what failed, and lets bad input end the run: Ray would try that again too. Lives in Ray's controller."""

    def __init__(self, max_failures: int):
        self._max_failures = max_failures
        self._said: list[int] = []
        self._count = 0

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Ray calls it before it decides.

        Raises:
            UserError: a worker's; Ray makes it a ControllerError, which it does not try again.
        """
        for error in worker_exceptions.values():
            if isinstance(error, UserError):
                raise error
        ranks = sorted(worker_exceptions)
        if ranks == self._said:  # Ray asks again while it waits for a node to be taken away.
            return
        self._said, self._count = ranks, self._count + 1
        again = self._max_failures < 0 or self._count <= self._max_failures
        what = "; ".join(f"rank {rank}: {first_line(error)}" for rank, error in list(worker_exceptions.items())[:3])
        then = "the workers start again from the newest checkpoint" if again else "no more restarts"
        limit = "" if self._max_failures < 0 else f" of at most {self._max_failures}"
        print(f"failure {self._count}{limit} (cluster.max_failures): {what}; {then}", flush=True)

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        self._said = []  # Workers that report are other ones.


def cannot_connect(error: BaseException) -> bool:
    """The workers' process group could not be made, which Ray takes for a fault of its own and does not try again."""
    failure = getattr(error, "controller_failure", None)
    # What fails in training is a WorkerGroupError; only the start of the workers ends as a task's error in here.
    return isinstance(failure, RayTaskError) and isinstance(failure.cause, RuntimeError | OSError)


def first_line(error: BaseException) -> str:
    """`RuntimeError: what it says`, without the lines that follow."""
    error = getattr(error, "health_check_failure", error)
    lines = [line for line in str(getattr(error, "cause", error)).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip() if lines else ''}"[:300]
