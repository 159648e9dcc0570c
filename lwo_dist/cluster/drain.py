"""What a pod or node runs when it is told to go: python -m lwo_dist.cluster.drain --seconds 150

Where the run's driver is (the head), it gets SIGTERM, upon which the run saves a checkpoint and
ends with exit code 75. Elsewhere Ray is told that this node goes; Ray Train's workers see that,
save, and go on without it or end. Either way this returns when nothing of the run is left here, or
when the time is over.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable

import psutil

__all__ = ["leave"]

_DRIVERS = ("lwo-dist", "lwo_dist.cli", "launch/train.py")
_WORKER = "RayTrainWorker"
_GCS = "--gcs-address="


def leave(seconds: float) -> bool:
    """Have the run leave this node. Returns whether it did, within `seconds`."""
    deadline = time.monotonic() + seconds
    drivers = [process for process in _processes() if _is_driver(_words(process))]
    if drivers:
        for driver in drivers:
            driver.terminate()
        return _gone(lambda: [driver for driver in drivers if _runs(driver)], deadline)
    if not _workers():
        return True
    _drain(seconds)
    return _gone(_workers, deadline)


def _processes() -> Iterable[psutil.Process]:
    mine = os.getuid()
    for process in psutil.process_iter():
        try:
            if process.uids().real == mine and process.pid != os.getpid():
                yield process
        except psutil.Error:  # It has ended meanwhile.
            continue


def _words(process: psutil.Process) -> list[str]:
    try:
        words: list[str] = process.cmdline()
    except psutil.Error:
        return []
    return words


def _runs(process: psutil.Process) -> bool:
    try:
        # One that has ended stays until its parent looks, and Ray is in no hurry.
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _is_driver(words: list[str]) -> bool:
    """Whether a command line is `lwo-dist train` by one of its names, and not a shell or client
    that mentions it.
    """
    for i, word in enumerate(words[:4]):
        if word.endswith(_DRIVERS):
            return word.endswith(_DRIVERS[-1]) or words[i + 1 : i + 2] == ["train"]
    return False


def _workers() -> list[psutil.Process]:
    # Ray gives its processes the actor's name as a title.
    return [
        process for process in _processes() if any(_WORKER in word for word in _words(process)[:1])
    ]


def _drain(seconds: float) -> None:
    import ray

    address = os.environ.get("RAY_ADDRESS") or _own_address()
    if address is None:
        print("found no Ray that these workers belong to; set RAY_ADDRESS", file=sys.stderr)
        return
    ray.init(address=address, log_to_driver=False)
    node = ray.get_runtime_context().get_node_id()
    gcs = ray.get_runtime_context().gcs_address
    ray.shutdown()
    command = [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "drain-node",
        f"--address={gcs}",
        f"--node-id={node}",
    ]
    reason = ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=the node goes"]
    subprocess.run([*command, *reason, f"--deadline-remaining-seconds={int(seconds)}"], check=True)


def _own_address() -> str | None:
    """The GCS address on the command line of the workers' raylet.

    Ray's own lookup also trusts a file in /tmp and processes of other users, and would send the
    token to them.
    """
    for worker in _workers():
        with contextlib.suppress(psutil.Error):
            for word in (word for parent in worker.parents() for word in _words(parent)):
                if word.startswith(_GCS):
                    return word.removeprefix(_GCS)
    return None


def _gone(left: Callable[[], list[psutil.Process]], deadline: float) -> bool:
    while left():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m lwo_dist.cluster.drain", description=__doc__)
    parser.add_argument(
        "--seconds", type=float, default=150, help="time that there is; default: %(default)s"
    )
    return 0 if leave(parser.parse_args().seconds) else 1


if __name__ == "__main__":
    sys.exit(main())
