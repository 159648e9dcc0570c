"""Jobs of a real Ray, started by `ray start --head` on loopback with a token."""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from lwo_dist.cli import main
from tests.models import save_tiny_model

REPOSITORY = Path(__file__).parents[2]
TOKEN = "fedcba9876543210" * 4
TIMEOUT = 240

# Stands in for lwo_dist in the folder that is submitted: a job whose end is told by its arguments.
STUB = """
import json, os, signal, sys, time
settings = dict(word.split("=", 1) for word in sys.argv[4:])
print("arguments", sys.argv[1:4])
print("files", sorted(os.path.relpath(os.path.join(d, f)) for d, _, fs in os.walk(".")
                      for f in fs if f[-4:] != ".pyc"))
print("metadata", os.environ["RAY_JOB_CONFIG_JSON_ENV_VAR"])
if "seconds" in settings.get("data.source", ""):
    signal.signal(signal.SIGTERM, lambda *_: (print("saved", flush=True), os._exit(75)))
    print("ready", flush=True)
    time.sleep(float(settings["data.source"].rpartition("/")[2]))
sys.exit(int(settings["seed"]))
"""


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Ray of two CPUs, which ends with the module."""
    short = tempfile.mkdtemp(
        prefix="ray", dir="/tmp"
    )  # Ray's sockets do not fit below pytest's folders.
    inherited = {
        k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_", "HF_"))
    }
    environment = inherited | {
        "HOME": str(tmp_path_factory.mktemp("home")),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_JOB_STOP_WAIT_TIME_S": "30",
        "RAY_TMPDIR": short,
    }
    port = _free_port()
    command = [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "start",
        "--head",
        "--block",
        "--num-cpus=2",
        "--num-gpus=0",
        "--node-ip-address=127.0.0.1",
        f"--port={_free_port()}",
        "--dashboard-host=127.0.0.1",
        f"--dashboard-port={port}",
        f"--dashboard-agent-listen-port={_free_port()}",
        f"--ray-client-server-port={_free_port()}",
        "--min-worker-port=0",
        "--max-worker-port=0",
        f"--temp-dir={short}",
        "--disable-usage-stats",
    ]
    log = Path(short) / "start.log"
    with log.open("w") as output:
        ray = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    try:
        _wait_until_healthy(f"http://127.0.0.1:{port}", ray, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        # Nobody needs what it would save on the way, for which it takes half a minute.
        started = [*psutil.Process(ray.pid).children(recursive=True), ray]
        for process in started:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        ray.wait()
        shutil.rmtree(short, ignore_errors=True)


def _wait_until_healthy(address: str, ray: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + TIMEOUT
    while True:
        try:
            request = urllib.request.Request(
                f"{address}/api/jobs/", headers={"Authorization": f"Bearer {TOKEN}"}
            )
            with urllib.request.urlopen(request, timeout=10):
                return
        except OSError as error:
            assert ray.poll() is None and time.monotonic() < deadline, f"{error}\n{log.read_text()}"
            time.sleep(0.5)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A git work tree to submit, its code committed."""
    files = {
        "lwo_dist/__init__.py": "",
        "lwo_dist/cli.py": STUB,
        ".gitignore": "*.log\n",
        "x.log": "",
        ".env": "A=1",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    for words in (
        ["init", "-q"],
        ["add", "lwo_dist", ".gitignore"],
        [*identity, "commit", "-q", "-m", "Add it"],
    ):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    return tmp_path


@pytest.fixture(autouse=True)
def _client(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("client")))
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    for name in (
        "RAY_AUTH_MODE",
        "RAY_ADDRESS",
        "RAY_API_SERVER_ADDRESS",
        "RAY_RUNTIME_ENV_IGNORE_GITIGNORE",
    ):
        monkeypatch.setenv(name, "")  # noted, so that what the client sets is undone
        monkeypatch.delenv(name)


def _submit(
    head: str, folder: Path, run_name: str, *more: str, seed: int = 0, source: str = "/data"
) -> list[str]:
    settings = [f"seed={seed}", f"data.source={source}", "storage=/runs", f"run_name={run_name}"]
    return ["submit", "--address", head, "--working-dir", str(folder), *settings, *more]


