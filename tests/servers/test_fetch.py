"""The model of a run comes back from an MLflow server without the run's storage."""

from __future__ import annotations

import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lwo_dist.cli import main
from lwo_dist.tracking import mlflow_fetch
from tests.models import save_tiny_model
from tests.tracking import Server, begin, client_of, config_for, train

pytestmark = pytest.mark.usefixtures("clean_environment")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "model"
    save_tiny_model(folder, ["def f(x):\n    return x\n"])
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def log_run(server: Server, storage: Path, name: str, model: Path, **tracking: Any) -> str:
    """A finished run on the server; its storage is gone."""
    server.start()
    callback = begin(config_for(server.uri, **tracking), storage, name)
    train(callback, range(1, 3))
    shutil.copytree(model, storage / name / "model")
    callback.on_run_end({"export": "", "steps": 2, "eval": {"best_step": 2}})
    shutil.rmtree(storage / name)
    return str(callback.run_id)


@pytest.fixture
def logged(server: Server, tmp_path: Path, model: Path) -> Iterator[str]:
    yield log_run(server, tmp_path / "gone", tmp_path.name, model)


def test_a_model_is_fetched_by_id_and_by_name(
    server: Server, logged: str, model: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = client_of(server.uri).get_run(logged).info.run_name
    assert main(["fetch", logged, "--uri", server.uri, "--to", "mine"]) == 0
    assert capsys.readouterr().out == f"model: {here}/mine\n"
    held = load_file(model / "model.safetensors")
    fetched = AutoModelForCausalLM.from_pretrained("mine").state_dict()
    assert all(torch.equal(fetched[key], tensor) for key, tensor in held.items())
    assert AutoTokenizer.from_pretrained("mine").pad_token == "<pad>"
    for original in model.iterdir():
        assert (here / "mine" / original.name).read_bytes() == original.read_bytes()
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (here / "mine").iterdir()}
    assert (modes, stat.S_IMODE((here / "mine").stat().st_mode)) == ({0o600}, 0o700)

    assert main(["fetch", name, "--uri", server.uri]) == 0
    assert sorted(path.name for path in here.iterdir()) == sorted([name, "mine", "gone"])
    assert main(["fetch", name, "--uri", server.uri]) == 2
    assert f"--to = {name} exists; give a new folder, or --overwrite" in capsys.readouterr().err
    (here / name / "stale").touch()
    assert main(["fetch", name, "--uri", server.uri, "--overwrite"]) == 0
    assert not (here / name / "stale").exists()


def test_a_run_that_cannot_be_fetched_gets_one_line(
    server: Server, logged: str, model: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    twice = [log_run(server, here / f"gone{n}", "twice", model) for n in range(2)]
    log_run(server, here / "gone2", "without", model, log_model=False)
    (here / "full" / "notes").mkdir(parents=True)
    server_uri = ["--uri", server.uri]
    for arguments, message in (
        (["nobody", *server_uri], "has no run of this id or name; its pages list them"),
        (["it's", *server_uri], "RUN = it's: MLflow at http://127.0.0.1"),
        (["a\"b'c", *server_uri], "MLflow cannot search for this name; give"),
        (["0" * 32, *server_uri], "has no run of this id or name"),
        (["twice", *server_uri], "several runs of this name; give the id of one: "),
        (["without", *server_uri], "has no model of this run (it has not ended, or tracking.log"),
        ([logged, *server_uri, "--to", "full"], "--to = full exists and is not a model"),
        ([logged], "no MLflow is given; set --uri, or MLFLOW_TRACKING_URI, to a server"),
        ([logged, "--uri", "http://127.0.0.1:9"], "http://127.0.0.1:9: Connection refused; start"),
        (
            [logged, "--uri", f"sqlite:///{here}/none.db"],
            "/none.db: no such database; correct --uri",
        ),
        (["s3://bucket/runs/r"], "RUN = s3://bucket/runs/r: not a run of MLflow; to write the"),
    ):
        assert main(["fetch", *arguments]) == 2
        out, err = capsys.readouterr()
        assert out == "" and message in err and len(err.splitlines()) == 1, err
        if arguments[0] == "twice":
            assert all(run_id in err for run_id in twice)
    assert sorted(path.name for path in here.iterdir()) == [
        "full",
        "gone",
        "gone0",
        "gone1",
        "gone2",
    ]


def test_a_broken_download_leaves_nothing_and_harms_no_older_model(
    server: Server, logged: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fetch", logged, "--uri", server.uri, "--to", "mine"]) == 0
    stored = [
        path
        for path in (server.folder / "artifacts").rglob("model.safetensors")
        if client_of(server.uri).get_run(logged).outputs.model_outputs[0].model_id in path.parts
    ]
    stored[0].chmod(0o600)
    stored[0].unlink()
    stored[0].symlink_to("/nowhere")
    before = {path.name: path.read_bytes() for path in (here / "mine").iterdir()}
    capsys.readouterr()
    assert main(["fetch", logged, "--uri", server.uri, "--to", "mine", "--overwrite"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert {path.name: path.read_bytes() for path in (here / "mine").iterdir()} == before
    assert sorted(path.name for path in here.iterdir()) == ["gone", "mine"]


def no_config(folder: Path) -> None:
    (folder / "model" / "config.json").unlink()


def a_link(folder: Path) -> None:
    (folder / "model" / "notes").symlink_to("/etc/hostname")


def an_escape(folder: Path) -> None:
    (folder / "model" / "a\x1b[2J").touch()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (no_config, "has no config.json"),
        (a_link, "has a file that is not taken: notes"),
        (an_escape, "has a file that is not taken: a\\x1b[2J"),
    ],
)
def test_odd_files_of_a_server_are_refused(
    server: Server,
    logged: str,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Path], None],
    message: str,
) -> None:
    download = mlflow_fetch._download

    def download_more(location: str, uri: str, folder: Path) -> None:
        download(location, uri, folder)
        change(folder)

    monkeypatch.setattr(mlflow_fetch, "_download", download_more)
    assert main(["fetch", logged, "--uri", server.uri, "--to", "mine"]) == 2
    err = capsys.readouterr().err
    assert message in err and len(err.splitlines()) == 1
    assert sorted(path.name for path in here.iterdir()) == ["gone"]
