"""One run in MLflow: a server or a database. With `mlflow_model.py` and `mlflow_fetch.py` the only
module that imports MLflow.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lwo_dist.redaction import redact
from lwo_dist.report.tables import FOLDER as TABLES
from lwo_dist.spool import Point

from .description import RUN_ID
from .mlflow_model import log_model
from .shown import shown_parameters, shown_points

__all__ = ["MLflowStore"]

MAX_PARAMETER = 6000
MAX_TAG = 5000
SLOWEST_UPLOAD = 10_000_000  # bytes a second
_KEY_TAG = "lwo_dist_run"
_NOTE = "mlflow.note.content"  # the description
_NOTE_DIGEST = "mlflow.note.lwo_dist"  # of the last one that was written here


class MLflowStore:
    """One run at one tracking server or database. Every call may raise, and may be repeated without
    harm.
    """

    def __init__(self, uri: str, storage: Path, timeout_s: int) -> None:
        self.uri = redact(uri)
        self._address = uri
        self._storage = storage
        self._timeout_s = timeout_s

    @functools.cached_property
    def _client(self) -> Any:
        # MLflow reads these at each call. Its own defaults, 120 s and 7 retries, hold a call of a
        # dead server for four minutes; the rest keeps it from printing between the progress lines
        # and from reporting to its makers.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(self._timeout_s))
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient

        logging.getLogger("mlflow.store.db").setLevel(logging.WARNING)
        return MlflowClient(tracking_uri=self._address)

    @property
    def client(self) -> Any:
        """MLflow's client, with the settings of this store."""
        return self._client

    def find_experiment(self, name: str) -> str | None:
        experiment = self._client.get_experiment_by_name(name)
        return experiment.experiment_id if experiment else None

    def find_or_create(self, fields: Mapping[str, Any], time_ms: int) -> str:
        experiment_id = self._experiment(fields["experiment"])
        found = self._client.search_runs(
            [experiment_id], f"tags.{_KEY_TAG} = '{fields['key']}'", max_results=1
        )
        if found:
            return str(found[0].info.run_id)
        tags = fields["tags"] | {_KEY_TAG: fields["key"]}
        run = self._client.create_run(experiment_id, time_ms, tags, run_name=fields["run_name"])
        return str(run.info.run_id)

    def open_run(self, fields: Mapping[str, Any], time_ms: int, run_id: str | None) -> str:
        from mlflow.entities import Param, RunTag

        run = self._get_run(run_id) if run_id else None
        if run is None:
            run = self._client.get_run(self.find_or_create(fields, time_ms))
        known = run.data.params
        attempt = fields["attempt"]
        tags = fields["tags"] | {"attempts": str(attempt)}
        if attempt > 1:
            started = datetime.fromtimestamp(time_ms / 1000, UTC).isoformat(" ", "seconds")
            tags |= {
                f"attempt.{attempt}.start_step": str(fields["start_step"]),
                f"attempt.{attempt}.started": started,
            }
        parameters = []
        for name, value in shown_parameters(fields["parameters"]).items():
            name = name[:250]
            value = value[:MAX_PARAMETER]
            if name not in known:
                parameters.append(Param(name, value))
            elif known[name] != value:  # MLflow's parameters never change; a tag says what did
                tags[f"attempt.{attempt}.{name}"[:250]] = value
        self._client.log_batch(
            run.info.run_id,
            params=parameters,
            tags=[RunTag(name, value[:MAX_TAG]) for name, value in tags.items()],
        )
        if dataset := fields.get("dataset"):
            self._log_dataset(run.info.run_id, dataset)
        self._describe(run, fields.get("description"))
        if "error" in run.data.tags:  # of the attempt before, which keeps it under its own name
            self._client.delete_tag(run.info.run_id, "error")
        if run.info.status != "RUNNING":
            self._client.update_run(run.info.run_id, status="RUNNING")
        return str(run.info.run_id)

    def log_points(self, run_id: str, points: list[Point]) -> None:
        from mlflow.entities import Metric

        # With the spool's own times: a batch that is sent twice is then the same points, and MLflow
        # keeps one.
        metrics = [Metric(p.name, p.value, p.time_ms, p.step) for p in shown_points(points)]
        if metrics:
            self._client.log_batch(run_id, metrics=metrics)

    def upload(self, run_id: str, file: Path, folder: str | None) -> None:
        with self._patience(file) as client:
            client.log_artifact(run_id, str(file), folder)
        if folder == TABLES:
            self._mark_table(run_id, f"{folder}/{file.name}")

    def log_model(self, run_id: str, folder: Path, fields: Mapping[str, Any]) -> None:
        with self._patience(*folder.iterdir()) as client:
            log_model(client, run_id, folder, fields)

    def end_run(self, run_id: str, fields: Mapping[str, Any], time_ms: int) -> None:
        if "error" in fields:
            self._client.set_tag(run_id, "error", fields["error"])
        how = ": ".join([fields["status"], *([fields["error"]] if "error" in fields else [])])
        self._client.set_tag(run_id, f"attempt.{fields['attempt']}.ended", how)
        self._describe(self._client.get_run(run_id), fields.get("description"))
        self._client.set_terminated(run_id, fields["status"], time_ms)

    def _log_dataset(self, run_id: str, dataset: Mapping[str, Any]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        source = dataset["source"]
        kind, key = ("http", "url") if source.startswith("http") else ("local", "uri")
        entity = Dataset(
            dataset["name"][:500],
            dataset["digest"],
            kind,
            json.dumps({key: source}),
            profile=json.dumps(dataset["counts"]),
        )
        tag = InputTag("mlflow.data.context", "training")
        self._client.log_inputs(run_id, datasets=[DatasetInput(entity, [tag])])

    def _describe(self, run: Any, text: str | None) -> None:
        """Set the description, unless somebody has changed it on MLflow's pages."""
        from mlflow.entities import RunTag

        if text is None:
            return
        tags = run.data.tags
        if _NOTE in tags and _digest(tags[_NOTE]) != tags.get(_NOTE_DIGEST):
            return
        text = text.replace(RUN_ID, run.info.run_id)[:MAX_TAG]
        note = [RunTag(_NOTE, text), RunTag(_NOTE_DIGEST, _digest(text))]
        self._client.log_batch(run.info.run_id, tags=note)

    @contextmanager
    def _patience(self, *files: Path) -> Iterator[Any]:
        """The client, with a timeout for these files: a server answers once it has stored them."""
        seconds = max(file.stat().st_size for file in files) // SLOWEST_UPLOAD
        client = self._client  # whose first use sets what is changed here
        name = "MLFLOW_HTTP_REQUEST_TIMEOUT"
        value = os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"]
        os.environ[name] = str(int(value) + seconds)
        try:
            yield client
        finally:
            os.environ[name] = value

    def _mark_table(self, run_id: str, path: str) -> None:
        """As `mlflow.log_table` does, so that the pages show the file as a table."""
        tag = "mlflow.loggedArtifacts"
        known = json.loads(self._client.get_run(run_id).data.tags.get(tag, "[]"))
        entry = {"path": path, "type": "table"}
        if entry not in known:
            self._client.set_tag(run_id, tag, json.dumps([*known, entry]))

    def _get_run(self, run_id: str) -> Any:
        """The run, or None where the store has no such run (any more)."""
        from mlflow.exceptions import MlflowException

        try:
            run = self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return run if run.info.lifecycle_stage == "active" else None

    def _experiment(self, name: str) -> str:
        if experiment_id := self.find_experiment(name):
            return experiment_id
        # A database has no artifact store of its own: MLflow would put the files below the working
        # directory.
        database = self._address.startswith(("sqlite", "postgresql", "mysql", "mssql"))
        artifacts = (self._storage.absolute() / "mlartifacts").as_uri() if database else None
        # The kind opens MLflow's pages for training, not those for language-model applications.
        created = self._client.create_experiment(
            name, artifacts, {"mlflow.experimentKind": "custom_model_development"}
        )
        return str(created)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
