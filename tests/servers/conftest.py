"""A store of MLflow that was used once, for the tests that track."""

from __future__ import annotations

import contextlib
import io
import shutil

import pytest

from lwo_dist.tracking.mlflow import create_run
from tests.tracking import Server, config_for

SET_BY_US = (
    "MLFLOW_HTTP_REQUEST_TIMEOUT",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT",
    "MLFLOW_DISABLE_TELEMETRY",
)


def clean(patch):
    for name in (
        *SET_BY_US,
        "MLFLOW_TRACKING_URI",
        "MLFLOW_TRACKING_USERNAME",
        "MLFLOW_TRACKING_PASSWORD",
    ):
        patch.setenv(name, "")  # so that what a test leaves there is taken back
        patch.delenv(name)


@pytest.fixture
def clean_environment(monkeypatch):
    clean(monkeypatch)


@pytest.fixture(scope="module")
def first_use(tmp_path_factory):
    """A storage folder with a store that was used once, and what that printed. The first use takes
    many seconds.
    """
    folder = tmp_path_factory.mktemp("first")
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stderr(io.StringIO()) as printed,
    ):
        clean(patch)
        assert create_run(config_for(experiment="first"), folder, "first")
    return folder, printed.getvalue()


@pytest.fixture(scope="module")
def storage(first_use, tmp_path_factory):
    """One folder with one sqlite store for all tests that do not care."""
    folder = tmp_path_factory.mktemp("storage")
    shutil.copy(first_use[0] / "mlflow.db", folder)
    return folder


@pytest.fixture(scope="module")
def server(first_use, tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(first_use[0] / "mlflow.db", folder / "server.db")
    server = Server(folder)
    yield server
    server.stop()
