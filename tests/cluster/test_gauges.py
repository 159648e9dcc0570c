"""What Ray's metrics page shows of a run."""

from __future__ import annotations

import socket
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from lwo_dist.cluster import gauges
from lwo_dist.config import Config
from lwo_dist.run_info import RunInfo
from tests.tracking import until

METRICS = {
    "lwo/active_layer": 3.0,
    "memory/optimizer_state_bytes": 4096.0,
    "train/tokens_per_second": 512.5,
}
SHOWN = {
    "lwo_active_layer": 3.0,
    "lwo_optimizer_state_bytes": 4096.0,
    "lwo_tokens_per_second": 512.5,
    "lwo_step": 20.0,
}


def show() -> gauges.RayGauges:
    callback = gauges.RayGauges()
    callback.on_run_start(
        RunInfo(
            config=Config(run_name="tuned"),
            run_dir=Path("runs/tuned"),
            world_size=2,
            start_step=0,
            layers=("a", "b", "c", "d"),
            layer_sizes=(1, 2, 3, 4),
            parameters=10,
            device="CPU",
        )
    )
    callback.on_metrics(20, METRICS)
    return callback


def test_every_logged_stretch_sets_the_gauges(monkeypatch: pytest.MonkeyPatch) -> None:
    values: dict[str, Any] = {}

    class Gauge:
        def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
            assert description and tag_keys == ("run",)
            self.name = name

        def set(self, value: float, tags: dict[str, str]) -> None:
            values[self.name] = (value, tags)

    monkeypatch.setattr(gauges, "Gauge", Gauge)
    show()
    assert values == {name: (value, {"run": "tuned"}) for name, value in SHOWN.items()}


@pytest.mark.long
def test_prometheus_can_scrape_them(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray.init(address="local", num_cpus=1, include_dashboard=False, _metrics_export_port=port)
    try:

        @ray.remote
        class Worker:
            def show(self) -> None:
                self.callback = show()

        worker = Worker.remote()
        ray.get(worker.show.remote())
        page = ""

        def shown() -> bool:
            nonlocal page
            try:
                page = (
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5)
                    .read()
                    .decode()
                )
            except OSError:
                return False
            return "ray_lwo_step{" in page

        until(shown, 120)
    finally:
        ray.shutdown()
    lines = [line for line in page.splitlines() if line.startswith("ray_lwo_")]
    for name, value in SHOWN.items():
        [line] = [line for line in lines if line.startswith(f"ray_{name}{{")]
        assert 'run="tuned"' in line and float(line.split()[-1]) == value
