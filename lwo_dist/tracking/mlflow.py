"""MLflow, without ever costing the run a second.

The callback writes to the spool and returns; the sender thread does the rest, the import of MLflow
included.
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
from lwo_dist.config import Config, TrackingConfig
from lwo_dist.errors import UserError
from lwo_dist.registry import TASKS
from lwo_dist.spool import SPOOL_NAME, Sent, Spool, is_being_written, read_spool

from .close import close_spool, finish, remedy
from .facts import holds_password, public_config, redact, run_parameters, run_tags
from .mlflow_store import MLflowStore
from .restarts import Restarts
from .sender import Sender, reason, send_spool, unsent

__all__ = ["MLflowCallback", "create_run", "end_run", "experiment_page", "replay", "tracking_uri"]

CALL_TIMEOUT_S = 5
REPLAY_TIMEOUT_S = 30  # nobody's training waits for a replay, and a slow server is better than none
FAILED_FLUSH_S = (
    10.0  # a run that failed is about to be restarted, and its next attempt sends the rest
)

logger = logging.getLogger(__name__)


def tracking_uri(tracking: TrackingConfig, storage: Path) -> str:
    """`tracking.uri`, else MLFLOW_TRACKING_URI, else a sqlite file in `storage`. May hold a
    password: never log it.

    Raises:
        UserError: `tracking.uri` holds a password; configurations are kept and shown.
    """
    if tracking.uri and holds_password(tracking.uri):
        raise UserError(
            f"tracking.uri = {redact(tracking.uri)} was given with a password; keep it in the"
            " environment: MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or the whole"
            " address in MLFLOW_TRACKING_URI"
        )
    return (
        tracking.uri
        or os.environ.get("MLFLOW_TRACKING_URI")
        or f"sqlite:///{storage.absolute()}/mlflow.db"
    )


def experiment_page(tracking: TrackingConfig, uri: str) -> str:
    """The page of the experiment at a server. Raises: UserError, where the server does not answer
    or has none.
    """
    try:
        experiment_id = MLflowStore(uri, Path(), CALL_TIMEOUT_S).find_experiment(
            tracking.experiment
        )
    except Exception as error:
        raise UserError(
            f"MLflow at {redact(uri)}: {reason(error)}; start it, or correct tracking.uri"
        ) from None
    if experiment_id is None:
        raise UserError(
            f"tracking.experiment = {tracking.experiment}: MLflow at {redact(uri)} has no runs of"
            " it yet"
        )
    return f"{redact(uri).rstrip('/')}/#/experiments/{experiment_id}"


def create_run(config: Config, storage: Path, run_name: str) -> str | None:
    """Find or make the one MLflow run that spans all attempts of `<storage>/<run_name>`; the driver
    calls this once.

    None where tracking is off or the server cannot be reached (said in one line): the sender makes
    the run later.
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
            store = MLflowStore(uri, storage, CALL_TIMEOUT_S)
            sent.run_id = store.find_or_create(
                fields | {"tags": run_tags(config)}, int(time.time() * 1000)
            )
            sent.save()
        except Exception as error:
            logger.warning(
                "MLflow at %s: %s; the run goes on and is sent when it is back",
                redact(uri),
                reason(error),
            )
    return sent.run_id


def end_run(config: Config, storage: Path, run_name: str, status: str) -> None:
    """For the driver, when the workers died without a word: end the MLflow run as FAILED or KILLED.
    Never raises.
    """
    path = storage / run_name / SPOOL_NAME
    if not config.tracking.enabled or not path.with_suffix(".sent.json").exists():
        return
    uri = tracking_uri(config.tracking, storage)
    try:
        close_spool(path, status)
        sent = Sent.load(path)
        sent.address(redact(uri), None)
        send_spool(path, MLflowStore(uri, storage, CALL_TIMEOUT_S), sent)
    except Exception as error:
        logger.warning("MLflow at %s: %s; %s", redact(uri), reason(error), remedy(path))


