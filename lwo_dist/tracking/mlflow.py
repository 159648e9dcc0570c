"""MLflow, without ever costing the run a second: the one module that imports it.

The callback writes to the spool and returns; the sender thread does the rest, the import of MLflow included.
"""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from lwo_dist.callback import Callback, RunInfo
from lwo_dist.config import Config, TrackingConfig, UserError

from .facts import public_config, redact, run_parameters, run_tags
from .finish import close_spool, finish, remedy
from .sender import Sender, reason, send_spool, unsent
from .spool import SPOOL_NAME, Point, Sent, Spool, is_being_written, read_spool

__all__ = ["MLflowCallback", "create_run", "end_run", "replay", "tracking_uri"]

CALL_TIMEOUT_S = 5
REPLAY_TIMEOUT_S = 30  # nobody's training waits for a replay, and a slow server is better than none
FAILED_FLUSH_S = 10.0  # a run that failed is about to be restarted, and its next attempt sends the rest
MAX_PARAMETER, MAX_TAG = 6000, 5000  # characters
_KEY_TAG = "lwo_dist_run"

logger = logging.getLogger(__name__)


def tracking_uri(tracking: TrackingConfig, storage: Path) -> str:
    """`tracking.uri`, else MLFLOW_TRACKING_URI, else a sqlite file in `storage`. May hold a password: never log it."""
    return tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{storage.absolute()}/mlflow.db"


def create_run(config: Config, storage: Path, run_name: str) -> str | None:
    """Find or make the one MLflow run that spans all attempts of `<storage>/<run_name>`; the driver calls this once.

    None where tracking is off or the server cannot be reached (said in one line): the sender makes the run later.
    """
    if not config.tracking.enabled:
        return None
    uri = tracking_uri(config.tracking, storage)
    spool = storage / run_name / SPOOL_NAME
    sent = Sent.load(spool)
    sent.address(redact(uri), None)
    if sent.run_id is None:
        fields = {"experiment": config.tracking.experiment, "run_name": run_name, "key": sent.key}
        try:
            sent.save()  # the key first: a run whose id gets lost on the way is found again by it
            store = _MLflowStore(uri, storage, CALL_TIMEOUT_S)
            sent.run_id = store.find_or_create(fields | {"tags": run_tags(config)}, int(time.time() * 1000))
            sent.save()
        except Exception as error:
            logger.warning("MLflow at %s: %s; the run goes on and is sent when it is back", redact(uri), reason(error))
    return sent.run_id


def end_run(config: Config, storage: Path, run_name: str, status: str) -> None:
    """For the driver, when the workers died without a word: end the MLflow run as FAILED or KILLED. Never raises."""
    path = storage / run_name / SPOOL_NAME
    if not config.tracking.enabled or not path.with_suffix(".sent.json").exists():
        return
    uri = tracking_uri(config.tracking, storage)
    try:
        close_spool(path, status)
        sent = Sent.load(path)
        sent.address(redact(uri), None)
        send_spool(path, _MLflowStore(uri, storage, CALL_TIMEOUT_S), sent)
    except Exception as error:
        logger.warning("MLflow at %s: %s; %s", redact(uri), reason(error), remedy(path))


def replay(spool: Path, uri: str | None = None) -> int:
    """Send what is left of a spool (or of the run folder it lies in) and return how many metric points that was.

    A run without an end was killed, and is marked so. Sending twice does no harm: MLflow drops what it has.
    `uri`: where to, if not to the store the run was for.

    Raises:
        UserError: no such spool, a run that is still going, a store that cannot be reached.
    """
    path = spool / SPOOL_NAME if spool.is_dir() else spool
    if not path.is_file():
        raise UserError(f"{path} does not exist; give the {SPOOL_NAME} in a run's folder")
    if is_being_written(path):
        raise UserError(f"{path} belongs to a run that is still going and sends by itself; wait for its end")
    sent = Sent.load(path)
    if uri is None:
        first = next((record.fields for record in read_spool(path) if record.kind == "run"), {})
        uri = sent.uri or first.get("uri")
        environment = os.environ.get("MLFLOW_TRACKING_URI")
        if uri is None or (environment and redact(environment) == uri):  # the same store, perhaps with its password
            uri = environment
    if uri is None:
        raise UserError(f"{path} does not say where it was to go; give the address of MLflow")
    sent.address(redact(uri), None)
    try:
        close_spool(path, "KILLED")
        send_spool(path, _MLflowStore(uri, path.parent.parent, REPLAY_TIMEOUT_S), sent)
    except Exception as error:
        raise UserError(
            f"MLflow at {redact(uri)}: {reason(error)}; it lacks {unsent(path, sent)}; when it is up, {remedy(path)}"
        ) from None
    return sent.points


