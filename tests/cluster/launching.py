"""Small runs through the real commands."""

from __future__ import annotations

import json
import os
import queue
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.models import save_tiny_model

__all__ = [
    "REPOSITORY",
    "STEPS",
    "Followed",
    "command",
    "environment",
    "followed",
    "free_port",
    "make_inputs",
    "overrides",
    "run",
    "summary_of",
    "torchrun",
    "without_raylets",
]

REPOSITORY = Path(__file__).parents[2]
STEPS = 6


def make_inputs(folder: Path) -> Path:
    """Make `model`, `source` and `home` in `folder`; runs go into `runs`."""
    (folder / "source").mkdir(parents=True)
    for i in range(8):
        lines = "".join(f"    total_{i} += values[{j}]  # line {j}\n" for j in range(15))
        (folder / "source" / f"module_{i}.py").write_text(f"def function_{i}(values):\n{lines}")
    save_tiny_model(folder / "model", [path.read_text() for path in (folder / "source").iterdir()])
    (folder / "home").mkdir()
    return folder


def environment(folder: Path, **more: str) -> dict[str, str]:
    inherited = {
        k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_", "HF_", "OMP_"))
    }
    return inherited | {"HOME": str(folder / "home"), "PYTHONPATH": str(REPOSITORY)} | more


def overrides(folder: Path, run_name: str, *more: str) -> list[str]:
    return [
        "-c",
        f"{REPOSITORY}/launch/configs/debug_cpu.yaml",
        f"model.name={folder}/model",
        f"data.source={folder}/source",
        f"storage={folder}/runs",
        f"run_name={run_name}",
        f"train.steps={STEPS}",
        "train.global_batch_size=4",
        "train.sequence_length=32",
        "train.logging_steps=2",
        "eval.num_lines=4",
        "eval.max_new_tokens=4",
        "tracking.enabled=false",
        *more,
    ]


def command(folder: Path, run_name: str, *more: str) -> list[str]:
    return [sys.executable, "-m", "lwo_dist.cli", "train", *overrides(folder, run_name, *more)]


def torchrun(folder: Path, run_name: str, *more: str, script: Path | None = None) -> list[str]:
    """Two ranks of `launch/train.py`, or of another script that takes the same arguments."""
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--master-port={free_port()}",
        "--nproc-per-node",
        "2",
    ]
    return [
        *launcher,
        str(script or REPOSITORY / "launch" / "train.py"),
        *overrides(folder, run_name, *more),
    ]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def run(
    command: list[str], environment: dict[str, str], timeout: float = 600
) -> subprocess.CompletedProcess[str]:
    # Started elsewhere than the storage lies, because the workers' own folder is elsewhere, too.
    return subprocess.run(
        command,
        cwd=environment["HOME"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


class Followed:
    """A process, and what it says line by line."""

    def __init__(self, process: subprocess.Popen[str]):
        self.process, self.said = process, list[str]()
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def until(self, pattern: str, timeout_s: float = 240) -> re.Match[str]:
        """The next line in which `pattern` is found."""
        deadline = time.monotonic() + timeout_s
        while (line := self._next(deadline)) is not None:
            if found := re.search(pattern, line):
                return found
        raise AssertionError(f"it ended without saying {pattern}:\n{''.join(self.said)}")

    def forget(self) -> None:
        """Leave out what has been said so far: `until` waits for what comes."""
        while not self._lines.empty():
            self._next(time.monotonic())

    def end(self, timeout_s: float = 240) -> str:
        """Wait until it is over; all it said."""
        while self._next(time.monotonic() + timeout_s) is not None:
            pass
        self.process.wait()
        return "".join(self.said)

    def _next(self, deadline: float) -> str | None:
        try:
            line = self._lines.get(timeout=max(0.1, deadline - time.monotonic()))
        except queue.Empty:
            raise AssertionError(
                f"it said nothing more in time, after:\n{''.join(self.said)}"
            ) from None
        if line is not None:
            self.said.append(line)
        return line


@contextmanager
def followed(command: list[str], environment: dict[str, str]) -> Iterator[Followed]:
    """Run `command` with both its outputs in one."""
    process = subprocess.Popen(
        command,
        cwd=environment["HOME"],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        yield Followed(process)
    finally:
        # Its children may live on, with the pipe open: nothing is waited for but the process
        # itself.
        process.kill()
        process.wait()


def summary_of(folder: Path, run_name: str) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / "runs" / run_name / "summary.json").read_text())
    return summary


def without_raylets(stderr: str) -> list[str]:
    """The lines of `stderr`, less what a raylet says of its host, such as a disk nearly full."""
    return [line for line in stderr.splitlines() if "] (raylet) " not in line]
