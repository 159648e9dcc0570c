"""The one description of a run, and what checkpoints, MLflow and Ray jobs keep of it."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import lwo_dist
from lwo_dist.config import (
    ClusterConfig,
    Config,
    DataConfig,
    LoRAConfig,
    ModelConfig,
    TrackingConfig,
)
from lwo_dist.run_info import (
    RunInfo,
    base_name,
    checkpoint_record,
    dataset_record,
    flatten,
    git_commit,
    job_metadata,
    model_name,
    public_config,
    run_parameters,
    run_tags,
)
from lwo_dist.training.describe import describe_run
from tests import oracle

SECRETS = ("pass-word", "ghp_abc", "hf_abc")
# What exports of round 1 read from state.json; a key that is renamed breaks the old checkpoints.
RECORD_KEYS = [
    "run_name",
    "method",
    "strategy",
    "task",
    "base_model",
    "revision",
    "trust_remote_code",
    "source",
    "data",
    "lwo",
    "train",
    "versions",
]


def secret_config() -> Config:
    # A config refuses both URLs; the output is redacted all the same.
    addresses = {
        "tracking": TrackingConfig(uri="https://me:pass-word@mlflow"),
        "data": DataConfig(source="https://oauth2:ghp_abc@github.com/a/b"),
    }
    config = Config(cluster=ClusterConfig(env={"HF_TOKEN": "hf_abc", "NCCL_DEBUG": "INFO"}))
    return config.model_copy(update=addresses)


def make_info(config: Config, **fields: Any) -> RunInfo:
    defaults: dict[str, Any] = {
        "run_dir": Path("runs/x"),
        "world_size": 2,
        "start_step": 0,
        "layers": ("embed", "head"),
        "layer_sizes": (30, 40),
        "parameters": 100,
        "device": "cpu",
    }
    return RunInfo(config=config, **{**defaults, **fields})


def test_flatten_joins_with_dots() -> None:
    values = {"a": {"b": {"c": 1}, "d": [1, 2]}, "e": None, "f": "text", "g": {}, "h": True}
    assert flatten(values) == {
        "a.b.c": "1",
        "a.d": "[1, 2]",
        "e": "null",
        "f": "text",
        "g": "{}",
        "h": "true",
    }


def test_no_secret_of_the_config_is_shown(tmp_path: Path) -> None:
    config = secret_config()
    info = make_info(config)
    shown = (
        public_config(config),
        run_parameters(info),
        run_tags(config),
        checkpoint_record(info),
        dataset_record(info),
        job_metadata(config, "x", tmp_path),
    )
    for values in shown:
        assert not any(secret in str(values) for secret in SECRETS)
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


def test_the_parameters_hold_every_fact_of_the_run() -> None:
    data = {"windows": 7, "held_out_lines": 5, "skipped": {"too large": 1}}
    info = make_info(
        Config(), host="node-a", data=data, versions={"python": "3.12.1", "torch": "2.11.0"}
    )
    parameters = run_parameters(info)
    expected = {
        "host": "node-a",
        "parameters": "100",
        "trained_parameters": "70",
        "data.windows": "7",
        "data.held_out_lines": "5",
        "data.skipped.too large": "1",
        "versions.python": "3.12.1",
        "versions.torch": "2.11.0",
        "train.steps": str(Config().train.steps),
    }
    assert expected.items() <= parameters.items()


def test_the_parameters_hold_those_of_lora() -> None:
    lora = LoRAConfig(rank=4, target_modules=("q_proj",))
    config = Config(method="lora", lora=lora)
    expected = {"method": "lora", "lora.rank": "4", "lora.target_modules": '["q_proj"]'}
    assert expected.items() <= run_parameters(make_info(config)).items()
    assert run_tags(config)["method"] == "lora"


def test_a_credential_of_the_environment_is_in_no_parameter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdef")
    info = make_info(Config(), host="hf_abcdef", data={"note": "by hf_abcdef"})
    parameters = run_parameters(info)
    assert (parameters["host"], parameters["data.note"]) == ("***", "by ***")


def test_a_checkpoint_s_record_keeps_the_keys_of_round_1() -> None:
    config = Config(
        run_name="r",
        model=ModelConfig(name="a/base", revision="main"),
        data=DataConfig(source="https://github.com/a/b/"),
    )
    data = {"windows": 7, "skipped": {"too large": 1}}
    record = checkpoint_record(make_info(config, data=data, versions={"python": "3.12.1"}))
    assert set(RECORD_KEYS) <= set(record)
    assert (record["metric"], record["base_name"]) == ("loss", "a/base")
    assert json.loads(json.dumps(record)) == record  # it goes into state.json
    assert (record["run_name"], record["base_model"], record["revision"]) == ("r", "a/base", "main")
    assert record["source"] == "b"  # not the path or host before it
    assert record["data"] == {"windows": 7}  # the model card shows numbers
    assert record["versions"] == {"python": "3.12.1"}
    assert record["lwo"]["steps_per_layer"] == config.lwo.steps_per_layer
    assert record["train"]["global_batch_size"] == config.train.global_batch_size


def test_the_name_of_a_base_model_holds_no_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    for model, name in {
        "gpt2": "gpt2",
        "Qwen/Qwen2.5-0.5B": "Qwen/Qwen2.5-0.5B",
        "models/mine": "mine",
        "../other/mine": "mine",
        "~/models/mine": "mine",
        "/runs/cache/tiny-code-0123456789ab": "tiny-code",
        "/runs/cache/models/Small.Q4_1-0123456789abcdef": "Small.Q4_1",
        "/cache/hub/models--Qwen--Qwen2.5-0.5B/snapshots/0123abcd": "Qwen/Qwen2.5-0.5B",
        "/cache/hub/models--gpt2/snapshots/0123abcd/": "gpt2",
    }.items():
        assert base_name(model) == name


def test_tags_name_the_job_the_hosts_and_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_ID", "02000000")
    monkeypatch.setenv(
        "RAY_JOB_CONFIG_JSON_ENV_VAR",
        '{"metadata": {"job_submission_id": "raysubmit_x", "git_commit": "ab12"}}',
    )
    model = ModelConfig(name="/data/cache/tiny-code-0a1b")
    tags = run_tags(Config(method="full", model=model), ["node-a", "node-b"], "NVIDIA H100")
    assert tags["hosts"] == "node-a, node-b"
    assert (tags["ray_job_id"], tags["ray_submission_id"]) == ("02000000", "raysubmit_x")
    # The commit that was sent: the job's own folder is no git work tree.
    assert tags["mlflow.source.git.commit"] == "ab12"
    assert (tags["method"], tags["strategy"]) == ("full", "fsdp")
    assert (tags["model"], tags["device"]) == ("tiny-code-0a1b", "NVIDIA H100")
    # MLflow shows no source without both.
    assert (tags["mlflow.source.name"], tags["mlflow.source.type"]) == ("lwo-dist train", "LOCAL")
    assert "device" not in run_tags(Config())  # the driver does not know it


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("org/name", "org/name"),
        ("/data/models/Base-1B", "Base-1B"),
        ("/x/hub/models--org--name-2b/snapshots/0a1b2c", "org/name-2b"),
    ],
)
def test_a_model_is_named_without_a_path(name: str, shown: str) -> None:
    config = Config(model=ModelConfig(name=name))
    assert model_name(config) == shown
    assert run_parameters(make_info(config))["model.name"] == shown


def test_the_dataset_is_the_source_with_its_fingerprint() -> None:
    config = Config(data=DataConfig(source="https://github.com/a/shop/"))
    data = {"windows": 7, "skipped": {"too large": 1}}
    assert dataset_record(make_info(config, fingerprint="0123456789abcdef" * 4, data=data)) == {
        "name": "shop",
        "digest": "0123456789abcdef",
        "source": "https://github.com/a/shop/",
        "counts": {"windows": 7},
    }


@pytest.mark.parametrize("value", ["", "{", "[]", '{"metadata": null}'])
def test_a_damaged_job_environment_costs_no_tag(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", value)
    assert "ray_submission_id" not in run_tags(Config())


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_the_commit_is_that_of_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert "mlflow.source.git.commit" not in run_tags(Config())
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "x")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert run_tags(Config())["mlflow.source.git.commit"] == commit
    (tmp_path / "file").write_text("a")
    git(tmp_path, "add", "file")
    assert git_commit(tmp_path) == f"{commit}-dirty"
    monkeypatch.setenv("PATH", "")
    assert "mlflow.source.git.commit" not in run_tags(Config())  # no git at all


def test_a_job_carries_its_name_its_code_and_its_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    # A config refuses it; the data sent is redacted all the same.
    config = Config().model_copy(update={"storage": "s3://key:pass-word@bucket/runs"})
    metadata = job_metadata(config, "named", tmp_path)
    assert (metadata["run_name"], metadata["storage"]) == ("named", "s3://bucket/runs")
    assert json.loads(metadata["config"]) == public_config(config)
    assert metadata["lwo_dist_version"]
    assert "git_commit" not in metadata
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "x")
    assert job_metadata(config, "named", tmp_path)["git_commit"] == git_commit(tmp_path)
    assert all(isinstance(value, str) for value in metadata.values())  # Ray takes no other


def test_a_run_is_described_from_its_parts(tmp_path: Path) -> None:
    model = oracle.tiny_model(tied=False)
    lwo = lwo_dist.attach(model, lwo_dist.LWOConfig(lr=1e-2, steps_per_layer=2))
    counts = {"windows": 7, "held_out_lines": 5}
    info = describe_run(
        Config(),
        lwo,
        SimpleNamespace(  # type: ignore[arg-type]
            counts=counts, held_out=range(5), fingerprint="0a1b"
        ),
        run_dir=tmp_path,
        device=torch.device("cpu"),
        hosts=["node-a"],
    )
    assert info.layers == tuple(layer.name for layer in lwo.layers)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert (info.parameters, info.trained_parameters) == (total, total)
    weights = [lwo.read_layer(layer) for layer in lwo.layers]
    assert info.layer_sizes == tuple(
        sum(t.numel() for t in tensors.values()) for tensors in weights
    )
    assert (info.run_dir, info.world_size, info.start_step) == (tmp_path, 1, 0)
    assert (info.device, info.hosts, info.data) == ("CPU", ("node-a",), counts)
    assert info.fingerprint == "0a1b"
    assert info.versions["torch"] == importlib.metadata.version("torch")
