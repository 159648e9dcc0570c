"""MLflow tracking that never makes the run wait.

The callback writes to the spool and returns; the sender thread does the rest, including the import
of MLflow.
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

from lwo_dist.callback import Callback
from lwo_dist.config import Config, TrackingConfig
from lwo_dist.config.tracking import NO_PASSWORD
from lwo_dist.errors import UserError, printable
from lwo_dist.redaction import redact, refuse_password
from lwo_dist.run_info import (
    RunInfo,
    dataset_record,
    public_config,
    run_parameters,
    run_tags,
)
from lwo_dist.spool import SPOOL_NAME, Sent, Spool, is_being_written, read_spool
from lwo_dist.storage import RunFolder, storage_folder
from lwo_dist.tasks.scores import ScoreSheet

from .close import append_end, end_dead_run, known_store, replay_hint
from .description import describe_result, describe_start
from .mlflow_store import MLflowStore
from .restarts import Restarts
from .sender import Sender, reason, send_spool, unsent

__all__ = [
    "DATABASE",
    "MLflowCallback",
    "create_run",
    "end_run",
    "experiment_page",
    "replay",
    "run_page",
    "tracking_uri",
]

DATABASE = "mlflow.db"
"""Used beside the runs if no tracking server is configured."""

CALL_TIMEOUT_S = 5
REPLAY_TIMEOUT_S = 30  # nobody's training waits for a replay, and a slow server is better than none
FAILED_FLUSH_S = 10.0  # a failed run is about to be restarted; its next attempt sends the rest

logger = logging.getLogger(__name__)


def tracking_uri(tracking: TrackingConfig, storage: Path) -> str:
    """`tracking.uri`, else MLFLOW_TRACKING_URI, else a sqlite file in `storage`. May hold a
    password: never log it.

    Raises:
        UserError: `tracking.uri` holds a password; configurations are kept and shown.
    """
    refuse_password("tracking.uri", tracking.uri or "", NO_PASSWORD)
    return (
        tracking.uri
        or os.environ.get("MLFLOW_TRACKING_URI")
        or f"sqlite:///{storage.absolute()}/{DATABASE}"
    )


def experiment_page(tracking: TrackingConfig, uri: str, pages: str | None = None) -> str:
    """The URL of the page with the experiment's runs.

    Args:
        uri: the store.
        pages: the address of the server that shows it; None: `uri` is one.

    Raises:
        UserError: the server does not answer or has no such experiment.
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
            f"tracking.experiment = {tracking.experiment}: MLflow at {redact(uri)} has no such"
            " experiment yet; start a run, or correct the name"
        )
    return _page(pages or uri, f"{experiment_id}/runs")


def run_page(config: Config, run_id: str | None) -> str | None:
    """The URL of a run's page; None if only `lwo-dist ui` shows it, or MLflow does not answer."""
    uri = tracking_uri(config.tracking, storage_folder(config.storage))
    if run_id is None or not uri.startswith(("http://", "https://")):
        return None
    try:
        store = MLflowStore(uri, Path(), CALL_TIMEOUT_S)
        experiment_id = store.find_experiment(config.tracking.experiment)
    except Exception:  # the run is done, and it has been said that MLflow lacks something
        return None
    return _page(uri, f"{experiment_id}/runs/{run_id}") if experiment_id else None


def _page(server: str, path: str) -> str:
    # Without the parameter MLflow opens its pages for language-model applications.
    address = redact(server).rstrip("/")
    return f"{address}/#/experiments/{printable(path[:200])}?workflowType=machine_learning"


