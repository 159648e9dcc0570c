"""A run whose storage is an object store: it goes on on a machine that has nothing of it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lwo_dist.cli import main
from lwo_dist.config import Config
from lwo_dist.driver import prepare
from lwo_dist.errors import UserError
from lwo_dist.storage import RunFolder, storage_folder
from tests.distributed import test_run
from tests.distributed.test_run import exported, make_config, run_and_record, stop_after
from tests.ranks import RanksError, run_ranks

inputs = test_run.inputs
moto = pytest.importorskip("moto.server", reason="needs moto[s3]")


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A real server that speaks S3; the ranks find it as they would find any: by the
    environment.
    """
    import boto3

    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("LWO_SCRATCH_DIR", str(tmp_path / "node"))
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    boto3.client("s3").create_bucket(Bucket="bucket")
    yield "s3://bucket/runs"
    server.stop()


def run_on_two_machines(config: Config) -> tuple[dict | None, list]:
    """Each rank is the first of a machine of its own, which shares no folder with the other."""
    os.environ["LOCAL_RANK"] = "0"
    if os.environ["RANK"] == "1":
        os.environ["LWO_SCRATCH_DIR"] += "-1"
    return run_and_record(config)


def test_a_run_goes_on_on_other_machines(
    bucket: str,
    inputs: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = (
        "checkpoint.steps=5",
        "tracking.enabled=true",
        f"tracking.uri=sqlite:///{tmp_path}/mlflow.db",
    )
    unbroken = prepare(make_config(inputs, tmp_path / "plain", "checkpoint.steps=5"))
    summary, losses = run_ranks(run_and_record, 2, unbroken)[0]

    first = prepare(make_config(inputs, Path("x"), *settings, f"storage={bucket}"))
    assert first.storage == bucket
    with pytest.raises(RanksError, match="stopped by the test"):
        run_ranks(stop_after, 2, first, 5)
    run = RunFolder(bucket, "r")
    assert run.folders("checkpoints") == ["step_000005"]
    spool = len(Path(storage_folder(bucket) / "r" / "metrics.jsonl").read_bytes())

    monkeypatch.setenv("LWO_SCRATCH_DIR", str(tmp_path / "other_node"))
    again = prepare(make_config(inputs, Path("x"), *settings, f"storage={bucket}"))
    resumed, resumed_losses = run_ranks(run_on_two_machines, 2, again)[0]
    assert resumed_losses[0][0] == 6 and resumed_losses[1:] == losses[3:]
    assert resumed["export"] == f"{bucket}/r/model" and resumed["mlflow_run_id"]
    fetched = sorted((tmp_path / "other_node-1").rglob("checkpoints/step_000005/state.json"))
    assert len(fetched) == 1  # what the other machine went on from
    shutil.rmtree(tmp_path / "other_node")  # all that counts is in the store
    files = RunFolder(bucket, "r").files("")
    assert {
        "summary.json",
        "run.json",
        "metrics.jsonl",
        "model/model.safetensors",
        "config.yaml",
    } <= set(files)
    assert run.pull("metrics.jsonl").stat().st_size > spool
    expected, found = exported(summary), load_file(run.pull("model/model.safetensors"))
    assert all(torch.equal(expected[name], found[name]) for name in expected)

    assert main(["checkpoints", "verify", f"{bucket}/r"]) == 0
    assert "step 14  whole: " in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    assert main(["export", f"{bucket}/r"]) == 0
    whole = load_file(tmp_path / "r" / "model.safetensors")
    assert all(torch.equal(expected[name], whole[name]) for name in expected)
    assert " to +" in (tmp_path / "r" / "README.md").read_text()  # the intervals of the summary
    assert main(["export", f"{bucket}/r", "--to", "mine", "--dtype", "bf16"]) == 0
    bf16 = load_file(tmp_path / "mine" / "model.safetensors")
    assert all(torch.equal(expected[name].bfloat16(), bf16[name]) for name in expected)


@pytest.mark.parametrize(
    ("storage", "message"),
    [
        ("s3://nobody/runs", "storage = s3://nobody/runs/r: .*bucket.* give a bucket that exists"),
        (
            "ftp://host/runs",
            "storage = ftp://host/runs: .*; give a folder, or a URL such as s3://bucket/folder",
        ),
    ],
)
def test_a_store_that_cannot_be_used_is_refused_and_leaves_nothing(
    bucket: str, inputs: tuple[Path, Path], tmp_path: Path, storage: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        prepare(make_config(inputs, Path("x"), f"storage={storage}"))
    assert not (tmp_path / "node").exists()
