"""Samples the load of every node and GPU during training; rank 0 logs it with the metrics."""

from __future__ import annotations

import math
import os
import socket
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import psutil
import torch

from lwo_dist import distributed

__all__ = ["SystemMetrics"]

# MLflow's own names, which its UI shows in a separate tab. A node's come from its first rank.
NODE = (
    "cpu_utilization_percentage",
    "system_memory_usage_megabytes",
    "system_memory_usage_percentage",
    "disk_usage_percentage",
    "disk_available_megabytes",
    "network_receive_megabytes",
    "network_transmit_megabytes",
)
GPU = (
    "utilization_percentage",
    "memory_usage_megabytes",
    "memory_usage_percentage",
    "power_usage_watts",
)
MAX_HOSTS = 16


class SystemMetrics:
    """All ranks create one together. A thread samples; `read` returns means and never waits.

    Args:
        folder: any folder on the disk whose usage is measured.
        enabled: if False, all values are NaN and there is no thread.
        interval_s: seconds between samples.
    """

    def __init__(
        self,
        device: torch.device,
        folder: str | os.PathLike[str],
        *,
        enabled: bool = True,
        interval_s: float = 2.0,
    ):
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self._ranks: list[tuple[str, int]] = distributed.gather_objects(
            (socket.gethostname(), local_rank)
        )
        """Host and local rank of every rank."""
        sources: list[Callable[[], list[float]]] = []
        self._samples: list[list[float]] = []
        if enabled and local_rank == 0:
            sources.append(_node_source(folder))
        else:
            sources.append(_no_node)
        gpu = _gpu_source(device) if enabled else None
        sources.append(gpu or _no_gpu)
        if enabled and (local_rank == 0 or gpu is not None):
            stop = threading.Event()
            weakref.finalize(self, stop.set)
            threading.Thread(
                target=_sample,
                args=(sources, self._samples, stop, interval_s),
                name="lwo-system-metrics",
                daemon=True,
            ).start()

    @property
    def hosts(self) -> list[str]:
        """The distinct hosts of all ranks."""
        return list(dict.fromkeys(host for host, _ in self._ranks))

    def read(self) -> list[float]:
        """This rank's `len(NODE) + len(GPU)` means since the last call; NaN without samples."""
        samples = self._samples[:]
        del self._samples[: len(samples)]
        columns = list(zip(*samples, strict=True)) or [()] * (len(NODE) + len(GPU))
        return [sum(column) / len(column) if column else math.nan for column in columns]

    def metrics(self, rows: Sequence[Sequence[float]]) -> dict[str, float]:
        """`system/<host>/...` from `rows`, the results of `read` on each rank, in rank order.

        With more than `MAX_HOSTS` hosts, `system/hosts/<name>_min`, `_mean` and `_max` over all
        hosts and GPUs, so that the number of metrics does not grow with the cluster.
        """
        if len(self.hosts) > MAX_HOSTS:
            return _over_hosts(rows)
        found: dict[str, float] = {}
        for (host, local_rank), row in zip(self._ranks, rows, strict=True):
            names = [*NODE, *(f"gpu_{local_rank}_{name}" for name in GPU)]
            for name, value in zip(names, row, strict=True):
                if not math.isnan(value):
                    found[f"system/{host}/{name}"] = value
        return found


def _over_hosts(rows: Sequence[Sequence[float]]) -> dict[str, float]:
    found: dict[str, float] = {}
    names = [*NODE, *(f"gpu_{name}" for name in GPU)]
    for name, column in zip(names, zip(*rows, strict=True), strict=True):
        if values := [value for value in column if not math.isnan(value)]:
            found[f"system/hosts/{name}_min"] = min(values)
            found[f"system/hosts/{name}_mean"] = sum(values) / len(values)
            found[f"system/hosts/{name}_max"] = max(values)
    return found


def _sample(
    sources: list[Callable[[], list[float]]],
    samples: list[list[float]],
    stop: threading.Event,
    interval_s: float,
) -> None:
    while not stop.wait(interval_s):
        with suppress(Exception):  # if a driver stops responding, only its points are lost
            samples.append([value for source in sources for value in source()])


def _no_node() -> list[float]:
    return [math.nan] * len(NODE)


def _no_gpu() -> list[float]:
    return [math.nan] * len(GPU)


def _node_source(folder: str | os.PathLike[str]) -> Callable[[], list[float]]:
    def traffic() -> tuple[int, int]:
        counters = psutil.net_io_counters()
        return (counters.bytes_recv, counters.bytes_sent) if counters else (0, 0)

    received, sent = traffic()
    psutil.cpu_percent()  # the first call has no reference

    def read() -> list[float]:
        memory = psutil.virtual_memory()
        disk = psutil.disk_usage(os.fspath(folder))
        received_now, sent_now = traffic()
        return [
            psutil.cpu_percent(),
            memory.used / 1e6,
            memory.used / memory.total * 100,
            disk.percent,
            disk.free / 1e6,
            (received_now - received) / 1e6,
            (sent_now - sent) / 1e6,
        ]

    return read


def _gpu_source(device: torch.device) -> Callable[[], list[float]] | None:
    """None without a GPU, nvidia-ml-py or a working driver."""
    if device.type != "cuda":
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        # By UUID: CUDA_VISIBLE_DEVICES renumbers for CUDA, not for NVML.
        handle: Any = pynvml.nvmlDeviceGetHandleByUUID(
            f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        )
    except Exception:
        return None

    def read() -> list[float]:
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        try:
            watts = pynvml.nvmlDeviceGetPowerUsage(handle) / 1000
        except pynvml.NVMLError:  # not all cards report it
            watts = math.nan
        return [
            float(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu),
            memory.used / 1e6,
            memory.used / memory.total * 100,
            watts,
        ]

    return read
