"""Download the model that a run logged to MLflow, without the run's storage and without torch."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lwo_dist.access import umask_of
from lwo_dist.errors import UserError, printable
from lwo_dist.files import is_plain, is_regular, put_in_place, refuse_existing, walk
from lwo_dist.redaction import redact

from .mlflow_store import MLflowStore
from .sender import reason

__all__ = ["fetch_model"]

_TIMEOUT_S = 30
_FOLDER = "model"
"""The exported folder in a logged model, beside what MLflow needs to load it."""
_SHOWN_RUNS = 5


def fetch_model(uri: str, run: str, target: Path | None = None, *, overwrite: bool = False) -> Path:
    """Download the model of an MLflow run as a plain Hugging Face folder, completely or not at all.

    Only the owner can read it.

    Args:
        uri: the tracking server or database.
        run: the run's id or its name.
        target: None: a folder with the run's name in the working directory.
        overwrite: replace a model that is in `target`.

    Returns:
        The folder, absolute.

    Raises:
        UserError: no such server or run, several runs of that name, a run without a model, odd
            file names, or `target` exists or cannot be written.
    """
    database = Path(uri.removeprefix("sqlite:///"))
    if uri.startswith("sqlite:///") and not database.is_file():
        # MLflow would create it.
        raise UserError(f"MLflow at {redact(uri)}: no such database; correct --uri")
    store = MLflowStore(uri, Path(), _TIMEOUT_S)
    with _one_line(store.uri, "start it, or correct --uri"):
        found = _find_run(store.client, run, store.uri)
        location = _model_location(store.client, found)
    if location is None:
        raise UserError(
            f"RUN = {run}: MLflow at {store.uri} has no model of this run (it has not ended, or"
            " tracking.log_model was false); export it from the run's storage: lwo-dist export"
            " <storage>/<run_name>"
        )
    if target is None:
        name = str(found.info.run_name)
        if not is_plain(name) or "/" in name:
            raise UserError(f"RUN = {run}: its name is no name of a folder; give one with --to")
        target = Path(name)
    refuse_existing(target, overwrite=overwrite)
    target = target.resolve() if target.is_symlink() else target.absolute()
    temporary = target.with_name(f".{target.name}.tmp")
    with umask_of("private"):
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            with _one_line(store.uri, "the model was not downloaded"):
                _download(location, uri, temporary)
            model = temporary / _FOLDER
            _check(model)
            put_in_place(model, target)
        except OSError as error:
            raise UserError(
                f"--to = {target}: {error.strerror or error}; give a folder with enough space"
            ) from None
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return target


def _find_run(client: Any, run: str, server: str) -> Any:
    from mlflow.exceptions import MlflowException

    if re.fullmatch(r"[0-9a-f]{32}", run):
        try:
            return client.get_run(run)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
    if "'" in run and '"' in run:
        raise UserError(f"RUN = {run}: MLflow cannot search for this name; give the run's id")
    quote = '"' if "'" in run else "'"
    experiments = [experiment.experiment_id for experiment in _experiments(client)]
    found = client.search_runs(
        experiments, f"attributes.run_name = {quote}{run}{quote}", max_results=_SHOWN_RUNS + 1
    )
    if not found:
        raise UserError(
            f"RUN = {run}: MLflow at {server} has no run of this id or name; its pages list them"
        )
    if len(found) > 1:
        ids = ", ".join(str(other.info.run_id) for other in found[:_SHOWN_RUNS])
        more = ", ..." if len(found) > _SHOWN_RUNS else ""
        raise UserError(
            f"RUN = {run}: MLflow at {server} has several runs of this name; give the id of one:"
            f" {ids}{more}"
        )
    return found[0]


def _experiments(client: Any) -> Iterator[Any]:
    token = None
    while True:
        page = client.search_experiments(page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _model_location(client: Any, run: Any) -> str | None:
    """Where the artifacts of the newest complete model of a run are; None without one."""
    models = client.search_logged_models(
        [run.info.experiment_id],
        f"source_run_id = '{run.info.run_id}'",
        order_by=[{"field_name": "creation_time", "ascending": False}],
    )
    for model in models:
        if model.status != "READY":
            continue
        files = client.list_logged_model_artifacts(model.model_id, _FOLDER)
        if any(file.path == f"{_FOLDER}/config.json" for file in files):
            return str(model.artifact_location)
    return None


def _download(location: str, uri: str, folder: Path) -> None:
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", str(sys.stderr.isatty()).lower())
    from mlflow.artifacts import download_artifacts

    # MLflow refuses names that lead out of the folder.
    download_artifacts(
        artifact_uri=f"{location.rstrip('/')}/{_FOLDER}", dst_path=str(folder), tracking_uri=uri
    )


def _check(folder: Path) -> None:
    """Refuse what is no model's folder. Files may have come with modes of their own."""
    for path in walk(folder):
        name = path.relative_to(folder).as_posix()
        if not is_plain(name) or not (
            is_regular(path) or (path.is_dir() and not path.is_symlink())
        ):
            raise UserError(f"the model has a file that is not taken: {printable(name[:100])}")
        path.chmod(0o700 if path.is_dir() else 0o600)
    if not (folder / "config.json").is_file():
        raise UserError("the model in MLflow has no config.json, so it is not one of lwo_dist")
    folder.chmod(0o700)


@contextmanager
def _one_line(server: str, remedy: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"MLflow at {server}: {reason(error)}; {remedy}") from None
