"""Listening sockets: those in launch/SECURITY.md, and those of a process and its children."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

import psutil

__all__ = ["Watch", "listed"]

PAGE = Path(__file__).parents[1] / "launch" / "SECURITY.md"
ALL, LOOPBACK, OWN = "all", "127.0.0.1", "own"

# Part of a process's command line -> its name on the page.
_NAMES = {
    "mlflow": "MLflow",
    "gcs_server": "GCS",
    "DashboardAgent": "agent",
    "RuntimeEnvAgent": "runtime agent",
    "/raylet/raylet": "raylet",
    "dashboard/dashboard.py": "dashboard",
    "ray.util.client.server": "client server",
    "_private/monitor.py": "monitor",
    "ray::": "worker",
    "torch.distributed.run": "torchrun",
    "launch/train.py": "rank",
    "lwo_dist.cli train": "driver",
}

Listener = tuple[str, str]
"""A process's name on the page, and the address: all, own (the host's) or 127.0.0.1."""


def listed(way: str) -> set[Listener]:
    """The rows of the page's table for one way to start."""
    rows = [line.strip("| ").split(" | ") for line in PAGE.read_text().splitlines()]
    found = {(row[1], row[2]) for row in rows if len(row) == 6 and row[0] == f"`{way}`"}
    assert found, f"no rows for {way}"
    return found


class Watch:
    """Collects the listening sockets of the processes that this one starts, until `stop`."""

    def __init__(self) -> None:
        self.found: set[Listener] = set()
        self._before = set(psutil.Process().children())
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def stop(self) -> set[Listener]:
        self._over.set()
        self._thread.join()
        return self.found

    def _look(self) -> None:
        while not self._over.wait(0.5):
            for child in set(psutil.Process().children()) - self._before:
                with contextlib.suppress(psutil.Error):
                    for process in [child, *child.children(recursive=True)]:
                        with contextlib.suppress(psutil.Error):
                            self.found |= _listeners(process)


def _listeners(process: psutil.Process) -> set[Listener]:
    addresses = {
        connection.laddr.ip.removeprefix("::ffff:")
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    words = " ".join(process.cmdline())
    name = next((name for part, name in _NAMES.items() if part in words), words)
    return {(name, _kind(address)) for address in addresses}


def _kind(address: str) -> str:
    if address in ("::", "0.0.0.0"):
        return ALL
    return LOOPBACK if address == "::1" or address.startswith("127.") else OWN