def replay(spool: Path, uri: str | None = None) -> int:
    """Send what is left of a spool (or of the run folder it lies in) and return how many metric
    points that was.

    A run without an end was killed, and is marked so. Sending twice does no harm: MLflow drops what
    it has. `uri`: where to, if not to the store the run was for.

    Raises:
        UserError: no such spool, a run that is still going, a store that cannot be reached.
    """
    path = spool / SPOOL_NAME if spool.is_dir() else spool
    if not path.is_file():
        raise UserError(f"{path} does not exist; give the {SPOOL_NAME} in a run's folder")
    if is_being_written(path):
        raise UserError(
            f"{path} belongs to a run that is still going and sends by itself; wait for its end"
        )
    sent = Sent.load(path)
    if uri is None:
        first = next((record.fields for record in read_spool(path) if record.kind == "run"), {})
        uri = sent.uri or first.get("uri")
        environment = os.environ.get("MLFLOW_TRACKING_URI")
        if uri is None or (
            environment and redact(environment) == uri
        ):  # the same store, perhaps with its password
            uri = environment
    if uri is None:
        raise UserError(f"{path} does not say where it was to go; give the address of MLflow")
    sent.address(redact(uri), None)
    try:
        close_spool(path, "KILLED")
        send_spool(path, MLflowStore(uri, path.parent.parent, REPLAY_TIMEOUT_S), sent)
    except Exception as error:
        raise UserError(
            f"MLflow at {redact(uri)}: {reason(error)}; it lacks {unsent(path, sent)}; when it is"
            f" up, {remedy(path)}"
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
    """Spools every point of a run and has it sent. No event ever waits for the network but the
    last.
    """

    def __init__(self, tracking: TrackingConfig, storage: Path, run_id: str | None = None) -> None:
        """`run_id`: from `create_run`; None: the sender makes the run when it can."""
        self._tracking, self._storage, self._given_run_id = tracking, storage, run_id
        self._spool: Spool | None = None
        self._sender: Sender | None = None
        self._restarts: Restarts | None = None
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
        (info.folder / "config.yaml").write_text(
            yaml.safe_dump(public_config(info.config), sort_keys=False)
        )
        spool.append(
            "run",
            experiment=self._tracking.experiment,
            run_name=info.folder.name,
            key=sent.key,
            uri=sent.uri,
            attempt=spool.attempts + 1,
            start_step=info.start_step,
            layers=info.layers,
            layer_sizes=info.layer_sizes,
            model_size=info.parameters.get("parameters"),
            parameters=run_parameters(info),
            tags=run_tags(info.config, info.hosts),
            **TASKS.get(info.config.task).sheet.record(),
        )
        spool.append("artifact", path="config.yaml")
        self._spool, self._sender = (
            spool,
            Sender(path, MLflowStore(uri, self._storage, CALL_TIMEOUT_S), sent),
        )
        self._restarts = Restarts(spool)
        self._sender.start()
        self._sender.wake()

    @_never_raises
    def on_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        self._points(
            step, {**metrics, **(self._restarts.points(step, metrics) if self._restarts else {})}
        )

    @_never_raises
    def on_visit(self, step: int, layer: str, metrics: Mapping[str, float]) -> None:
        self._points(step, metrics)

    @_never_raises
    def on_evaluation(self, step: int, scores: Mapping[str, float]) -> None:
        self._points(step, scores)

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
        model, best_step = None, summary.get("eval", {}).get("best_step")
        if (
            self._spool
            and self._tracking.log_model
            and (self._spool.path.parent / "model").is_dir()
        ):
            model = {
                "path": "model",
                "name": "model",
                "step": best_step,
                "register_as": self._tracking.register_as,
            }
        self._end("FINISHED", self._tracking.flush_timeout_s, best_step=best_step, model=model)

    @_never_raises
    def on_run_stopped(self, reason: str) -> None:
        self._end(
            "KILLED",
            min(FAILED_FLUSH_S, self._tracking.flush_timeout_s),
            error=redact(reason)[:1000],
        )

    @_never_raises
    def on_run_failed(self, error: BaseException) -> None:
        killed = isinstance(error, KeyboardInterrupt | SystemExit)
        message = redact(" ".join(f"{type(error).__name__}: {error}".split()))[:1000]
        timeout_s = min(FAILED_FLUSH_S, self._tracking.flush_timeout_s)
        self._end("KILLED" if killed else "FAILED", timeout_s, error=message)

    def _points(self, step: int, values: Mapping[str, float]) -> None:
        if self._spool and self._sender:
            self._spool.append_metrics(step, values)
            self._sender.wake()

    def _end(self, status: str, timeout_s: float, **more: Any) -> None:
        spool, sender = self._spool, self._sender
        if spool is None or sender is None:
            return
        try:
            finish(spool, status, **more)
        finally:
            spool.close()
            self._spool = None
            patience_s = self._tracking.upload_timeout_s if status == "FINISHED" else 0.0
            if not sender.close(timeout_s, patience_s):
                why = sender.problem or "not done in time"
                logger.warning(
                    "MLflow lacks %s (%s); %s",
                    unsent(spool.path, sender.sent),
                    why,
                    remedy(spool.path),
                )

    def _complain(self, problem: str) -> None:
        if problem not in self._complaints:
            self._complaints.add(problem)
            logger.warning("tracking: %s; the run goes on", problem)