def test_a_job_is_followed_to_its_end(
    head: str, source: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(_submit(head, source, "whole")) == 0
    said = capfd.readouterr()
    assert ".env (secret: file name)" in said.err
    lines = dict(line.split(" ", 1) for line in said.out.splitlines() if " " in line)
    assert lines["arguments"] == "['train', '-c', 'lwo-dist-job.yaml']"
    assert (
        lines["files"]
        == "['.gitignore', 'lwo-dist-job.yaml', 'lwo_dist/__init__.py', 'lwo_dist/cli.py']"
    )
    metadata = json.loads(lines["metadata"])["metadata"]
    assert metadata["job_submission_id"] == lines["job"]
    assert lines["job"].startswith("whole-")
    assert (metadata["run_name"], json.loads(metadata["config"])["storage"]) == ("whole", "/runs")
    commit = subprocess.run(
        ["git", "-C", str(source), "rev-parse", "HEAD"], capture_output=True, text=True
    )
    assert metadata["git_commit"] == commit.stdout.strip()
    assert said.out.count("arguments") == 1
    assert TOKEN not in said.out


def test_no_proxy_sees_the_token(head: str, monkeypatch: pytest.MonkeyPatch, dead_uri: str) -> None:
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, dead_uri)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "example.org")
    assert main(["jobs", "list", "--address", head]) == 0
    assert os.environ["NO_PROXY"] == "example.org,127.0.0.1"


def test_a_job_s_exit_code_comes_through(head: str, source: Path) -> None:
    assert main(_submit(head, source, "failing", seed=3)) == 3


