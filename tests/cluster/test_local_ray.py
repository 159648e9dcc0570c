"""The local Ray: a failed start is retried, and other users cannot reach it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from lwo_dist.cluster import nodes
from lwo_dist.distributed import loopback_only
from lwo_dist.errors import UserError

MACHINE = {"CPU": 1, "GPU": 0}
BUSY = "The current node timed out during startup. This could happen because some of ...\nmore"


@pytest.fixture
def folders(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The machine's temporary directory."""
    with tempfile.TemporaryDirectory(prefix="", dir="/tmp") as name:
        monkeypatch.setattr(tempfile, "tempdir", name)
        monkeypatch.delenv("RAY_TMPDIR", raising=False)
        yield Path(name)


def starts(failures: int) -> tuple[list[dict[str, Any]], Callable[..., None]]:
    """The settings of each start. A failed start leaves a process behind, as Ray does."""
    seen: list[dict[str, Any]] = []

    def start(**settings: Any) -> None:
        seen.append(settings)
        if len(seen) <= failures:
            subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            raise Exception(BUSY)

    return seen, start


def test_a_slow_ray_start_is_retried(
    folders: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen, start = starts(failures=2)
    monkeypatch.setattr(nodes, "_init_ray", start)
    before = psutil.Process().children()
    with nodes.local_ray(MACHINE):
        assert os.environ["RAY_API_SERVER_ADDRESS"] == (
            f"http://127.0.0.1:{seen[-1]['dashboard_port']}"
        )
        left = [child for child in psutil.Process().children() if child not in before]
        assert [child for child in left if child.status() != psutil.STATUS_ZOMBIE] == []
    assert len(seen) == 3
    assert "RAY_API_SERVER_ADDRESS" not in os.environ
    said = capsys.readouterr().out.splitlines()
    assert said == [f"Ray did not start ({BUSY.splitlines()[0]}); trying again"] * 2


def test_a_failing_ray_start_gives_one_line(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, start = starts(failures=9)
    monkeypatch.setattr(nodes, "_init_ray", start)
    with (
        pytest.raises(
            UserError, match=r"did not start in 3 attempts \(The .*; try again"
        ) as raised,
        nodes.local_ray(MACHINE),
    ):
        pass
    assert len(seen) == 3 and "\n" not in str(raised.value)
    assert "RAY_API_SERVER_ADDRESS" not in os.environ
    assert list((folders / f"lwo_dist-{os.getuid()}").iterdir()) == []


def test_ray_files_are_in_a_private_folder(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, start = starts(failures=0)
    monkeypatch.setattr(nodes, "_init_ray", start)
    with nodes.local_ray(MACHINE):
        folder = Path(seen[0]["_temp_dir"])
        assert folder.is_relative_to(folders)
        assert folder.parent.stat().st_mode & 0o077 == 0
    assert not folder.parent.exists()


def test_ranks_on_one_machine_listen_on_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")  # Set by the user.
    assert loopback_only() == {"GLOO_SOCKET_IFNAME": "lo"}
