"""A kubelet for tests: runs pods as they are written, each with a network, mounts, processes and a
user of its own.

Needs root and Debian's iproute2, util-linux and nftables. Not done: CPU limits, seccomp, restarts
of a container that ended, eviction (see `Pod.over_limit`); there is no DNS.
"""

from __future__ import annotations

import contextlib
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.hosts import Host, bridge

from . import policies, services
from .container import Image
from .manifests import Object
from .pods import Deletion, Pod

__all__ = ["Kubelet", "Secrets", "kubelet"]

Secrets = Mapping[str, Mapping[str, str]]


class Kubelet:
    """One node: what pods refer to, and their network."""

    def __init__(
        self,
        objects: list[Object],
        images: Callable[[str], Image],
        secrets: Secrets,
        net: int,
        folder: Path,
    ):
        self.objects, self.image, self.secrets = objects, images, secrets
        self.pods: list[Pod] = []
        self._net, self._folder, self._numbers = net, folder, iter(range(1, 254))
        self._lock, self._links = threading.RLock(), dict[str, contextlib.ExitStack]()

    def run(self, thing: Object) -> Pod:
        with self._lock:
            host = Host(self._net, next(self._numbers), self._folder, self._folder)
            folder = self._folder / "pods" / host.namespace  # A name may come again.
            folder.mkdir(parents=True)
            pod, links = Pod(self, thing, host, folder), contextlib.ExitStack()
            links.enter_context(host.linked(self.gateway))
            links.callback(pod.remove)
            self._links[pod.name] = links
            self.pods.append(pod)
            self.refresh()
        pod.start()
        return pod

    @property
    def gateway(self) -> str:
        return f"10.77.{self._net}.254"

    def deploy(self) -> None:
        """The Deployments and StatefulSets, a pod each, until they are ready."""
        wanted = [thing for thing in self.objects if thing["kind"] in ("Deployment", "StatefulSet")]
        pods = [self.run(self.pod_of(thing)) for thing in wanted]
        with ThreadPoolExecutor(len(pods)) as threads:  # One may wait for another.
            list(threads.map(Pod.wait_ready, pods))

    def pod_of(self, thing: Object) -> Object:
        """The first pod of a Deployment or StatefulSet."""
        template, name = thing["spec"]["template"], f"{thing['metadata']['name']}-0"
        claims = [
            claim["metadata"]["name"] for claim in thing["spec"].get("volumeClaimTemplates", [])
        ]
        volumes = [
            {"name": claim, "persistentVolumeClaim": {"claimName": f"{claim}-{name}"}}
            for claim in claims
        ]
        spec = template["spec"] | {"volumes": [*template["spec"].get("volumes", []), *volumes]}
        return {
            "metadata": (
                template["metadata"] | {"name": name, "namespace": thing["metadata"]["namespace"]}
            ),
            "spec": spec,
        }

    def pod(self, part: str) -> Pod:
        """The only pod with the label lwo-dist/part = `part`."""
        (found,) = (pod for pod in self.pods if pod.labels["lwo-dist/part"] == part)
        return found

    def claim(self, name: str) -> Path:
        return self._folder / "claims" / name

    def config_map(self, name: str) -> Path:
        (thing,) = (
            t for t in self.objects if t["kind"] == "ConfigMap" and t["metadata"]["name"] == name
        )
        folder = self._folder / "config-maps" / name
        folder.mkdir(parents=True, exist_ok=True)
        for key, text in thing["data"].items():
            (folder / key).write_text(text)
        return folder

    def refresh(self) -> None:
        """Tell every pod which Services there are, and who may talk to it."""
        with self._lock:
            names = services.names(self.objects, self.pods, self._net)
            for pod in self.pods:
                pod.hosts_file.write_text(f"127.0.0.1 localhost\n{pod.address} {pod.name}\n{names}")
            services.enforce(self.objects, self.pods, self._net)
            policies.enforce(self.objects, self.pods, self.gateway)

    def delete(self, pods: list[Pod]) -> list[Deletion]:
        """All at once."""
        with ThreadPoolExecutor(len(pods)) as threads:
            return list(threads.map(Pod.delete, pods))

    def forget(self, pod: Pod) -> None:
        with self._lock:
            self.pods.remove(pod)
            self._links.pop(pod.name).close()
            self.refresh()

    def close(self) -> None:
        with contextlib.ExitStack() as stack:
            for links in self._links.values():
                stack.callback(links.close)


@contextlib.contextmanager
def kubelet(
    objects: list[Object], images: Callable[[str], Image], secrets: Secrets
) -> Iterator[Kubelet]:
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kubelet-")))
        folder.chmod(0o755)
        node = Kubelet(objects, images, secrets, stack.enter_context(bridge()), folder)
        stack.callback(node.close)
        yield node
