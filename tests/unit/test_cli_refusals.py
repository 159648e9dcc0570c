"""Bad input on the command line: one line on stderr, exit code 2, nothing left behind."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from lwo_dist import cli
from tests.unit.test_cli import run_in

TRAIN = (sys.executable, "-m", "lwo_dist.cli", "train")


def _check_refused(
    result: subprocess.CompletedProcess[str], folder: Path, left: set[str], message: str
) -> None:
    # It is told before Ray starts.
    assert set(result.stdout.splitlines()) <= {
        "checking the settings, the model and the source",
        *(f"reading {folder / name}" for name in ("nowhere", "no_code", "source")),
        "reading https://localhost:1/x.git",
    }
    assert result.returncode == 2, result.stderr
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert result.stderr.startswith("lwo-dist: ")
    assert message in result.stderr
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*")} == left


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("train", "lwo.steps_per_layr=3"),
            "unknown key lwo.steps_per_layr; did you mean lwo.steps_per_layer?",
        ),
        (("train", "train.steps=many"), "train.steps = 'many': must be a valid integer"),
        (
            ("train", "lwo.steps_per_layer=0"),
            "lwo.steps_per_layer = 0: must be greater than or equal to 1",
        ),
        (("train", "-c", "none.yaml"), "config file none.yaml: No such file or directory"),
        (("train", "-c"), "argument -c/--config: expected one argument; see lwo-dist train --help"),
        (("train", "seed=1", "--stpes", "seed=2"), "unrecognized arguments: --stpes seed=2"),
        (("export", "a", "b"), "unrecognized arguments: b"),
        (("trian",), "invalid choice: 'trian'"),
        ((), "the following arguments are required: COMMAND"),
    ],
)
def test_bad_arguments(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    result = run_in(tmp_path, sys.executable, "-m", "lwo_dist.cli", *arguments)
    _check_refused(result, tmp_path, set(), message)


FILES = {
    "source/a.py": "x = 1\n",
    "source/b.py": "x = 2\n",
    "no_code/x.bin": "\0",
    "bad_model/config.json": "{}",
}


SOURCE = {*FILES, "source", "no_code", "bad_model"}


SLOW = {
    "a source that is not there": (
        ("data.source=nowhere",),
        {},
        "nowhere: does not exist; give a folder",
    ),
    "a source without code": (("data.source=no_code",), {}, "no usable files"),
    "no source": ((), {}, "data.source is not set"),
    "a batch that does not divide": (
        ("data.source=source", "cluster.num_workers=2", "train.global_batch_size=3"),
        {},
        "train.global_batch_size = 3 must be divisible by 2 = 2 workers",
    ),
    "a model that is not there": (
        ("data.source=source", "model.name=./nowhere"),
        {},
        "model.name './nowhere' is not a folder; give a folder written by save_pretrained",
    ),
    "a model out of reach": (
        ("data.source=source", "model.name=nobody/nothing"),
        {"HF_HUB_OFFLINE": "1"},
        "model.name 'nobody/nothing' is no folder, is not in the cache",
    ),
    "a model without config.json": (
        ("data.source=source", "model.name=no_code"),
        {},
        "model.name 'no_code' is a folder without config.json",
    ),
    "a model whose config.json is none": (
        ("data.source=source", "model.name=bad_model"),
        {},
        "model.name 'bad_model': its config.json cannot be read",
    ),
    "no git": (("data.source=https://localhost:1/x.git",), {"PATH": "/nonexistent"}, "git"),
    "too many workers": (
        ("data.source=source", "cluster.num_workers=1000", "train.global_batch_size=1000"),
        {},
        "cluster.num_workers = 1000: this Ray cluster has ",
    ),
    "a deepspeed config that is none": (
        ("data.source=source", "strategy=deepspeed", "deepspeed=source/a.py"),
        {},
        "deepspeed = source/a.py is not JSON: Expecting value: line 1 column 1",
    ),
    "an unwritable storage": (
        ("data.source=source", "storage=source/a.py/runs"),
        {},
        "a.py/runs: Not a directory",
    ),
}


@pytest.fixture(scope="module")
def slow_runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Path, Future]]]:  # type: ignore[type-arg]
    """Each case in a folder of its own; two at a time, because most of their time is Python's
    imports.
    """
    with ThreadPoolExecutor(2) as pool:
        runs = {}
        for case, (arguments, environment, _) in SLOW.items():
            folder = tmp_path_factory.mktemp("cli")
            for name, text in FILES.items():
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_text(text)
            runs[case] = (folder, pool.submit(run_in, folder, *TRAIN, *arguments, **environment))
        yield runs


@pytest.mark.parametrize("case", SLOW)
def test_bad_input(slow_runs: dict[str, tuple[Path, Future]], case: str) -> None:  # type: ignore[type-arg]
    folder, run = slow_runs[case]
    _check_refused(run.result(), folder, SOURCE, SLOW[case][2])


@pytest.mark.parametrize("command", ["train", "data", "submit"])
@pytest.mark.parametrize(
    "setting",
    [
        "data.source=https://me:hunter2@host/code.git",
        "data.source=me:hunter2@host:code.git",
        "tracking.uri=https://me:hunter2@mlflow",
        "storage=s3://AKIA:hunter2@bucket",
        "storage=s3://bucket?access_key=AKIA&secret_key=hunter2",
    ],
)
@pytest.mark.parametrize("in_file", [False, True])
def test_a_url_with_a_password_is_refused(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    setting: str,
    in_file: bool,
) -> None:
    from lwo_dist.cluster import jobs

    monkeypatch.setattr(
        jobs.Jobs, "__init__", lambda *_, **__: None
    )  # No cluster: the refusal comes first.
    arguments = [setting]
    if in_file:
        key, _, value = setting.partition("=")
        nested = f"{key.partition('.')[0]}: {{{key.partition('.')[2]}: '{value}'}}"
        (tmp_path / "c.yaml").write_text(nested if "." in key else f"{key}: '{value}'")
        arguments = ["-c", str(tmp_path / "c.yaml")]
    if command == "submit":
        arguments += ["--address", "http://127.0.0.1:1"]
    assert cli.main([command, *arguments]) == 2
    said = capsys.readouterr()
    assert "contains a password" in said.err and len(said.err.splitlines()) == 1
    assert "hunter2" not in said.err + said.out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["export", "s3://AKIA:hunter2/x@bucket/r"], "RUN = s3://bucket/r"),
        (["checkpoints", "list", "s3://AKIA:hunter2@bucket/r"], "RUN = s3://bucket/r"),
        (["checkpoints", "prune", "s3://bucket/r?secret_key=hunter2"], "RUN = s3://bucket/r"),
        (["replay", "s3://AKIA:hunter2@bucket/r"], "SPOOL = s3://bucket/r"),
        (["replay", "r", "--uri", "https://me:hunter2@mlflow"], "--uri = https://mlflow"),
        (["fetch", "r", "--uri", "https://me:hunter2@mlflow"], "--uri = https://mlflow"),
        (["fetch", "s3://AKIA:hunter2@bucket/r"], "RUN = s3://bucket/r"),
        (["jobs", "list", "--address", "http://me:hunter2@h:8265"], "--address = http://h:8265"),
        (["jobs", "stop", "--address", "http://h:1/?token=hunter2", "j"], "--address = http://h:1"),
        (["submit", "--address", "https://me:hunter2@h:8265"], "--address = https://h:8265"),
    ],
)
def test_so_is_one_on_a_command_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], named: str
) -> None:
    assert cli.main(arguments) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"lwo-dist: {named}")
    assert "contains a password; set " in said.err and len(said.err.splitlines()) == 1
    assert "hunter2" not in said.err + said.out