def test_a_job_is_detached_listed_and_stopped(
    head: str, source: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    long = _submit(head, source, "sleeping", source="/seconds/600")
    assert main([*long, "--detach"]) == 0
    job = capfd.readouterr().out.split()[1]
    assert main(["jobs", "list", "--address", head]) == 0
    (line,) = [line for line in capfd.readouterr().out.splitlines() if line.startswith(job)]
    assert line.split()[1] in ("PENDING", "RUNNING") and line.endswith("sleeping")
    # Two jobs would write into one run's folder.
    assert main(long) == 2
    assert f"run_name = sleeping: job {job} is already running" in capfd.readouterr().err
    _wait_for_line(head, job, "ready", capfd)
    assert main(["jobs", "stop", "--address", head, "sleeping"]) == 0
    assert main(["jobs", "logs", "-f", "--address", head, job]) in (75, 143)
    assert "saved" in capfd.readouterr().out
    assert _status(head, job, capfd) == "STOPPED"


def _status(head: str, job: str, capfd: pytest.CaptureFixture[str]) -> str:
    capfd.readouterr()
    assert main(["jobs", "list", "--address", head]) == 0
    (line,) = [line for line in capfd.readouterr().out.splitlines() if line.startswith(job)]
    return line.split()[1]


def _wait_for_line(head: str, job: str, line: str, capfd: pytest.CaptureFixture[str]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        capfd.readouterr()
        assert main(["jobs", "logs", "--address", head, job]) == 0
        if line in capfd.readouterr().out.splitlines():
            return
        time.sleep(0.5)
    pytest.fail(f"{job} never wrote {line!r}")


@pytest.mark.parametrize(
    ("answer", "code", "status"), [("d", 130, "RUNNING"), ("s", 143, "STOPPED")]
)
def test_ctrl_c_asks(
    head: str, source: Path, capfd: pytest.CaptureFixture[str], answer: str, code: int, status: str
) -> None:
    command = [
        sys.executable,
        "-m",
        "lwo_dist.cli",
        *_submit(head, source, f"asked-{answer}", source="/seconds/600"),
    ]
    keyboard, terminal = pty.openpty()
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(
        command,
        stdin=terminal,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        # A shell's background jobs ignore Ctrl-C, and these tests may be one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as client:
        try:
            assert client.stdout is not None
            job = client.stdout.readline().split()[1]
            assert any(line == "ready\n" for line in client.stdout)
            client.send_signal(signal.SIGINT)
            os.write(keyboard, f"{answer}\n".encode())
            rest, _ = client.communicate(timeout=TIMEOUT)
        finally:
            client.kill()
            os.close(keyboard)
            os.close(terminal)
    assert client.returncode in (code, 75 if answer == "s" else code), rest
    assert "d: detach" in rest
    assert _status(head, job, capfd) == status
    main(["jobs", "stop", "--address", head, job])


@pytest.mark.parametrize(
    ("token", "status", "why"),
    [
        (None, 401, "RAY_AUTH_TOKEN is not set"),
        ("a wrong token of the test", 403, "RAY_AUTH_TOKEN does not match"),
    ],
)
def test_without_the_token_there_is_one_line(
    head: str, source: Path, token: str | None, status: int, why: str
) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "RAY_AUTH_TOKEN"} | {
        "PYTHONPATH": str(REPOSITORY)
    }
    if token is not None:
        environment["RAY_AUTH_TOKEN"] = token
    command = [sys.executable, "-m", "lwo_dist.cli", *_submit(head, source, "refused")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    expected = (
        f"lwo-dist: --address = {head}: Ray requires the cluster's token, and {why}; set"
        " RAY_AUTH_TOKEN to that token\n"
    )
    assert (done.returncode, done.stdout, done.stderr) == (2, "", expected)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    with pytest.raises(urllib.error.HTTPError, match=str(status)):
        urllib.request.urlopen(urllib.request.Request(f"{head}/api/jobs/", headers=headers))


def test_no_cluster_at_the_address(source: Path, capfd: pytest.CaptureFixture[str]) -> None:
    address = f"http://127.0.0.1:{_free_port()}"
    assert main(_submit(address, source, "nowhere")) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"lwo-dist: --address = {address}: Failed to connect")


def test_an_unknown_job(head: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["jobs", "stop", "--address", head, "nobody"]) == 2
    assert "job nobody: " in capfd.readouterr().err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("storage=runs", "storage = runs: would be deleted with the job's folder"),
        ("data.source=../src", "data.source = ../src: a path on this machine"),
        (
            "data={source: /src, format: jsonl, held_out_source: ../test}",
            "data.held_out_source = ../test: a path on this machine",
        ),
        ("train.stepz=1", "unknown key train.stepz"),
        ("cluster.num_workers=7", "must be divisible by 7 = 7 workers"),
        ("model.name=../model", "model.name = ../model: a path on this machine"),
        (f"run_name={TOKEN}", "holds the value of RAY_AUTH_TOKEN"),
    ],
)
def test_what_cannot_run_elsewhere_is_refused(
    head: str, source: Path, capfd: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    assert main([*_submit(head, source, "refused"), override]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert message in line
    assert main(["jobs", "list", "--address", head]) == 0
    assert "refused" not in capfd.readouterr().out


@pytest.mark.long
def test_the_main_job_ends_well(
    head: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data, storage = tmp_path / "source", tmp_path / "runs"
    data.mkdir()
    for i in range(8):
        lines = "".join(f"    total_{i} += values[{j}]  # line {j}\n" for j in range(15))
        (data / f"module_{i}.py").write_text(f"def function_{i}(values):\n{lines}")
    save_tiny_model(tmp_path / "model", [path.read_text() for path in data.iterdir()])
    settings = [
        f"model.name={tmp_path}/model",
        f"data.source={data}",
        f"storage={storage}",
        "run_name=main",
        "train.steps=6",
        "train.global_batch_size=4",
        "train.sequence_length=32",
        "train.logging_steps=2",
        "eval.num_lines=4",
        "eval.max_new_tokens=4",
    ]
    config = REPOSITORY / "launch" / "configs" / "debug_cpu.yaml"
    folder = ["--working-dir", str(tmp_path)]  # without git: the cluster has lwo_dist
    capfd.readouterr()  # What DeepSpeed says when it is imported.
    assert main(["submit", "-c", str(config), "--address", head, *folder, *settings]) == 0
    job = capfd.readouterr().out.split()[1]
    summary = json.loads((storage / "main" / "summary.json").read_text())
    assert (summary["steps"], summary["world_size"]) == (6, 2)
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(storage / "main" / "model").num_parameters() > 0
    from mlflow import MlflowClient

    run = MlflowClient(f"sqlite:///{storage}/mlflow.db").get_run(summary["mlflow_run_id"])
    assert run.data.tags["ray_submission_id"] == job
    assert run.info.status == "FINISHED"
