"""Listening sockets: those in launch/SECURITY.md, and those of processes."""

from __future__ import annotations

import contextlib
import re
import subprocess
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
    found = {(row[1], row[2]) for row in rows if len(row) == 6 and row[0].replace("`", "") == way}
    assert found, f"no rows for {way}"
    return found


class Watch:
    """Collects listening sockets until `stop`.

    Args:
        namespace: a network namespace, all of whose processes are watched (Debian: iproute2).
            Default: the processes that this one starts from now on.
    """

    def __init__(self, namespace: str = "") -> None:
        self.found: set[Listener] = set()
        self._namespace = namespace
        self._before = set(psutil.Process().children())
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._repeat, daemon=True)
        self._thread.start()

    def stop(self) -> set[Listener]:
        self._over.set()
        self._thread.join()
        return self.found

    def _repeat(self) -> None:
        look = self._look_in_namespace if self._namespace else self._look_at_children
        while not self._over.wait(0.5):
            look()

    def _look_at_children(self) -> None:
        for child in set(psutil.Process().children()) - self._before:
            with contextlib.suppress(psutil.Error):
                for process in [child, *child.children(recursive=True)]:
                    with contextlib.suppress(psutil.Error):
                        for connection in process.net_connections("tcp"):
                            if connection.status == psutil.CONN_LISTEN:
                                self._add(process, connection.laddr.ip)

    def _look_in_namespace(self) -> None:
        # psutil knows the sockets of its own namespace only.
        command = ["ip", "netns", "exec", self._namespace, "ss", "-Htlnp"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        for line in said.splitlines():
            address = line.split()[3].rpartition(":")[0].strip("[]")
            for pid in re.findall(r"\bpid=(\d+)", line):
                with contextlib.suppress(psutil.Error):
                    self._add(psutil.Process(int(pid)), address)

    def _add(self, process: psutil.Process, address: str) -> None:
        words = " ".join(process.cmdline()).strip()
        # A process has none for a moment while it ends, or while it changes its title. The look
        # before or after has its sockets under its name.
        if not words:
            return
        name = next((name for part, name in _NAMES.items() if part in words), words)
        self.found.add((name, _kind(address.removeprefix("::ffff:"))))


def _kind(address: str) -> str:
    if address in ("*", "::", "0.0.0.0"):
        return ALL
    return LOOPBACK if address == "::1" or address.startswith("127.") else OWN
