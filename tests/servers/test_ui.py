"""`lwo-dist ui` listens as documented in launch/SECURITY.md."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from tests.cluster.launching import REPOSITORY, free_port
from tests.listening import Watch, listed


def test_ui_listens_as_documented(storage: Path) -> None:
    command = [sys.executable, "-m", "lwo_dist.cli", "ui", f"storage={storage}"]
    command += ["tracking.experiment=first", "--port"]
    inherited = {name: value for name, value in os.environ.items() if "MLFLOW" not in name}
    watch = Watch()
    server = subprocess.Popen(
        [*command, str(free_port())],
        env=inherited | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    with server:
        deadline = time.monotonic() + 120
        while not watch.found and time.monotonic() < deadline:
            time.sleep(0.5)
        server.terminate()
    assert watch.stop() == listed("lwo-dist ui")
