"""Several raylets on this machine, as a process that takes orders on stdin and answers each in one
line.

add             another node of one CPU            -> its id
remove ID       the node dies, with all on it      -> removed
drain ID S      it will be taken away in S seconds -> drained
hosts           which nodes have training workers  -> ids
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["Raylets", "raylets"]


class Raylets:
    """The caller's side."""

    def __init__(self, process: subprocess.Popen[str]):
        self._process = process
        self.address = self._answer()

    def add(self) -> str:
        return self._order("add")

    def remove(self, node: str) -> None:
        self._order(f"remove {node}")

    def drain(self, node: str, seconds: int) -> None:
        self._order(f"drain {node} {seconds}")

    def hosts(self) -> list[str]:
        return self._order("hosts").split()

    def _order(self, order: str) -> str:
        assert self._process.stdin is not None
        print(order, file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("> "):
                return line[2:].strip()
        raise RuntimeError("the raylets are gone")


@contextmanager
def raylets(folder: Path, **more: str) -> Iterator[tuple[Raylets, dict[str, str]]]:
    """A head without CPUs, for a driver, and as many nodes as are added; the environment to join it
    with.
    """
    from tests.cluster.launching import environment  # Not in the process below: it brings torch.

    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 4}
    short = tempfile.mkdtemp(
        prefix="ray", dir="/tmp"
    )  # Ray's sockets do not fit below pytest's folders.
    own = environment(folder, RAY_TMPDIR=short, OMP_NUM_THREADS="1", **token, **more)
    process = subprocess.Popen(
        [sys.executable, __file__],
        env=own,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    with process:
        nodes = Raylets(process)
        yield nodes, own | {"RAY_ADDRESS": nodes.address}
        process.communicate("")
    shutil.rmtree(short, ignore_errors=True)


def main() -> None:
    import psutil
    import ray
    from ray.cluster_utils import Cluster
    from ray.core.generated import autoscaler_pb2

    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
    )
    nodes = {}
    print(f"> {cluster.address}", flush=True)
    for line in sys.stdin:
        order, *rest = line.split()
        if order == "add":
            node = cluster.add_node(num_cpus=1)
            nodes[node.node_id] = node
            answer = node.node_id
        elif order == "remove":
            cluster.remove_node(nodes.pop(rest[0]), allow_graceful=False)
            answer = "removed"
        elif order == "drain":
            deadline_ms = int((time.time() + float(rest[1])) * 1000)
            reason = autoscaler_pb2.DRAIN_NODE_REASON_PREEMPTION
            client = ray._raylet.GcsClient(address=cluster.address)
            accepted, why = client.drain_node(rest[0], reason, "a test", deadline_ms)
            answer = "drained" if accepted else f"refused: {why}"
        else:
            answer = " ".join(
                node_id for node_id, node in nodes.items() if _has_workers(node, psutil)
            )
        print(f"> {answer}", flush=True)
    cluster.shutdown()


def _has_workers(node: object, psutil: object) -> bool:
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)  # type: ignore[attr-defined]
    return any(
        "RayTrainWorker" in " ".join(child.cmdline()) for child in raylet.children(recursive=True)
    )


if __name__ == "__main__":
    main()
