"""Leaving a node in time."""

from __future__ import annotations

import shlex
import subprocess
import sys

import psutil
import pytest

from lwo_dist.cluster import drain as module
from lwo_dist.cluster.drain import leave

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
        ("python -m lwo_dist.cluster.drain --seconds 5", False),
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
        f"import signal, sys, time; signal.signal(signal.SIGTERM, {handler}); print('up',"
        " flush=True); time.sleep(600)"
    )
    driver = subprocess.Popen(
        [sys.executable, "-c", code, "lwo-dist", "train"], stdout=subprocess.PIPE, text=True
    )
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
    monkeypatch.setattr(
        module, "_processes", lambda: [process for process in everything() if process.pid in ours]
    )
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


def test_drain_uses_the_address_of_the_workers_raylet(monkeypatch: pytest.MonkeyPatch) -> None:
    # Only a parent of the worker counts: not a raylet of another user, nor a file in /tmp.
    worker = "import time; print('up', flush=True); time.sleep(600)"
    raylet = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1], 'Worker'])"
    command = [sys.executable, "-c", raylet, worker, "--gcs-address=10.0.0.1:6379"]
    stranger = [sys.executable, "-c", worker, "--gcs-address=10.0.0.2:6379"]
    with (
        subprocess.Popen(stranger, stdout=subprocess.PIPE, text=True) as other,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process,
    ):
        for started in (other, process):
            assert started.stdout is not None and started.stdout.readline() == "up\n"
        children = psutil.Process(process.pid).children()
        monkeypatch.setattr(module, "_workers", lambda: children)
        address = module._own_address()
        for started in (*children, other):
            started.kill()
    assert address == "10.0.0.1:6379"
    monkeypatch.setattr(module, "_workers", lambda: [])
    assert module._own_address() is None


def test_drain_contacts_no_ray_without_an_address(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(module, "_workers", lambda: [])
    module._drain(1)
    assert "found no Ray that these workers belong to" in capsys.readouterr().err


_DRAINS = """
import os, subprocess, sys
import psutil, ray
from ray._private.state import state

ray.init(address="local", num_cpus=1, num_gpus=0, include_dashboard=False, log_to_driver=False)
node, address = ray.get_runtime_context().get_node_id(), ray.get_runtime_context().gcs_address

@ray.remote
class RayTrainWorker:  # keeps the node busy, so that it does not go at once
    def title(self):
        return psutil.Process().cmdline()[0]

worker = RayTrainWorker.remote()
print(ray.get(worker.title.remote()))
code = "from lwo_dist.cluster.drain import _drain, _workers; print(len(_workers())); _drain(100)"
environment = os.environ | {"RAY_ADDRESS": address}
done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
print(done.returncode, done.stdout.split()[0], done.stderr[-2000:])
print(list(state.get_draining_nodes()) == [node])
"""


@pytest.mark.long
def test_ray_takes_a_drain() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _DRAINS], capture_output=True, text=True, timeout=300
    )
    lines = done.stdout.splitlines()
    assert lines[0].startswith("ray::RayTrainWorker"), done.stderr
    assert int(lines[1].split()[0]) == 0 and int(lines[1].split()[1]) >= 1, lines
    assert lines[-1] == "True"
