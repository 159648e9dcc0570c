"""`lwo-dist ui`: which server it starts, for whom, and what it cannot open."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from lwo_dist import cli
from lwo_dist.tracking.mlflow_store import MLflowStore


def test_ui_runs_mlflow_on_this_machine_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    storage = tmp_path / "a b"
    assert cli.main(["ui", f"storage={storage}"]) == 2
    assert "mlflow.db" in capsys.readouterr().err

    storage.mkdir()
    (storage / "mlflow.db").touch()
    commands = []
    monkeypatch.setattr(os, "execve", lambda *arguments: commands.append(arguments))
    monkeypatch.setattr(os, "umask", lambda mask: 0)
    found: list[str | None] = [None, "7"]
    monkeypatch.setattr(MLflowStore, "find_experiment", lambda *_: found.pop(0))
    assert cli.main(["ui", f"storage={storage}"]) == 2
    assert "has no such experiment yet; start a run" in capsys.readouterr().err
    assert cli.main(["ui", f"storage={storage}", "--port", "5005"]) == 0
    (said,) = capsys.readouterr().out.splitlines()
    page = "http://127.0.0.1:5005/#/experiments/7/runs?workflowType=machine_learning"
    assert said.split()[0] == page
    assert "without a login, to every user of this machine" in said
    path, command, environment = commands[0]
    assert path == command[0] == sys.executable
    assert command[1:4] == ["-m", "mlflow", "server"]
    options = dict(zip(command[4::2], command[5::2], strict=True))
    assert (options["--host"], options["--port"]) == ("127.0.0.1", "5005")
    assert environment["MLFLOW_BACKEND_STORE_URI"] == f"sqlite:///{storage}/mlflow.db"
    assert environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"


def test_ui_keeps_a_password_off_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:hunter2@db/mlflow")
    monkeypatch.setattr(MLflowStore, "find_experiment", lambda *_: "7")
    commands: list[Any] = []
    monkeypatch.setattr(os, "execve", lambda *arguments: commands.append(arguments))
    monkeypatch.setattr(os, "umask", lambda mask: 0)
    assert cli.main(["ui"]) == 0
    [(_, command, environment)] = commands
    assert environment["MLFLOW_BACKEND_STORE_URI"] == "postgresql://me:hunter2@db/mlflow"
    assert "hunter2" not in " ".join(command) + "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        (
            "https://name:secret@mlflow.example",
            "tracking.uri = https://mlflow.example contains a password; set",
        ),
        (
            "http://127.0.0.1:9",
            "MLflow at http://127.0.0.1:9: Connection refused; start it, or correct tracking.uri",
        ),
        (
            "file:///tmp/mlruns",
            "tracking.uri = file:///tmp/mlruns has no pages; give a server (http://HOST:PORT) or a",
        ),
    ],
)
def test_ui_says_what_it_cannot_open(
    uri: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["ui", f"tracking.uri={uri}"]) == 2
    said = capsys.readouterr().err
    assert message in said and "secret" not in said
