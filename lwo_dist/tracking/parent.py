"""The MLflow run that the runs of a comparison are shown under. It never makes them fail."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lwo_dist.config import Config
from lwo_dist.redaction import redact
from lwo_dist.run_info import run_tags
from lwo_dist.storage import storage_folder

from .mlflow import CALL_TIMEOUT_S, tracking_uri
from .mlflow_store import MLflowStore
from .sender import reason

__all__ = ["ParentRun"]

T = TypeVar("T")
logger = logging.getLogger(__name__)


class ParentRun:
    """One run at MLflow, created or continued; every method does nothing if MLflow is off, and
    warns once if it cannot be reached.

    Args:
        config: of any of the runs; its tracking settings and storage are used.
        run_id: of the run that an earlier process created.
    """

    def __init__(self, config: Config, name: str, run_id: str | None):
        self._config = config
        self._name = name
        self.run_id = run_id
        self._has_warned = False

    def start(self) -> None:
        """Create the run, or set it back to RUNNING."""
        tags = run_tags(self._config) | {"mlflow.source.name": "lwo-dist compare"}
        for name in ("method", "task", "mlflow.parentRunId"):
            tags.pop(name, None)
        fields = {
            "experiment": self._config.tracking.experiment,
            "run_name": self._name,
            "key": f"comparison {self._config.storage}/{self._name}",
            "tags": tags,
        }

        def begin(store: MLflowStore) -> str:
            run_id = self.run_id or store.find_or_create(fields, int(time.time() * 1000))
            store.client.update_run(run_id, status="RUNNING")
            return run_id

        self.run_id = self._call(begin) or self.run_id

    def end(self, status: str) -> None:
        self._with_run(lambda client, run_id: client.set_terminated(run_id, status))

    def log(self, metrics: Mapping[str, float], files: Sequence[Path], note: str) -> None:
        """Log figures, files and the description."""

        def send(client: Any, run_id: str) -> None:
            for name, value in metrics.items():
                client.log_metric(run_id, name, value)
            for file in files:
                client.log_artifact(run_id, str(file))
            client.set_tag(run_id, "mlflow.note.content", note)

        self._with_run(send)

    def _with_run(self, call: Callable[[Any, str], None]) -> None:
        run_id = self.run_id
        if run_id is not None:
            self._call(lambda store: call(store.client, run_id))

    def _call(self, call: Callable[[MLflowStore], T]) -> T | None:
        if not self._config.tracking.enabled:
            return None
        storage = storage_folder(self._config.storage)
        uri = tracking_uri(self._config.tracking, storage)
        try:
            return call(MLflowStore(uri, storage, CALL_TIMEOUT_S))
        except Exception as error:
            if not self._has_warned:
                self._has_warned = True
                logger.warning(
                    "MLflow at %s: %s; the comparison goes on, and its files hold everything",
                    redact(uri),
                    reason(error),
                )
            return None