def _never_raises(event: Callable[..., None]) -> Callable[..., None]:
    """Tracking may fail, the run may not: turn an exception into one warning."""

    @functools.wraps(event)
    def guarded(self: MLflowCallback, *args: Any) -> None:
        try:
            event(self, *args)
        except Exception as error:
            self._complain(f"{event.__name__}: {reason(error)}")

    return guarded


class MLflowCallback(Callback):
    """Spools every point of a run and has it sent. No event ever waits for the network but the last."""

    def __init__(self, tracking: TrackingConfig, storage: Path, run_id: str | None = None) -> None:
        """`run_id`: from `create_run`; None: the sender makes the run when it can."""
        self._tracking, self._storage, self._given_run_id = tracking, storage, run_id
        self._spool: Spool | None = None
        self._sender: Sender | None = None
        self._complaints: set[str] = set()

    @property
    def run_id(self) -> str | None:
        """The MLflow run, once there is one."""
        return self._sender.sent.run_id if self._sender else self._given_run_id

    @_never_raises
    def on_run_start(self, info: RunInfo) -> None:
        uri = tracking_uri(self._tracking, self._storage)
        path = info.folder.absolute() / SPOOL_NAME
        spool, sent = Spool(path), Sent.load(path)
        sent.address(redact(uri), self._given_run_id)
        (info.folder / "config.yaml").write_text(yaml.safe_dump(public_config(info.config), sort_keys=False))
        spool.append(
            "run",
            experiment=self._tracking.experiment,
            run_name=info.folder.name,
            key=sent.key,
            uri=sent.uri,
            attempt=spool.attempts + 1,
            start_step=info.start_step,
            layers=info.layers,
            parameters=run_parameters(info),
            tags=run_tags(info.config, info.parameters),
        )
        spool.append("artifact", path="config.yaml")
        self._spool, self._sender = spool, Sender(path, _MLflowStore(uri, self._storage, CALL_TIMEOUT_S), sent)
        self._sender.start()
        self._sender.wake()

    @_never_raises
    def on_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._spool and self._sender:
            self._spool.append_metrics(step, metrics)
            self._sender.wake()

    @_never_raises
    def on_evaluation(self, step: int, scores: Mapping[str, float]) -> None:
        self.on_metrics(step, scores)

    @_never_raises
    def on_switch(self, step: int, layer: str) -> None:
        if self._spool:
            self._spool.append_switch(step, layer)

    @_never_raises
    def on_checkpoint(self, step: int, folder: Path) -> None:
        if self._spool:
            self._spool.sync()

    @_never_raises
    def on_run_end(self, summary: Mapping[str, Any]) -> None:
        self._end("FINISHED", None, self._tracking.flush_timeout_s)

    @_never_raises
    def on_run_failed(self, error: BaseException) -> None:
        killed = isinstance(error, KeyboardInterrupt | SystemExit)
        message = redact(" ".join(f"{type(error).__name__}: {error}".split()))[:1000]
        self._end("KILLED" if killed else "FAILED", message, min(FAILED_FLUSH_S, self._tracking.flush_timeout_s))

    def _end(self, status: str, error: str | None, timeout_s: float) -> None:
        spool, sender = self._spool, self._sender
        if spool is None or sender is None:
            return
        try:
            finish(spool, status, error=error)
        finally:
            spool.close()
            self._spool = None
            if not sender.close(timeout_s):
                why = sender.problem or f"not done after {timeout_s:g} s"
                logger.warning("MLflow lacks %s (%s); %s", unsent(spool.path, sender.sent), why, remedy(spool.path))

    def _complain(self, problem: str) -> None:
        if problem not in self._complaints:
            self._complaints.add(problem)
            logger.warning("tracking: %s; the run goes on", problem)


