"""Leaving a node in time."""

from __future__ import annotations

import shlex
import subprocess
import sys

import pytest

from lwo_dist.cluster import leave as module
from lwo_dist.cluster.leave import leave

_IS_DRIVER = module._is_driver


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("/opt/venv/bin/python /opt/venv/bin/lwo-dist train -c x", True),
        ("python -m lwo_dist.cli train -c x", True),
        ("python launch/train.py -c x", True),
        ("/bin/sh -c 'lwo-dist train -c x'", False),
        ("python -m lwo_dist.cli submit -c x", False),
        ("lwo-dist jobs logs train", False),
        ("python -m lwo_dist.cluster.leave --seconds 5", False),
        ("ray::RayTrainWorker.execute", False),
        ("", False),
    ],
)
def test_what_a_driver_is(command: str, expected: bool) -> None:
    assert _IS_DRIVER(shlex.split(command)) is expected


def _driver(ends: bool) -> subprocess.Popen[str]:
    """A process whose command line is a driver's; SIGTERM ends it with 75, or it does not care."""
    handler = "lambda *_: sys.exit(75)" if ends else "signal.SIG_IGN"
    code = (
        f"import signal, sys, time; signal.signal(signal.SIGTERM, {handler}); print('up', flush=True); time.sleep(600)"
    )
    driver = subprocess.Popen([sys.executable, "-c", code, "lwo-dist", "train"], stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None and driver.stdout.readline() == "up\n"
    return driver


@pytest.fixture(autouse=True)
def _only_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else trains on this machine is let alone."""
    everything = module._processes
    ours = set[int]()
    start = subprocess.Popen.__init__

    def note(self: subprocess.Popen[str], *arguments: object, **more: object) -> None:
        start(self, *arguments, **more)  # type: ignore[call-overload]
        ours.add(self.pid)

    monkeypatch.setattr(subprocess.Popen, "__init__", note)
    monkeypatch.setattr(module, "_processes", lambda: [process for process in everything() if process.pid in ours])
    monkeypatch.setattr(module, "_is_driver", lambda words: words[-2:] == ["lwo-dist", "train"])


def test_a_driver_is_asked_and_waited_for() -> None:
    with _driver(ends=True) as driver:
        assert leave(60)
        assert driver.wait(1) == 75


def test_the_time_is_kept() -> None:
    with _driver(ends=False) as driver:
        assert not leave(1)
        assert driver.poll() is None
        driver.kill()


def test_nothing_to_leave() -> None:
    assert leave(60)


def test_a_node_with_workers_only_is_drained(monkeypatch: pytest.MonkeyPatch) -> None:
    drained, workers = list[float](), [object()]
    monkeypatch.setattr(module, "_workers", lambda: list(workers))

    def drain(seconds: float) -> None:
        drained.append(seconds)
        workers.clear()  # as Ray Train does, when the checkpoint is there

    monkeypatch.setattr(module, "_drain", drain)
    assert leave(60)
    assert drained == [60]
