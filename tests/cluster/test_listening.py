"""A cluster's head listens on the sockets in launch/SECURITY.md, and no others.

`test_ray_train.py` checks local runs and torchrun.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.cluster.launching import REPOSITORY, environment, free_port
from tests.listening import Watch, listed

PATIENCE_S = 120


def test_the_head_listens_as_documented(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    with tempfile.TemporaryDirectory(prefix="", dir="/tmp") as short:
        settings = {
            "TMPDIR": short,
            "LWO_VENV": str(Path(sys.prefix)),
            "LWO_RAY_PORT": str(free_port()),
            "LWO_DASHBOARD_PORT": str(free_port()),
        }
        watch = Watch()
        script = subprocess.Popen(
            [str(REPOSITORY / "launch" / "ray_cluster.sh"), "head"],
            env=environment(tmp_path, **settings),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        with script:
            deadline = time.monotonic() + PATIENCE_S
            while not listed("ray_cluster.sh head") <= watch.found and time.monotonic() < deadline:
                time.sleep(0.5)
            closed = [path for path in Path(short).iterdir() if path.stat().st_mode & 0o077]
            script.terminate()
        assert watch.stop() == listed("ray_cluster.sh head")
        assert closed == []
