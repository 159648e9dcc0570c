"""Gauges on Ray's metrics page, and so in Prometheus and Grafana where the cluster has them."""

from __future__ import annotations

from collections.abc import Mapping

from ray.util.metrics import Gauge

from lwo_dist.callback import Callback
from lwo_dist.run_info import RunInfo

__all__ = ["RayGauges"]

_GAUGES = {
    "lwo_active_layer": (
        "lwo/active_layer",
        "the layer that is trained, counted from 0 in model order",
    ),
    "lwo_optimizer_state_bytes": (
        "memory/optimizer_state_bytes",
        "bytes of optimizer state of the fullest worker",
    ),
    "lwo_tokens_per_second": (
        "train/tokens_per_second",
        "tokens of the last logged stretch, over all workers",
    ),
    "lwo_step": ("", "optimizer steps done"),
}


class RayGauges(Callback):
    """Set whenever metrics are logged; they carry the run's name as the tag `run`."""

    def on_run_start(self, info: RunInfo) -> None:
        self._gauges = {
            name: Gauge(name, description=text, tag_keys=("run",))
            for name, (_, text) in _GAUGES.items()
        }
        self._tags = {"run": str(info.config.run_name)}

    def on_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, gauge in self._gauges.items():
            key, _ = _GAUGES[name]
            gauge.set(metrics[key] if key else float(step), tags=self._tags)
