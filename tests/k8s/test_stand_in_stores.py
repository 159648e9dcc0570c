"""The overlays with a store outside their pods, as written: runs in S3, MLflow's records in
PostgreSQL.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from .container import Image
from .images import postgres_image
from .kubelet import Kubelet, kubelet
from .kuberay import RayCluster
from .manifests import K8S, Object, render
from .stand_in import PATIENCE_S, cluster, edit_config, runs_in_mlflow, secrets

pytestmark = pytest.mark.long


def small(config: dict[str, Any]) -> None:
    """No hub can be reached: cpu-smoke's model and data, its sizes too; where things are kept
    stays.
    """
    smoke = yaml.safe_load((K8S / "overlays" / "cpu-smoke" / "config.yaml").read_text())
    data = config["data"] | smoke["data"]
    config |= {key: smoke[key] for key in ("model", "lwo", "train", "eval", "checkpoint")} | {
        "data": data
    }


@pytest.fixture
def s3(image: Image) -> Iterator[tuple[Kubelet, Any]]:
    """The overlay s3, applied, and a client of the store, which is outside, behind the port of
    https.
    """
    moto = pytest.importorskip("moto.server", reason="needs moto[s3]")
    boto3 = pytest.importorskip("boto3", reason="needs moto[s3]")
    objects, made = render("overlays/s3"), secrets()
    edit_config(objects, small)
    with kubelet(objects, lambda _: image, made) as node:
        server = moto.ThreadedMotoServer(ip_address=node.gateway, port=443, verbose=False)
        server.start()
        try:
            keys = made["lwo-dist-s3"]
            keys |= {"AWS_ENDPOINT_URL": f"http://{node.gateway}:443", "AWS_REGION": "us-east-1"}
            client = boto3.client(
                "s3",
                endpoint_url=keys["AWS_ENDPOINT_URL"],
                region_name=keys["AWS_REGION"],
                aws_access_key_id=keys["AWS_ACCESS_KEY_ID"],
                aws_secret_access_key=keys["AWS_SECRET_ACCESS_KEY"],
            )
            client.create_bucket(Bucket="lwo-dist")
            node.deploy()
            yield node, client
        finally:
            server.stop()


def test_runs_in_an_object_store(s3: tuple[Kubelet, Any]) -> None:
    node, client = s3
    with cluster(node) as ray:
        submitter = ray.submit()
        assert submitter.wait(PATIENCE_S) == 0
        assert ray.status().startswith("SUCCEEDED"), submitter.log
        (run,) = runs_in_mlflow(ray.head, "first")
        assert run["status"] == "FINISHED"
    pages = client.get_paginator("list_objects_v2").paginate(
        Bucket="lwo-dist", Prefix="runs/first/"
    )
    files = {
        thing["Key"].removeprefix("runs/first/") for page in pages for thing in page["Contents"]
    }
    assert {
        "summary.json",
        "model/model.safetensors",
        "checkpoints/step_000020/state.json",
    } <= files
    volume = node.claim("lwo-dist-runs")
    assert {path.name for path in volume.iterdir()} == {"cache"}


TRACK = """
from mlflow import MlflowClient
client = MlflowClient()
run = client.create_run(client.create_experiment("lwo"), run_name="in-postgres")
for step in range(3): client.log_metric(run.info.run_id, "train/loss", 1.0 / (step + 1), step=step)
client.set_terminated(run.info.run_id)
"""


def test_records_in_postgres(image: Image, tmp_path: Path) -> None:
    pytest.importorskip("psycopg2", reason="needs psycopg2, as in the extra `server`")
    try:
        postgres = postgres_image(tmp_path / "postgres")
    except FileNotFoundError as why:
        pytest.skip(str(why))
    objects = render("overlays/postgres")
    with kubelet(
        objects, lambda name: postgres if name.startswith("postgres:") else image, secrets()
    ) as node:
        node.deploy()
        (job,) = (thing for thing in objects if thing["kind"] == "RayJob")
        head: Object = RayCluster(node, job).head_pod()
        head["spec"]["containers"][0] |= {"command": ["sleep", "600"], "args": []}
        asking = node.run(head)
        tracked = asking.exec("python", "-c", TRACK)
        assert tracked.returncode == 0, tracked.stderr
        for part in ("mlflow", "postgres"):  # Both are started anew, on the same volumes.
            assert node.pod(part).probe("liveness")
            node.pod(part).delete()
        node.deploy()
        (run,) = runs_in_mlflow(asking, "in-postgres")
        assert (run["status"], run["metrics"]) == ("FINISHED", {"train/loss": 1 / 3})
        sql = [
            "psql",
            "--username=mlflow",
            "--host=/var/run/postgresql",
            "--tuples-only",
            "--no-align",
        ]
        assert (
            node.pod("postgres").exec(*sql, "--command=select count(*) from metrics").stdout.strip()
            == "3"
        )
        assert not (node.claim("lwo-dist-mlflow") / "mlflow.db").exists()
