"""The manifests' pods as written, without Kubernetes: pods.py is the kubelet, kuberay.py the operator."""

from __future__ import annotations

import re
import secrets as random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.hosts import why_not

from .container import Image
from .images import lwo_dist_image, postgres_image
from .kuberay import RayCluster
from .manifests import K8S, Object, render
from .pods import Kubelet, Pod, kubelet

if (_why := why_not()) is not None:
    pytest.skip(_why, allow_module_level=True)

UID = 1000


def secrets() -> dict[str, dict[str, str]]:
    """Those that README.md has one make, with values of this test's; without the optional hub's token."""
    text = (K8S / "README.md").read_text().replace("\\\n", " ")
    found = {}
    for name, rest in re.findall(r"create secret generic (\S+) (.*)", text):
        pairs = re.findall(r"--from-literal=([\w-]+)=(\S+)", rest)
        found[name] = {key: random.token_hex(16) if "$" in value else value for key, value in pairs}
    del found["lwo-dist-hub"]
    return found


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    return lwo_dist_image(tmp_path_factory.mktemp("image") / "root")


def rayjob(objects: list[Object]) -> Object:
    (job,) = (thing for thing in objects if thing["kind"] == "RayJob")
    return job


def _as_probe(pod: Object, script: str) -> Object:
    """The pod, with a script in place of what its container does."""
    (container,) = pod["spec"]["containers"]
    container["command"], container["args"] = ["sh", "-c", script], []
    pod["spec"].pop("initContainers", None)
    return pod


def test_only_the_volumes_can_be_written(image: Image) -> None:
    objects = render("overlays/cpu-smoke")
    places = "/ /usr /etc /etc/lwo-dist /opt/lwo /proc /sys /dev /tmp /runs /scratch /dev/shm /mlflow /etc/mlflow"
    probe = f'id -u; for place in {places}; do if (: >"$place/probe") 2>/dev/null; then echo "$place"; fi; done; true'
    with kubelet(objects, lambda _: image, secrets()) as node:
        cluster = RayCluster(node, rayjob(objects))
        pods = [cluster.head_pod(), next(cluster.worker_pods()), cluster.submitter_pod()]
        pods += [node.pod_of(thing) for thing in objects if thing["kind"] == "Deployment"]
        found = {}
        for pod in [node.run(_as_probe(pod, probe)) for pod in pods]:
            assert pod.wait(60) == 0, pod.log
            uid, *found[pod.labels["lwo-dist/part"]] = pod.container.log.split()
            assert uid == str(UID)
    of_ray = ["/tmp", "/runs", "/scratch", "/dev/shm"]
    # The runtime gives every container a /dev/shm of 64 MB.
    assert found == {
        "head": of_ray, "worker": of_ray, "submitter": ["/tmp", "/dev/shm"], "mlflow": ["/tmp", "/dev/shm", "/mlflow"]
    }  # fmt: skip
