"""A real `mlflow server`, and runs that go through every event of tracking without any training."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path

from lwo_dist.config import Config, TrackingConfig, TrainConfig
from lwo_dist.run_info import RunInfo
from lwo_dist.spool import Point, points_of, read_spool
from lwo_dist.tracking.mlflow import MLflowCallback
from lwo_dist.tracking.shown import shown_points

LAYERS = ("embed", "layers.0", "layers.1", "head")
POINTS = 100 * 6 + 5 * (2 + 4)
"""What `train` makes of 100 steps: 4 points a step and the 2 that tell of restarts; 5 evaluations
and visits.
"""
PICTURES = ("loss_by_layer", "memory", "layers_by_loss_drop")
FILES = {"config.yaml", "report.html", *(f"pictures/{name}.png" for name in PICTURES)}
"""What is uploaded of such a run."""


class Server:
    """A real `mlflow server` of its own process group."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        if self.process is not None:
            return
        options = ["--backend-store-uri", f"sqlite:///{self.folder}/server.db", "--workers", "1"]
        options += [
            "--artifacts-destination",
            str(self.folder / "artifacts"),
            "--port",
            str(self.port),
        ]
        with (self.folder / "server.log").open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", *options],
                env=os.environ
                | {
                    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
                    "MLFLOW_DISABLE_TELEMETRY": "true",
                },
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        until(self.answers, 120)

    def answers(self) -> bool:
        assert self.process
        assert self.process.poll() is None, (self.folder / "server.log").read_text()
        with contextlib.suppress(OSError):
            return urllib.request.urlopen(f"{self.uri}/health", timeout=2).status == 200
        return False

    def signal(self, number: int) -> None:
        assert self.process
        os.killpg(self.process.pid, number)

    def stop(self) -> None:
        if self.process is not None:
            self.signal(signal.SIGKILL)
            self.process.wait()
            self.process = None


def until(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.05)


def config_for(uri=None, **tracking):
    return Config(tracking=TrackingConfig(uri=uri, **tracking), train=TrainConfig(steps=100))


def begin(config, storage, run_name, run_id=None, start_step=0):
    callback = MLflowCallback(config.tracking, storage, run_id)
    counts = {f"fact_{i}": i for i in range(150)}  # more than one call of MLflow takes
    callback.on_run_start(
        RunInfo(
            config=config,
            run_dir=storage / run_name,
            world_size=2,
            start_step=start_step,
            layers=LAYERS,
            layer_sizes=(100, 90, 110, 100),
            parameters=400,
            device="cpu",
            hosts=("node-a", "node-b"),
            fingerprint="0123456789abcdef" * 4,
            data={"long": "x" * 7000, **counts},
        )
    )
    return callback


def train(callback, steps=range(1, 101), loss=2.0):
    """One hundred steps' worth of events: 4 points a step, a switch every 20, with a visit and an
    evaluation.
    """
    for step in steps:
        values = {
            "train/loss": loss / step,
            "lwo/active_layer": (step - 1) // 20 % 4,
            "memory/peak_bytes": 1e9 + step,
        }
        callback.on_metrics(step, values | {"train/elapsed_seconds": step / 10})
        if step % 20 == 0:
            visit = {
                "layer": (step - 1) // 20 % 4,
                "loss_drop": 1 / step,
                "grad_norm": 1.0,
                "seconds": 2.0,
            }
            callback.on_visit(
                step, LAYERS[(step - 1) // 20 % 4], {f"visit/{key}": v for key, v in visit.items()}
            )
            callback.on_switch(step, LAYERS[step // 20 % 4])
            callback.on_evaluation(step, {"eval/loss": loss / step, "eval/bleu": float("nan")})


def client_of(uri):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def history(client, run_id):
    """{metric: [(step, value)]} as MLflow holds it, repeated points included."""
    keys = client.get_run(run_id).data.metrics
    return {
        key: [(m.step, m.value) for m in client.get_metric_history(run_id, key)] for key in keys
    }


def assert_equal_to_spool(client, run_id, spool):
    held = history(client, run_id)
    shown = Counter((point.name, point.step) for point in shown_of(spool))
    assert shown
    assert Counter((key, step) for key, points in held.items() for step, _ in points) == shown


def shown_of(spool: Path) -> list[Point]:
    """The points of a spool that MLflow gets."""
    return [p for record in read_spool(spool) for p in shown_points(points_of(record))]


def artifacts(client, run_id):
    top = [file.path for file in client.list_artifacts(run_id)]
    return {*top, *(file.path for file in client.list_artifacts(run_id, "pictures"))}
