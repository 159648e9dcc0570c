"""The command line as users meet it: a process of its own, exit codes, one line on stderr, nothing
left behind.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from lwo_dist import cli
from lwo_dist.commands import COMMANDS
from lwo_dist.config import Config, reading
from lwo_dist.errors import UserError
from lwo_dist.stop import Stopped
from lwo_dist.tracking.mlflow_store import MLflowStore

REPOSITORY = Path(__file__).parents[2]
# What torchrun gives its only rank.
LONE_RANK = {
    "RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",
}


def run_in(folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run in `folder`, with a home folder of the tests' own and nothing of the caller's Ray, MLflow
    or hub.
    """
    inherited = {
        k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_", "HF_"))
    }
    environment = (
        inherited
        | {"HOME": str(folder.parent / "home"), "PYTHONPATH": str(REPOSITORY)}
        | environment
    )
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize(
    ("arguments", "said"), [(["--help"], "commands:"), (["train", "--help"], "--config FILE")]
)
def test_help_is_quick_and_imports_nothing_heavy(
    tmp_path: Path, arguments: list[str], said: str
) -> None:
    heavy = {"torch", "ray", "mlflow", "transformers", "datasets", "psutil", "yaml"}
    code = (
        f"import sys; from lwo_dist.cli import main\ntry: main({arguments})\nfinally:"
        f" print(sorted({heavy} & set(sys.modules)))"
    )
    result = run_in(tmp_path, sys.executable, "-c", code)
    assert result.returncode == 0, result.stderr
    assert said in result.stdout
    assert result.stdout.splitlines()[-1] == "[]"


def test_training_says_its_first_words_before_it_imports_anything_heavy(tmp_path: Path) -> None:
    heavy = {"torch", "ray", "mlflow", "transformers", "datasets", "psutil"}
    code = (
        "import sys; from lwo_dist import console\ndef say(line):\n    print(line,"
        f" sorted({heavy} & set(sys.modules)))\n    sys.exit(0)\nconsole.say = say\n"
        "from lwo_dist.cli import main\nmain(['train', 'data.source=x'])"
    )
    result = run_in(tmp_path, sys.executable, "-c", code)
    assert result.stdout == "checking the settings, the model and the source []\n", result.stderr


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    text = capsys.readouterr().out
    assert re.findall(r"(?m)^    ([a-z]+)(?: |$)", text) == list(COMMANDS)
    for name in COMMANDS:
        with pytest.raises(SystemExit, match="0"):
            cli.main([name, "--help"])
        assert f"usage: lwo-dist {name} " in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"lwo-dist {project['version']}\n"


def _raise(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("two\nlines"), 2, "lwo-dist: two lines\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_exit_codes(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    message: str,
) -> None:
    monkeypatch.setattr(reading, "load_config", lambda *_: _raise(error))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert cli.main(["train"]) == code
    assert capsys.readouterr().err == message


@pytest.mark.parametrize(
    ("overrides", "checkpoint", "said"),
    [
        (["run_name=mine"], "mine", "/runs/mine/checkpoints/step_000007; the same command goes on"),
        ([], "lwo-1", "step_000007; the same command with run_name=lwo-1 goes on from there"),
        ([], None, "no step was done, so nothing was saved; the same command starts anew"),
    ],
)
def test_after_a_stop_it_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    overrides: list[str],
    checkpoint: str | None,
    said: str,
) -> None:
    from lwo_dist import run

    folder = Path("/runs") / checkpoint / "checkpoints" / "step_000007" if checkpoint else None
    stopped = Stopped("SIGTERM", 7, folder)
    monkeypatch.setattr(run, "prepare_and_run", lambda config: _raise(stopped))
    for name, value in LONE_RANK.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["train", *overrides]) == 75
    error = capsys.readouterr().err
    assert error.startswith("lwo-dist: stopped by SIGTERM at step 7; ") and said in error
    stopped.reason = "Ctrl-C"
    assert cli.main(["train", *overrides]) == 130  # who restarts after 75 must not after Ctrl-C
    capsys.readouterr()
    stopped.reason = "SIGTERM"
    monkeypatch.setenv("RANK", "1")  # The first rank has said it.
    assert cli.main(["train", *overrides]) == 75
    assert capsys.readouterr().err == ""


def test_an_error_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "load_config", lambda *_: _raise(RuntimeError("ours")))
    with pytest.raises(RuntimeError, match="ours"):
        cli.main(["train"])