def create_run(config: Config, storage: Path, run_name: str) -> str | None:
    """Find or create the one MLflow run that spans all attempts of `<storage>/<run_name>`.

    The driver calls this once.

    Returns:
        The run's id. None if tracking is off, or if the server cannot be reached: that is logged in
        one line, and the sender creates the run later.
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
                "MLflow at %s: %s; the run continues and is sent once MLflow is back",
                redact(uri),
                reason(error),
            )
    return sent.run_id


def end_run(config: Config, storage: Path, run_name: str, status: str) -> None:
    """End the MLflow run as FAILED or KILLED, after the workers died without doing so.

    The driver calls this. It never raises.
    """
    path = storage / run_name / SPOOL_NAME
    if not config.tracking.enabled or not path.with_suffix(".sent.json").exists():
        return
    uri = tracking_uri(config.tracking, storage)
    try:
        end_dead_run(path, status)
        sent = Sent.load(path)
        sent.address(redact(uri), None)
        send_spool(path, MLflowStore(uri, storage, CALL_TIMEOUT_S), sent)
    except Exception as error:
        hint = replay_hint(path, redact(uri))
        logger.warning("MLflow at %s: %s; %s", redact(uri), reason(error), hint)


def replay(spool: Path, uri: str | None = None) -> int:
    """Send what MLflow lacks of a spool.

    A run without an end was killed, and is marked as such. Sending twice does no harm, because
    MLflow drops points that it has.

    Args:
        spool: the spool, or the folder of its run.
        uri: the store to send to; None: the run's own store, if that is MLFLOW_TRACKING_URI or the
            database beside the run.

    Returns:
        The number of metric points that were sent.

    Raises:
        UserError: there is no such spool, the run is still running, its folder contains symlinks,
            only the run's own files name its store, or the store cannot be reached.
    """
    path = spool / SPOOL_NAME if spool.is_dir() else spool
    if not path.is_file():
        raise UserError(f"{path} does not exist; give the {SPOOL_NAME} in a run's folder")
    if is_being_written(path):
        raise UserError(
            f"{path} belongs to a run that is still running and sends it itself; wait until it ends"
        )
    RunFolder.at(str(path.absolute().parent)).refuse_links()
    sent = Sent.load(path)
    if uri is None:
        first = next((record.fields for record in read_spool(path) if record.kind == "run"), {})
        named = sent.uri or first.get("uri")
        uri = known_store(path, named) if named else os.environ.get("MLFLOW_TRACKING_URI")
        if named and uri is None:
            raise UserError(
                f"{path} names MLflow at {redact(str(named))[:300]}, which is not configured here;"
                " if you trust it, give it with --uri or in MLFLOW_TRACKING_URI"
            )
    if uri is None:
        raise UserError(f"{path} does not name an MLflow server; give its address with --uri")
    sent.address(redact(uri), None)
    try:
        end_dead_run(path, "KILLED")
        send_spool(path, MLflowStore(uri, path.parent.parent, REPLAY_TIMEOUT_S), sent)
    except Exception as error:
        raise UserError(
            f"MLflow at {redact(uri)}: {reason(error)}; it lacks {unsent(path, sent)}; when it is"
            f" up, {replay_hint(path, redact(uri))}"
        ) from None
    return sent.points


def _never_raises(event: Callable[..., None]) -> Callable[..., None]:
    """Turn an exception of the event into one warning: tracking must not end the run."""

    @functools.wraps(event)
    def guarded(self: MLflowCallback, *args: Any) -> None:
        try:
            event(self, *args)
        except Exception as error:
            self._complain(f"{event.__name__}: {reason(error)}")

    return guarded


class MLflowCallback(Callback):
    """Spools every point of a run and has it sent. Only the last event waits for the network.

    Args:
        storage: the folder that holds the run's folder.
        run_id: from `create_run`; None: the sender creates the run when it can.
    """

    def __init__(self, tracking: TrackingConfig, storage: Path, run_id: str | None = None) -> None:
        self._tracking = tracking
        self._storage = storage
        self._given_run_id = run_id
        self._spool: Spool | None = None
        self._sender: Sender | None = None
        self._info: RunInfo | None = None
        self._count_key = ""
        self._restarts: Restarts | None = None
        self._complaints: set[str] = set()

    @property
    def run_id(self) -> str | None:
        """The MLflow run, once there is one."""
        return self._sender.sent.run_id if self._sender else self._given_run_id

    @_never_raises
    def on_run_start(self, info: RunInfo) -> None:
        uri = tracking_uri(self._tracking, self._storage)
        path = info.run_dir.absolute() / SPOOL_NAME
        spool = Spool(path)
        sent = Sent.load(path)
        sent.address(redact(uri), self._given_run_id)
        (info.run_dir / "config.yaml").write_text(
            yaml.safe_dump(public_config(info.config), sort_keys=False)
        )
        spool.append(
            "run",
            experiment=self._tracking.experiment,
            run_name=info.run_dir.name,
            key=sent.key,
            uri=sent.uri,
            attempt=spool.attempts + 1,
            start_step=info.start_step,
            layers=info.layers,
            layer_sizes=info.layer_sizes,
            model_size=info.parameters,
            lora_size=info.lora_parameters,
            device=info.device,
            parameters=run_parameters(info),
            tags=run_tags(info.config, info.hosts, info.device),
            dataset=dataset_record(info) if info.fingerprint else None,
            description=describe_start(info),
            **info.task_record,
        )
        spool.append("artifact", path="config.yaml")
        self._info = info
        self._count_key = ScoreSheet.read(info.task_record, ()).count_key
        self._spool = spool
        self._sender = Sender(path, MLflowStore(uri, self._storage, CALL_TIMEOUT_S), sent)
        self._restarts = Restarts(spool)
        self._sender.start()
        self._sender.wake()

    @_never_raises
    def on_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._restarts:
            metrics = {**metrics, **self._restarts.points(step, metrics)}
        self._points(step, metrics)

    @_never_raises
    def on_visit(self, step: int, layer: str, metrics: Mapping[str, float]) -> None:
        self._points(step, metrics)

    @_never_raises
    def on_evaluation(self, step: int, scores: Mapping[str, float]) -> None:
        # The number of examples never changes; it is a parameter.
        count = self._count_key
        self._points(step, {name: value for name, value in scores.items() if name != count})

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
        best_step = summary.get("eval", {}).get("best_step")
        model = None
        if (
            self._spool
            and self._tracking.log_model
            and (self._spool.path.parent / "model").is_dir()
        ):
            model = {
                "path": "model",
                # MLflow lists the models of all runs together, and allows no dot in a name.
                "name": self._spool.path.parent.name.replace(".", "-"),
                "step": best_step,
                "register_as": self._tracking.register_as,
            }
        description = self._describe(summary, model["name"] if model else None)
        self._end(
            "FINISHED",
            self._tracking.flush_timeout_s,
            best_step=best_step,
            description=description,
            model=model,
        )

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

    def _describe(self, summary: Mapping[str, Any], model: str | None) -> str | None:
        if self._info is None or self._sender is None:
            return None
        try:
            return describe_result(self._info, summary, str(self._sender.sent.uri), model)
        except Exception as problem:  # no reason to leave a run without its end
            logger.warning("the description could not be written: %s", reason(problem))
            return None

    def _end(self, status: str, timeout_s: float, **more: Any) -> None:
        spool = self._spool
        sender = self._sender
        if spool is None or sender is None:
            return
        try:
            append_end(spool, status, **more)
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
                    replay_hint(spool.path, str(sender.sent.uri)),
                )

    def _complain(self, problem: str) -> None:
        if problem not in self._complaints:
            self._complaints.add(problem)
            logger.warning("tracking: %s; the run continues", problem)
