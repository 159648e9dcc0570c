"""The Ray that a run uses, and the room for workers on its nodes."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shlex
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

from lwo_dist.access import private_folder, scratch_folder
from lwo_dist.config import ClusterConfig
from lwo_dist.errors import UserError, first_line

__all__ = [
    "Node",
    "joined_ray",
    "local_ray",
    "nodes_of_cluster",
    "placement_groups",
    "remove_placement_groups",
    "resources_per_worker",
    "room",
    "this_machine",
]

Node = Mapping[str, float]
"""What a node offers: CPU, GPU, memory (bytes), ... -> amount."""

_START_ATTEMPTS = 3
_PREFIX = "r"
# A socket path has at most 107 bytes, and Ray needs up to 68 of them below its folder.
_MAX_FOLDER = 107 - 68 - len("/r12345678/r")
_ABANDONED_SECONDS = 24 * 3600


def resources_per_worker(cluster: ClusterConfig, nodes: list[Node]) -> dict[str, float]:
    """What one worker takes. Raises UserError where min_workers do not fit: Ray would wait
    for ever.
    """
    on_gpu: dict[str, float] = {"CPU": 1, "GPU": 1, **cluster.resources_per_worker}
    on_cpu: dict[str, float] = {"CPU": 1, **cluster.resources_per_worker}
    if cluster.use_gpu is None:
        wanted = on_gpu if room(nodes, on_gpu) >= cluster.min_workers else on_cpu
    else:
        wanted = on_gpu if cluster.use_gpu else on_cpu
    slots = room(nodes, wanted)
    if slots < cluster.min_workers:
        offer = ", ".join(
            f"{sum(node.get(name, 0) for node in nodes):g} {name}s" for name in wanted
        )
        needs = ", ".join(f"{amount:g} {name}" for name, amount in wanted.items())
        lower = (
            "set cluster.use_gpu=false" if "GPU" in wanted else "lower cluster.resources_per_worker"
        )
        remedy = f"set it to at most {slots}" if slots else lower
        number = (
            cluster.num_workers
            if isinstance(cluster.num_workers, int)
            else list(cluster.num_workers)
        )
        raise UserError(
            f"cluster.num_workers = {number}: this Ray cluster has {offer}, and a worker takes"
            f" {needs}; {remedy}, or add nodes"
        )
    return wanted


def room(nodes: list[Node], wanted: Mapping[str, float]) -> int:
    """How many workers fit, each wholly on one node."""
    asked = {name: amount for name, amount in wanted.items() if amount > 0}
    return sum(
        min((int(node.get(name, 0) // amount) for name, amount in asked.items()), default=1)
        for node in nodes
    )


def this_machine() -> Node:
    import torch

    # Ray is told the same numbers, so that what was checked is what there is.
    allowed = getattr(os, "sched_getaffinity", None)
    return {
        "CPU": len(allowed(0)) if allowed else os.cpu_count() or 1,
        "GPU": torch.cuda.device_count(),
    }


def nodes_of_cluster(without: Collection[str] = ()) -> list[Node]:
    """The nodes that are alive in the Ray that was joined, but for those with an id in
    `without`.
    """
    import ray

    return [
        node["Resources"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in without
    ]


def placement_groups() -> dict[str, str]:
    """This job's placement groups, which hold slots for workers: id -> state, such as PENDING or
    CREATED.
    """
    import ray
    from ray.util import placement_group_table

    job = ray.get_runtime_context().get_job_id()  # An id of a placement group ends with its job's.
    states = {
        name: group["state"]
        for name, group in placement_group_table().items()
        if name.endswith(job)
    }
    return {name: state for name, state in states.items() if state != "REMOVED"}


def remove_placement_groups(names: Collection[str]) -> None:
    import ray
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    for name in names:
        remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(name))))


@contextlib.contextmanager
def joined_ray() -> Iterator[list[Node]]:
    """The nodes of the caller's Ray, which is the caller's to end, or of the cluster at
    RAY_ADDRESS.
    """
    import ray

    ours = not ray.is_initialized()
    if ours:
        address = os.environ["RAY_ADDRESS"]
        try:
            host, _, port = address.removeprefix("ray://").rpartition(":")
            if port.isdigit():  # Ray itself would try for minutes.
                socket.create_connection((host, int(port)), timeout=10).close()
            ray.init(address=address, logging_level=logging.WARNING)
        except (OSError, ValueError) as error:
            raise UserError(
                f"RAY_ADDRESS = {address}: no Ray can be joined there ({error}); give host:port of"
                " a running Ray, and its token in RAY_AUTH_TOKEN if it has one, or unset"
                " RAY_ADDRESS for a local Ray"
            ) from None
    try:
        yield nodes_of_cluster()
    finally:
        if ours:
            ray.shutdown()


@contextlib.contextmanager
def local_ray(machine: Node) -> Iterator[None]:
    """A Ray of this process's own, in a folder that no other user can enter.

    Raises:
        UserError: Ray did not start in `_START_ATTEMPTS` attempts, or its folder is not usable.
    """
    import ray

    with _temporary_folder() as folder:
        _start_ray(machine, folder)
        try:
            yield
        finally:
            ray.shutdown()
            del os.environ["RAY_API_SERVER_ADDRESS"]


def _start_ray(machine: Node, folder: Path) -> None:
    # Ray starts workers through a shell and does not quote a path with spaces.
    python = shlex.quote(sys.executable)
    for attempt in range(1, _START_ATTEMPTS + 1):
        # Else Ray's own actors look for "the" Ray of the machine, and complain where there are two.
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{port}"
        before = set(psutil.Process().children())
        try:
            _init_ray(
                address="local",
                dashboard_host="127.0.0.1",
                dashboard_port=port,
                num_cpus=int(machine["CPU"]),
                num_gpus=int(machine["GPU"]),
                runtime_env={} if python == sys.executable else {"py_executable": python},
                logging_level=logging.WARNING,
                _temp_dir=str(folder),
            )
        except BaseException as error:
            # A busy machine may exceed Ray's start timeout of 30 s. Ray does not clean up then.
            for child in set(psutil.Process().children()) - before:
                with contextlib.suppress(psutil.Error):
                    child.kill()
                    child.wait(10)
            del os.environ["RAY_API_SERVER_ADDRESS"]
            if not isinstance(error, Exception):
                raise
            if attempt == _START_ATTEMPTS:
                raise UserError(
                    f"a local Ray did not start in {attempt} attempts ({first_line(error)}); try"
                    " again when this machine is less busy, or start the ranks with torchrun"
                ) from error
            print(f"Ray did not start ({first_line(error)}); trying again", flush=True)
        else:
            return


def _init_ray(**settings: Any) -> None:
    import ray

    try:
        ray.init(**settings)
    except SystemExit:  # Ray's handler of SIGTERM while it starts
        ray.shutdown()
        raise KeyboardInterrupt from None
    except BaseException:
        ray.shutdown()
        raise


@contextlib.contextmanager
def _temporary_folder() -> Iterator[Path]:
    """An empty folder for Ray, removed at the end.

    Ray makes its own folders accessible to everybody, whatever the umask; their parent is private.
    """
    chosen = os.environ.get("RAY_TMPDIR")
    around = Path(chosen) if chosen else scratch_folder()
    if len(os.fsencode(around)) > _MAX_FOLDER:
        chosen, around = None, private_folder(Path("/tmp", f"lwo_dist-{os.getuid()}"))
    if chosen is None:
        _clear_abandoned(around)
    try:
        around.mkdir(parents=True, exist_ok=True)
        closed = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=around))
    except OSError as error:
        raise UserError(
            f"RAY_TMPDIR = {around}: {error.strerror}; give a writable folder"
        ) from None
    lock = os.open(closed, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_SH)
        yield closed / "r"
    finally:
        shutil.rmtree(closed, ignore_errors=True)
        os.close(lock)


def _clear_abandoned(around: Path) -> None:
    """Remove folders that killed drivers left behind: a day old, and not locked."""
    for folder in around.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime < _ABANDONED_SECONDS:
                continue
            lock = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)