def test_of_a_host_s_ranks_the_first_speaks_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The others wait to be ended by torchrun, and speak if they are not: nobody fails in
    silence.
    """
    monkeypatch.setattr(reading, "load_config", lambda *_: _raise(UserError("a")))
    monkeypatch.setattr(cli.time, "sleep", lambda seconds: print("waits", file=sys.stderr))
    for local_rank, said in [("0", "lwo-dist: a\n"), ("1", "waits\nlwo-dist: a\n")]:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        assert cli.main(["train"]) == 2
        assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("environment", "arguments", "used"),
    [
        ({"RAY_ADDRESS": "http://a:1"}, [], ("RAY_ADDRESS", "http://a:1")),
        (
            {"RAY_ADDRESS": "a:6379", "RAY_API_SERVER_ADDRESS": "http://b:1"},
            [],
            ("RAY_API_SERVER_ADDRESS", "http://b:1"),
        ),
        (
            {"RAY_ADDRESS": "http://a:1", "RAY_API_SERVER_ADDRESS": "http://b:1"},
            ["--address", "http://c:1"],
            ("--address", "http://c:1"),
        ),
    ],
)
def test_the_cluster_is_that_of_the_arguments_or_of_ray_variables(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    environment: dict[str, str],
    arguments: list[str],
    used: tuple[str, str],
) -> None:
    from lwo_dist.cluster import jobs

    class Cluster:
        def __init__(self, address: str, *, setting: str, insecure_token: bool) -> None:
            assert (setting, address) == used

        def submit(self, *_: Any) -> str:
            return "job-1"

        def lines(self) -> list[str]:
            return ["job-1"]

    monkeypatch.setattr(jobs, "Jobs", Cluster)
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["jobs", "list", *arguments]) == 0
    assert cli.main(["submit", "--detach", *arguments]) == 0
    assert f"lwo-dist jobs stop --address {used[1]} job-1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (None, "no cluster is given; set --address, or RAY_ADDRESS, to the URL of Ray's dashboard"),
        ("", "no cluster is given; "),
        ("auto", "RAY_ADDRESS = auto: not a URL; give the URL of Ray's dashboard, such as"),
        ("head:6379", "RAY_ADDRESS = head:6379: not a URL; give the URL of Ray's dashboard"),
        ("http://me:hunter2@h:8265", "RAY_ADDRESS = http://h:8265 contains a password; set the"),
        ("http://192.0.2.1:8265", "RAY_ADDRESS = http://192.0.2.1:8265: Ray's token would cross"),
    ],
)
def test_a_cluster_that_cannot_be_used_gets_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    address: str | None,
    message: str,
) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    if address is not None:
        monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "t" * 64)
    for command in (["jobs", "list"], ["submit"]):
        assert cli.main(command) == 2
        said = capsys.readouterr().err
        assert message in said and len(said.splitlines()) == 1 and "hunter2" not in said


def test_settings_may_stand_before_between_and_behind_options(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("seed: 1\ntrain: {steps: 5}\n")
    assert cli.main(["config", "seed=2", "-c", str(file), "train.steps=6", "seed=3"]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert "seed: 3" in lines and "steps: 6" in lines


def test_data_counts_used_and_skipped_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for i in range(10):
        (source / f"file_{i}.py").write_text(f"x = {i}\n")
    token = f"ghp_{'a1' * 18}"
    (source / "deploy.py").write_text(f"\nTOKEN = '{token}'\n")
    (source / "red\x1b[31m.pem").write_text("x")
    arguments = ["data", f"data.source={source}", f"storage={tmp_path / 'runs'}"]
    assert cli.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["train", "held out", "skipped"]
    assert sum(int(line.split()[-2]) for line in lines[:2]) == 10
    assert lines[2] == "skipped: 2 secret"
    assert cli.main([*arguments, "--explain"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[:2] == [
        "deploy.py: secret (GitHub token, line 2)",
        "red\\x1b[31m.pem: secret (file name)",
    ]
    assert token not in out and out.splitlines()[2:] == lines
    assert not (tmp_path / "runs").exists()


def test_no_message_shows_a_token(capsys: pytest.CaptureFixture[str]) -> None:
    token = f"glpat-{'a1' * 10}"
    assert cli.main(["train", f"data.sorce={token}", f"{token}"]) == 2
    said = capsys.readouterr().err
    assert "glpat-***" in said and token not in said


def test_replay_says_what_it_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import lwo_dist.tracking.mlflow as tracking

    calls = []
    monkeypatch.setattr(tracking, "replay", lambda spool, uri: calls.append((spool, uri)) or 7)
    assert cli.main(["replay", str(tmp_path), "--uri", "http://127.0.0.1:1"]) == 0
    assert calls == [(tmp_path, "http://127.0.0.1:1")]
    assert capsys.readouterr().out == "sent 7 metric points\n"


def test_the_last_line_shows_how_to_open_mlflow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lwo_dist import run
    from lwo_dist.training import results

    seen: list[Config] = []
    for name, value in LONE_RANK.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(run, "prepare_and_run", lambda config: seen.append(config) or {"steps": 3})
    monkeypatch.setattr(results, "format_summary", lambda summary: f"{summary['steps']} steps")
    assert cli.main(["train", f"storage={tmp_path}/a b", "train.steps=3"]) == 0
    assert seen[0].train.steps == 3
    said = capsys.readouterr().out
    assert said.endswith(f"\n3 steps\nMLflow: lwo-dist ui 'storage={tmp_path}/a b'\n")
    assert cli.main(["train", "tracking.enabled=false"]) == 0
    assert capsys.readouterr().out.endswith("source\n3 steps\n")


def test_the_last_line_is_the_page_of_the_run_if_a_server_shows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lwo_dist import run
    from lwo_dist.training import results

    for name, value in LONE_RANK.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:hunter2@mlflow.example/team/")
    monkeypatch.setattr(results, "format_summary", lambda summary: "done")
    experiments = ["7", None, "7"]
    monkeypatch.setattr(MLflowStore, "find_experiment", lambda *_: experiments.pop(0))
    command = f"lwo-dist ui storage={tmp_path}"
    page = "https://mlflow.example/team/#/experiments/7/runs/0a1b?workflowType=machine_learning"
    # The second time the server does not know the experiment, the third time there is no run.
    for run_id, last in [("0a1b", page), ("0a1b", command), (None, command)]:
        monkeypatch.setattr(
            run, "prepare_and_run", lambda config, run_id=run_id: {"mlflow_run_id": run_id}
        )
        assert cli.main(["train", f"storage={tmp_path}"]) == 0
        assert capsys.readouterr().out.endswith(f"\ndone\nMLflow: {last}\n")
    monkeypatch.setattr(MLflowStore, "find_experiment", lambda *_: _raise(OSError("down")))
    monkeypatch.setattr(run, "prepare_and_run", lambda config: {"mlflow_run_id": "0a1b"})
    assert cli.main(["train", f"storage={tmp_path}"]) == 0
    assert capsys.readouterr().out.endswith(f"\ndone\nMLflow: {command}\n")
