import importlib.metadata
from pathlib import Path

from lwo_dist.callback import RunInfo
from lwo_dist.config import ClusterConfig, Config, DataConfig, TrackingConfig
from lwo_dist.tracking.facts import flatten, public_config, redact, run_parameters, run_tags


def test_flatten_joins_with_dots():
    values = {"a": {"b": {"c": 1}, "d": [1, 2]}, "e": None, "f": "text", "g": {}, "h": True}
    assert flatten(values) == {
        "a.b.c": "1",
        "a.d": "[1, 2]",
        "e": "null",
        "f": "text",
        "g": "{}",
        "h": "true",
    }


def test_redact_strips_credentials_only(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "tok-123456")
    assert (
        redact("postgresql://me:s3@cret@db:5432/x?password=abc&y=1")
        == "postgresql://db:5432/x?password=&y=1"
    )
    assert redact("Bearer tok-123456 refused") == "Bearer *** refused"
    for plain in (
        "http://host:5000/a@b",
        "sqlite:////a/b.db",
        "git@github.com:a/b",
        "max_new_tokens=48",
    ):
        assert redact(plain) == plain


def test_no_secret_of_the_config_is_shown():
    config = Config(
        tracking=TrackingConfig(uri="https://me:pass-word@mlflow"),
        data=DataConfig(source="https://oauth2:ghp_abc@github.com/a/b"),
        cluster=ClusterConfig(env={"HF_TOKEN": "hf_abc", "NCCL_DEBUG": "INFO"}),
    )
    info = RunInfo(config, Path("runs/x"), 2, ("embed", "head"), {"device": "cpu"}, 0)
    for shown in (public_config(config), run_parameters(info), run_tags(config)):
        assert not any(secret in str(shown) for secret in ("pass-word", "ghp_abc", "hf_abc"))
    parameters = run_parameters(info)
    assert parameters["tracking.uri"] == "https://mlflow"
    assert parameters["cluster.env.HF_TOKEN"] == "***"
    assert parameters["cluster.env.NCCL_DEBUG"] == "INFO"
    assert parameters["eval.max_new_tokens"] == "48"
    assert (parameters["device"], parameters["world_size"], parameters["layers"]) == (
        "cpu",
        "2",
        "embed, head",
    )


def test_tags_name_the_job_the_hosts_and_the_code(monkeypatch):
    monkeypatch.setenv("RAY_JOB_ID", "02000000")
    monkeypatch.setenv(
        "RAY_JOB_CONFIG_JSON_ENV_VAR",
        '{"metadata": {"job_submission_id": "raysubmit_x", "git_commit": "ab12"}}',
    )
    tags = run_tags(Config(method="full"), ["node-a", "node-b"])
    assert tags["hosts"] == "node-a, node-b"
    assert (tags["ray_job_id"], tags["ray_submission_id"]) == ("02000000", "raysubmit_x")
    # The commit that was sent: the job's own folder is no git work tree.
    assert tags["mlflow.source.git.commit"] == "ab12"
    assert (tags["method"], tags["strategy"]) == ("full", "fsdp")
    assert tags["version.torch"] == importlib.metadata.version("torch")


def test_the_commit_is_that_of_the_working_directory(tmp_path, monkeypatch):
    import subprocess

    def git(*args):
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *args]
        return subprocess.run(
            command, cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout.strip()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert "mlflow.source.git.commit" not in run_tags(Config())
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "x")
    assert run_tags(Config())["mlflow.source.git.commit"] == git("rev-parse", "HEAD")
    monkeypatch.setenv("PATH", "")
    assert "mlflow.source.git.commit" not in run_tags(Config())  # no git at all
