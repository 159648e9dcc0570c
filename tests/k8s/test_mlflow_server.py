"""MLflow's server as its manifest starts it: same arguments, same environment, other folders and
port.
"""

from __future__ import annotations

import base64
import http.client
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from .manifests import K8S

pytestmark = pytest.mark.long
PATIENCE_S = 300
SECRETS = {"username": "admin", "password": "a password of the test", "flask-secret-key": "x" * 32}
SERVICE = "lwo-dist-mlflow"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of the server."""
    data, auth = tmp_path_factory.mktemp("mlflow"), tmp_path_factory.mktemp("auth")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    ini = (K8S / "base" / "basic_auth.ini").read_text().replace("////mlflow/", f"///{data}/")
    (auth / "basic_auth.ini").write_text(ini)
    deployment = next(yaml.safe_load_all((K8S / "base" / "mlflow.yaml").read_text()))
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
    for variable in container["env"]:
        value = variable.get("value") or SECRETS[variable["valueFrom"]["secretKeyRef"]["key"]]
        value = value.replace("////mlflow/", f"///{data}/").replace("/etc/mlflow", str(auth))
        environment[variable["name"]] = value
    program, *arguments = [word.replace("=/mlflow/", f"={data}/") for word in container["args"]]
    assert (program, "--port=5000" in arguments) == ("mlflow", True)
    arguments = [f"--port={port}" if word == "--port=5000" else word for word in arguments]
    log = data / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", *arguments],
            env=environment | {"HOME": str(data)},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
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


def _status(port: int, path: str, *, host: str, login: bool = False) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    headers = {"Host": host}
    if login:
        pair = f"{SECRETS['username']}:{SECRETS['password']}".encode()
        headers["Authorization"] = f"Basic {base64.b64encode(pair).decode()}"
    connection.request("GET", path, headers=headers)
    return connection.getresponse().status


RUNS = "/api/2.0/mlflow/experiments/search?max_results=10"


def test_the_probe_needs_no_login_and_no_name(server: int) -> None:
    assert _status(server, "/health", host="10.1.2.3:5000") == 200


def test_runs_need_the_login(server: int) -> None:
    assert _status(server, RUNS, host=f"{SERVICE}:5000") == 401


@pytest.mark.parametrize(
    "host",
    [
        f"{SERVICE}:5000",
        f"{SERVICE}.lwo-dist.svc.cluster.local:5000",
        "127.0.0.1:8080",
        "localhost:5000",
    ],
)
def test_its_names_are_let_in(server: int, host: str) -> None:
    assert _status(server, RUNS, host=host, login=True) == 200


def test_other_names_are_not(server: int) -> None:
    assert _status(server, RUNS, host="evil.example:5000", login=True) == 403
