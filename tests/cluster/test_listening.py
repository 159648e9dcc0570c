"""A cluster's head and Slurm's ranks listen on the sockets in launch/SECURITY.md, and no others.

`test_ray_train.py` checks local runs and torchrun.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from tests.cluster.launching import REPOSITORY, environment, free_port, make_inputs, overrides
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


def test_ranks_of_slurm_listen_as_documented(tmp_path: Path) -> None:
    """Two hosts with a rank each, which share this machine's address."""
    own = next((pair for pair in _interfaces() if pair[0] != "lo"), None)
    if own is None:
        pytest.skip("no interface but lo, so no address of its own")
    interface, address = own
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"}
    rendezvous = {"MASTER_ADDR": address, "MASTER_PORT": str(free_port())}
    folder = make_inputs(tmp_path / "slurm")
    script = [sys.executable, str(REPOSITORY / "launch" / "train.py"), *overrides(folder, "r")]
    watch = Watch()
    ranks = [
        subprocess.Popen(
            script,
            cwd=folder / "home",
            env=environment(folder, RANK=rank, GLOO_SOCKET_IFNAME=interface, **world, **rendezvous),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for rank in "01"
    ]
    assert [rank.wait(PATIENCE_S) for rank in ranks] == [0, 0]
    assert watch.stop() == listed("slurm.sbatch")


def _interfaces() -> list[tuple[str, str]]:
    """(name, IPv4 address) of each interface."""
    return [
        (name, address.address)
        for name, addresses in psutil.net_if_addrs().items()
        for address in addresses
        if address.family == socket.AF_INET
    ]
