"""MLflow's server as its manifest starts it: same arguments, same environment, other folders and
port; and the permissions of the training user.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from .mlflow_pod import ADMIN, TRAINING, MlflowPod

pytestmark = pytest.mark.long
PATIENCE_S = 300
SERVICE = "lwo-dist-mlflow"
ADA = ("ada", "the password of ada")
Login = tuple[str, str]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of the server."""
    pod = MlflowPod(tmp_path_factory.mktemp("pod"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    for _ in range(2):  # A pod restarts.
        made = pod.make_users()
        assert made.returncode == 0, made.stderr
    log = pod.data / "server.log"
    process = pod.start_server(port, log)
    try:
        _wait(port, process, log)
        yield port
    finally:
        os.killpg(process.pid, 15)
        process.wait(60)


def _wait(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            if _status(port, "/health", host="10.0.0.7:5000") == 200:
                return
        except OSError:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.5)


def _request(
    port: int,
    path: str,
    *,
    host: str = f"{SERVICE}:5000",
    login: Login | None = None,
    method: str = "GET",
    body: Any = None,
) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    headers = {"Host": host, "Content-Type": "application/json"}
    if login:
        pair = ":".join(login).encode()
        headers["Authorization"] = f"Basic {base64.b64encode(pair).decode()}"
    connection.request(method, path, None if body is None else json.dumps(body), headers)
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def _status(port: int, path: str, *, host: str, login: Login | None = None) -> int:
    return _request(port, path, host=host, login=login)[0]


def _created(port: int, path: str, login: Login, body: Any) -> Any:
    status, text = _request(port, path, login=login, method="POST", body=body)
    assert status == 200, text
    return json.loads(text)


RUNS = "/api/2.0/mlflow/experiments/search?max_results=10"


def test_the_probe_needs_no_login_and_no_name(server: int) -> None:
    assert _status(server, "/health", host="10.1.2.3:5000") == 200


def test_runs_need_the_login(server: int) -> None:
    assert _status(server, RUNS, host=f"{SERVICE}:5000") == 401
    assert _status(server, RUNS, host=f"{SERVICE}:5000", login=(ADMIN[0], TRAINING[1])) == 401


@pytest.mark.parametrize(
    "host",
    [
        f"{SERVICE}:5000",
        f"{SERVICE}.lwo-dist.svc.cluster.local:5000",
        "127.0.0.1:8080",
        "localhost:5000",
    ],
)
@pytest.mark.parametrize("login", [ADMIN, TRAINING], ids=["admin", "training"])
def test_its_host_names_are_accepted(server: int, host: str, login: Login) -> None:
    assert _status(server, RUNS, host=host, login=login) == 200


def test_other_names_are_not(server: int) -> None:
    assert _status(server, RUNS, host="evil.example:5000", login=ADMIN) == 403


def test_training_logs_a_run_with_files_and_a_registered_model(
    server: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", TRAINING[0])
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", TRAINING[1])
    from mlflow import MlflowClient

    client = MlflowClient(f"http://127.0.0.1:{server}")
    assert client.get_experiment_by_name("of-training") is None
    experiment = client.create_experiment("of-training")
    run = client.create_run(experiment, run_name="first").info.run_id
    client.log_metric(run, "train/loss", 0.5, step=1)
    (tmp_path / "file.txt").write_text("text")
    client.log_artifact(run, str(tmp_path / "file.txt"), "folder")
    assert [file.path for file in client.list_artifacts(run, "folder")] == ["folder/file.txt"]
    model = client.create_logged_model(experiment, name="model", source_run_id=run)
    client.log_model_artifacts(model.model_id, str(tmp_path), "model")
    client.create_registered_model("model-of-training")
    client.create_model_version(
        "model-of-training", model.artifact_location, run, model_id=model.model_id
    )
    client.set_terminated(run)
    assert client.get_run(run).info.status == "FINISHED"
    assert [found.info.run_id for found in client.search_runs([experiment])] == [run]


@dataclass(frozen=True)
class Foreign:
    """Objects of another user, ada, on the server."""

    experiment: str
    run: str


@pytest.fixture(scope="module")
def foreign(server: int) -> Foreign:
    _created(
        server,
        "/api/2.0/mlflow/users/create",
        ADMIN,
        {"username": ADA[0], "password": ADA[1]},
    )
    experiment = _created(server, "/api/2.0/mlflow/experiments/create", ADA, {"name": "of-ada"})
    body = {"experiment_id": experiment["experiment_id"]}
    run = _created(server, "/api/2.0/mlflow/runs/create", ADA, body)["run"]["info"]["run_id"]
    _created(server, "/api/2.0/mlflow/registered-models/create", ADA, {"name": "model-of-ada"})
    return Foreign(experiment["experiment_id"], run)


# (method, path, body): E is ada's experiment, R her run.
FORBIDDEN: list[tuple[str, str, Any]] = [
    ("GET", "2.0/mlflow/experiments/get?experiment_id=E", None),
    ("GET", "2.0/mlflow/experiments/get-by-name?experiment_name=of-ada", None),
    ("GET", "2.0/mlflow/runs/get?run_id=R", None),
    ("GET", "2.0/mlflow/artifacts/list?run_id=R", None),
    ("GET", "2.0/mlflow-artifacts/artifacts/E/R/artifacts/file.txt", None),
    ("PUT", "2.0/mlflow-artifacts/artifacts/E/R/artifacts/file.txt", {}),
    ("DELETE", "2.0/mlflow-artifacts/artifacts/E/R/artifacts/file.txt", None),
    ("POST", "2.0/mlflow/runs/create", {"experiment_id": "E"}),
    ("POST", "2.0/mlflow/runs/log-metric", {"run_id": "R", "key": "m", "value": 1}),
    ("POST", "2.0/mlflow/runs/set-tag", {"run_id": "R", "key": "t", "value": "v"}),
    ("POST", "2.0/mlflow/runs/delete", {"run_id": "R"}),
    ("POST", "2.0/mlflow/experiments/update", {"experiment_id": "E", "new_name": "x"}),
    ("POST", "2.0/mlflow/experiments/delete", {"experiment_id": "E"}),
    ("GET", "2.0/mlflow/registered-models/get?name=model-of-ada", None),
    ("DELETE", "2.0/mlflow/registered-models/delete", {"name": "model-of-ada"}),
    ("POST", "2.0/mlflow/users/create", {"username": "eve", "password": "a password of eve"}),
    ("DELETE", "2.0/mlflow/users/delete", {"username": "ada"}),
    ("DELETE", "2.0/mlflow/users/delete", {"username": "admin"}),
    (
        "PATCH",
        "2.0/mlflow/users/update-password",
        {"username": "admin", "password": "a password of eve"},
    ),
    ("PATCH", "2.0/mlflow/users/update-admin", {"username": "training", "is_admin": True}),
    (
        "POST",
        "3.0/mlflow/users/permissions/grant",
        {
            "username": "training",
            "resource_type": "experiment",
            "resource_id": "E",
            "permission": "MANAGE",
        },
    ),
    ("POST", "2.0/mlflow/webhooks", {"name": "w", "url": "http://evil.example", "events": []}),
]


@pytest.mark.parametrize(
    ("method", "path", "body"), FORBIDDEN, ids=[f"{method}-{path}" for method, path, _ in FORBIDDEN]
)
def test_training_cannot_read_or_change_other_users_data(
    server: int, foreign: Foreign, method: str, path: str, body: Any
) -> None:
    path = path.replace("=E", f"={foreign.experiment}").replace("=R", f"={foreign.run}")
    path = path.replace("/E/R/", f"/{foreign.experiment}/{foreign.run}/")
    if body is not None:
        own = {"E": foreign.experiment, "R": foreign.run}
        body = {key: own.get(str(value), value) for key, value in body.items()}
    status, text = _request(server, f"/api/{path}", login=TRAINING, method=method, body=body)
    assert status == 403, text


def test_training_does_not_see_other_users_data(server: int, foreign: Foreign) -> None:
    for login, seen in ((TRAINING, False), (ADMIN, True)):
        status, text = _request(server, RUNS, login=login)
        assert status == 200
        names = [entry["name"] for entry in json.loads(text).get("experiments", [])]
        assert ("of-ada" in names) is seen
        body = {"experiment_ids": [foreign.experiment]}
        status, text = _request(
            server, "/api/2.0/mlflow/runs/search", login=login, method="POST", body=body
        )
        assert (foreign.run in text) is seen