class _MLflowStore:
    """One run at one tracking server or database. Every call may raise, and may be repeated without harm."""

    def __init__(self, uri: str, storage: Path, timeout_s: int) -> None:
        self.uri = redact(uri)
        self._address, self._storage, self._timeout_s = uri, storage, timeout_s

    @functools.cached_property
    def _client(self) -> Any:
        # MLflow reads these at each call. Its own defaults, 120 s and 7 retries, hold a call of a dead server for
        # four minutes; the rest keeps it from printing between the progress lines and from reporting to its makers.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(self._timeout_s))
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient

        logging.getLogger("mlflow.store.db").setLevel(logging.WARNING)
        return MlflowClient(tracking_uri=self._address)

    def find_or_create(self, fields: Mapping[str, Any], time_ms: int) -> str:
        experiment_id = self._experiment(fields["experiment"])
        found = self._client.search_runs([experiment_id], f"tags.{_KEY_TAG} = '{fields['key']}'", max_results=1)
        if found:
            return found[0].info.run_id
        tags = fields["tags"] | {_KEY_TAG: fields["key"]}
        return self._client.create_run(experiment_id, time_ms, tags, run_name=fields["run_name"]).info.run_id

    def open_run(self, fields: Mapping[str, Any], time_ms: int, run_id: str | None) -> str:
        from mlflow.entities import Param, RunTag

        run = self._get_run(run_id) if run_id else None
        if run is None:
            run = self._client.get_run(self.find_or_create(fields, time_ms))
        known, attempt = run.data.params, fields["attempt"]
        tags = fields["tags"] | {"attempts": str(attempt)}
        if attempt > 1:
            tags[f"attempt.{attempt}.start_step"] = str(fields["start_step"])
        parameters = []
        for name, value in fields["parameters"].items():
            name, value = name[:250], value[:MAX_PARAMETER]
            if name not in known:
                parameters.append(Param(name, value))
            elif known[name] != value:  # a parameter of MLflow never changes; what a restart changed goes to a tag
                tags[f"attempt.{attempt}.{name}"[:250]] = value
        self._client.log_batch(
            run.info.run_id, params=parameters, tags=[RunTag(name, value[:MAX_TAG]) for name, value in tags.items()]
        )
        if run.info.status != "RUNNING":
            self._client.update_run(run.info.run_id, status="RUNNING")
        return run.info.run_id

    def log_points(self, run_id: str, points: list[Point]) -> None:
        from mlflow.entities import Metric

        # With the spool's own times: a batch that is sent twice is then the same points, and MLflow keeps one.
        self._client.log_batch(run_id, metrics=[Metric(p.name, p.value, p.time_ms, p.step) for p in points])

    def upload(self, run_id: str, file: Path, folder: str | None) -> None:
        self._client.log_artifact(run_id, str(file), folder)

    def end_run(self, run_id: str, fields: Mapping[str, Any], time_ms: int) -> None:
        if "error" in fields:
            self._client.set_tag(run_id, "error", fields["error"])
        self._client.set_terminated(run_id, fields["status"], time_ms)

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
        if experiment := self._client.get_experiment_by_name(name):
            return experiment.experiment_id
        # A database has no artifact store of its own: MLflow would put the files below the working directory.
        database = self._address.startswith(("sqlite", "postgresql", "mysql", "mssql"))
        place = (self._storage.absolute() / "mlartifacts").as_uri() if database else None
        # The kind opens MLflow's pages for training, not those for language-model applications.
        return self._client.create_experiment(name, place, {"mlflow.experimentKind": "custom_model_development"})
