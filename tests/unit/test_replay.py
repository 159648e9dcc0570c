"""A replayed run may come from anybody, so it chooses neither the server nor the files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest

from lwo_dist.cli import main
from lwo_dist.errors import UserError
from lwo_dist.spool import Sent, Spool
from lwo_dist.tracking import mlflow
from lwo_dist.tracking.close import replay_hint
from lwo_dist.tracking.mlflow import replay


class Server:
    """The server of a replay: records every call and answers none."""

    addresses: ClassVar[list[str]] = []
    uploads: ClassVar[list[str]] = []

    def __init__(self, uri: str, *_: Any) -> None:
        self.addresses.append(uri)

    def open_run(self, *_: Any) -> str:
        return "id"

    def log_points(self, *_: Any) -> None: ...

    def end_run(self, *_: Any) -> None: ...

    def upload(self, run_id: str, file: Path, folder: str | None) -> None:
        self.uploads.append(file.name)

    def log_model(self, run_id: str, folder: Path, fields: Any) -> None:
        self.uploads.append(f"{folder.name}/")


@pytest.fixture(autouse=True)
def server(monkeypatch: pytest.MonkeyPatch) -> type[Server]:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(Server, "addresses", [])
    monkeypatch.setattr(Server, "uploads", [])
    monkeypatch.setattr(mlflow, "MLflowStore", Server)
    return Server


def run_for(folder: Path, uri: str, *paths: str) -> Path:
    """A finished run that names the server `uri`, with files to upload."""
    spool = Spool(folder / "r" / "metrics.jsonl")
    spool.append("run", uri=uri)
    for path in paths:
        spool.append("artifact", path=path)
    spool.append("end", status="FINISHED")
    spool.close()
    return spool.path


@pytest.mark.parametrize(
    "uri", ["http://evil.example", "sqlite:////elsewhere/other.db", "databricks", "\x1b[2J"]
)
def test_a_run_cannot_choose_the_server(
    tmp_path: Path, server: type[Server], uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spool = run_for(tmp_path, uri)
    for beside in (False, True):
        if beside:  # the other file that names one
            sent = Sent.load(spool)
            sent.uri = uri
            sent.save()
        assert main(["replay", str(spool)]) == 2
        said = capsys.readouterr().err
        assert "which is not configured here" in said and "--uri" in said
        assert said.count("\n") == 1 and "\x1b" not in said
    assert server.addresses == []


def test_the_command_line_and_environment_choose_the_server(
    tmp_path: Path, server: type[Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = run_for(tmp_path, "http://mine.example")
    replay(spool, "http://mine.example")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:password@mine.example")
    replay(spool)
    assert server.addresses == ["http://mine.example", "http://me:password@mine.example"]


def test_the_database_beside_the_run_needs_no_option(tmp_path: Path, server: type[Server]) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    spool = run_for(tmp_path, uri)
    replay(spool)
    assert server.addresses == [uri]
    assert replay_hint(spool, uri) == f"send it with: lwo-dist replay {spool}"
    other = "http://mine.example"
    assert replay_hint(spool, other) == f"send it with: lwo-dist replay {spool} --uri {other}"


def test_no_file_outside_the_run_is_uploaded(
    tmp_path: Path, server: type[Server], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "id_rsa").write_text("a key")
    names = ("../id_rsa", str(tmp_path / "id_rsa"), "model/../../id_rsa", "config.yaml")
    spool = run_for(tmp_path, "x", *names)
    (spool.parent / "config.yaml").touch()
    replay(spool, "http://mine.example")
    assert "config.yaml" in server.uploads and "id_rsa" not in server.uploads
    assert "id_rsa' is not a valid name in a run's folder" in caplog.text


@pytest.mark.parametrize("name", ["config.yaml", "model", "pictures", "model/deep"])
def test_a_run_with_symlinks_is_refused(tmp_path: Path, server: type[Server], name: str) -> None:
    spool = run_for(tmp_path, "x", "config.yaml")
    (spool.parent / name).parent.mkdir(exist_ok=True)
    (spool.parent / name).symlink_to(tmp_path)
    with pytest.raises(UserError, match="is a symlink, which a run's folder must not contain"):
        replay(spool, "http://mine.example")
    assert server.addresses == []


@pytest.mark.parametrize(
    "values",
    [
        {"uri": 1},
        {"run_id": {}},
        {"offset": "x"},
        {"offset": -5},
        {"waiting": 3},
        {"key": None},
        [],
    ],
)
def test_a_forged_offset_file_is_harmless(
    tmp_path: Path, server: type[Server], values: Any
) -> None:
    spool = run_for(tmp_path, "x")
    whole = {"key": "k", "uri": "x", "run_id": None, "offset": 0, "waiting": []}
    text = json.dumps(whole | values if isinstance(values, dict) else values)
    spool.with_suffix(".sent.json").write_text(text)
    replay(spool, "http://mine.example")
