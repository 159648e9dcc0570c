"""MLflow's pod on this machine: commands and environments of the manifest, with other folders."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import yaml

from .manifests import K8S, Object

__all__ = ["ADMIN", "SECRETS", "TRAINING", "MlflowPod"]

Secrets = Mapping[str, Mapping[str, str]]

ADMIN = ("admin", "a password of the test")
TRAINING = ("training", "another password of the test")
SECRETS: Secrets = {
    "lwo-dist-mlflow": {
        "username": ADMIN[0],
        "password": ADMIN[1],
        "flask-secret-key": "x" * 32,
    },
    "lwo-dist-mlflow-training": {"username": TRAINING[0], "password": TRAINING[1]},
}


class MlflowPod:
    """The containers of the server's Deployment; `folder` replaces its volumes."""

    def __init__(self, folder: Path):
        self.data, self.config = folder / "data", folder / "config"
        self.data.mkdir()
        self.config.mkdir()
        for name in ("basic_auth.ini", "mlflow_users.py"):
            (self.config / name).write_text(self._here((K8S / "base" / name).read_text()))
        deployment = next(yaml.safe_load_all((K8S / "base" / "mlflow.yaml").read_text()))
        self._spec: Object = deployment["spec"]["template"]["spec"]

    def make_users(self, secrets: Secrets = SECRETS) -> subprocess.CompletedProcess[str]:
        """Run the init container."""
        (users,) = self._spec["initContainers"]
        program, script = users["args"]
        assert program == "python"
        return subprocess.run(
            [sys.executable, self._here(script)],
            env=self._environment(users, secrets),
            capture_output=True,
            text=True,
        )

    def start_server(self, port: int, log: Path) -> subprocess.Popen[bytes]:
        (server,) = self._spec["containers"]
        program, *arguments = [self._here(word) for word in server["args"]]
        assert (program, "--port=5000" in arguments) == ("mlflow", True)
        arguments = [f"--port={port}" if word == "--port=5000" else word for word in arguments]
        with log.open("a") as output:
            return subprocess.Popen(
                [sys.executable, "-m", "mlflow", *arguments],
                env=self._environment(server, SECRETS),
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def _environment(self, container: Object, secrets: Secrets) -> dict[str, str]:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
        for variable in container["env"]:
            if "value" in variable:
                value = self._here(variable["value"])
            else:
                reference = variable["valueFrom"]["secretKeyRef"]
                value = secrets[reference["name"]][reference["key"]]
            environment[variable["name"]] = value
        return environment | {"HOME": str(self.data)}

    def _here(self, text: str) -> str:
        return text.replace("/etc/mlflow", str(self.config)).replace("/mlflow/", f"{self.data}/")
