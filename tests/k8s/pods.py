"""A pod as it is written: what its containers see and run, its probes, its end."""

from __future__ import annotations

import contextlib
import http.client
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tests.hosts import Host

from .container import Container, Mount
from .environment import environment_of, expand
from .manifests import Object
from .quantities import quantity

if TYPE_CHECKING:
    from .kubelet import Kubelet

__all__ = ["Deletion", "Pod"]


@dataclass(frozen=True)
class Deletion:
    hook: subprocess.CompletedProcess[str] | None
    """The preStop hook; its output is text."""
    killed: bool
    """Whether SIGKILL was needed when the grace period was over."""
    seconds: float


class Pod:
    def __init__(self, kubelet: Kubelet, thing: Object, host: Host, folder: Path):
        self.kubelet, self.thing, self.host, self.folder = kubelet, thing, host, folder
        self.name: str = thing["metadata"]["name"]
        self.labels: dict[str, str] = thing["metadata"].get("labels", {})
        self.spec: Object = thing["spec"]
        self.address = host.address
        self.ready = False
        self.hosts_file = folder / "hosts"
        self._made: list[Container] = []
        (self._main,) = self.spec["containers"]
        self._starting = threading.Thread(target=self._start, name=self.name, daemon=True)
        self._problem: BaseException | None = None
        self._removed = False

    def start(self) -> None:
        self._starting.start()

    def _start(self) -> None:
        try:
            for spec in self.spec.get("initContainers", []):
                container = self._container(spec)
                if code := container.wait():
                    raise RuntimeError(
                        f"{self.name}: init container {spec['name']}: {code}; its"
                        f" log:\n{container.log}"
                    )
            self._container(self._main)
        except BaseException as problem:
            self._problem = problem

    def _container(self, spec: Object) -> Container:
        image = self.kubelet.image(spec["image"])
        environment = environment_of(self, spec, image.environment)
        entrypoint = spec.get("command", image.entrypoint)
        arguments = spec.get("args", [] if "command" in spec else image.command)
        limit = spec.get("resources", {}).get("limits", {}).get("memory")
        container = Container(
            name=spec["name"],
            image=image,
            command=[expand(word, environment) for word in [*entrypoint, *arguments]],
            environment=environment,
            mounts=[*self._network_files(), *self._mounts(spec)],
            security=self.spec.get("securityContext", {}) | spec.get("securityContext", {}),
            namespace=self.host.namespace,
            hostname=self.name,
            folder=self.folder / "containers" / spec["name"],
            memory=None if limit is None else int(quantity(limit)),
        )
        if self._removed:
            raise RuntimeError(f"{self.name} was removed")
        self._made.append(container)
        container.start()
        return container

    def _network_files(self) -> Iterator[Mount]:
        (self.folder / "resolv.conf").touch()
        yield Mount("/etc/hosts", self.hosts_file)
        yield Mount("/etc/resolv.conf", self.folder / "resolv.conf")

    def _mounts(self, spec: Object) -> Iterator[Mount]:
        volumes = {volume["name"]: volume for volume in self.spec.get("volumes", [])}
        for mount in spec.get("volumeMounts", []):
            volume, path, read_only = (
                volumes[mount["name"]],
                mount["mountPath"],
                mount.get("readOnly", False),
            )
            if "persistentVolumeClaim" in volume:
                yield Mount(
                    path,
                    self._owned(self.kubelet.claim(volume["persistentVolumeClaim"]["claimName"])),
                )
            elif "configMap" in volume:
                yield Mount(
                    path, self.kubelet.config_map(volume["configMap"]["name"]), read_only=True
                )
            elif volume["emptyDir"].get("medium") == "Memory":
                # One for each container; they share it in a real pod.
                yield Mount(path, None, read_only, int(quantity(volume["emptyDir"]["sizeLimit"])))
            else:
                yield Mount(path, self._owned(self.folder / "volumes" / volume["name"]), read_only)

    def _owned(self, folder: Path) -> Path:
        """`folder`, which the pod's fsGroup may write."""
        if not folder.is_dir():
            folder.mkdir(parents=True)
            group = self.spec.get("securityContext", {}).get("fsGroup")
            subprocess.run(["chown", f"root:{group or 0}", folder], check=True)
            folder.chmod(0o2775 if group else 0o777)
        return folder

    @property
    def container(self) -> Container:
        """The pod's container; waits for the init containers before it."""
        self._starting.join()
        if self._problem is not None:
            raise self._problem
        return self._made[-1]

    @property
    def log(self) -> str:
        return "".join(f"--- {container.name}\n{container.log}" for container in self._made)

    def exec(self, *command: str, timeout: float | None = None) -> subprocess.CompletedProcess[str]:
        return self.container.exec(*command, timeout=timeout)

    def port(self, name: str | int) -> int:
        """The number of a port, which may be named."""
        named = {entry.get("name"): entry["containerPort"] for entry in self._main.get("ports", [])}
        return int(named.get(name, name))

    def probe(self, kind: str) -> bool:
        """Whether the startup, readiness or liveness probe is answered; one that is not there
        is.
        """
        if (probe := self._main.get(f"{kind}Probe")) is None:
            return True
        timeout = probe.get("timeoutSeconds", 1)
        if "exec" in probe:
            try:
                return self.exec(*probe["exec"]["command"], timeout=timeout).returncode == 0
            except subprocess.TimeoutExpired:
                return False
        port = self.port(probe["httpGet"]["port"])
        connection = http.client.HTTPConnection(self.address, port, timeout=timeout)
        try:
            connection.request("GET", probe["httpGet"]["path"])
            return 200 <= connection.getresponse().status < 400
        except OSError:
            return False
        finally:
            connection.close()

    def wait_ready(self) -> None:
        """Until the startup probe and then the readiness probe succeed; asked more often than a
        kubelet would.
        """
        startup = self._main.get("startupProbe", {})
        container = self.container
        deadline = time.monotonic() + startup.get("failureThreshold", 3) * startup.get(
            "periodSeconds", 10
        )
        for kind in ("startup", "readiness"):
            while not self.probe(kind):
                if not container.runs or time.monotonic() > deadline:
                    raise RuntimeError(
                        f"{self.name}: no answer to the {kind} probe; its log:\n{self.log}"
                    )
                time.sleep(0.5)
        self.ready = True
        self.kubelet.refresh()

    def wait(self, timeout: float) -> int:
        return self.container.wait(timeout)

    def delete(self) -> Deletion:
        """The preStop hook, SIGTERM, and when the grace period is over SIGKILL."""
        start = time.monotonic()
        grace = self.spec.get("terminationGracePeriodSeconds", 30)
        hook, killed, container = None, False, self.container
        command = self._main.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command")
        if command and container.runs:
            with contextlib.suppress(subprocess.TimeoutExpired):
                hook = container.exec(*command, timeout=grace)
        if container.runs:
            container.terminate()
            try:
                container.wait(max(2.0, start + grace - time.monotonic()))
            except subprocess.TimeoutExpired:
                killed = True
        self.kubelet.forget(self)
        return Deletion(hook, killed, time.monotonic() - start)

    def over_limit(self) -> list[str]:
        """The volumes for which a kubelet would evict this pod."""
        limits = {
            volume["name"]: quantity(volume["emptyDir"]["sizeLimit"])
            for volume in self.spec.get("volumes", [])
            if "sizeLimit" in volume.get("emptyDir", {})
            and (self.folder / "volumes" / volume["name"]).is_dir()
        }
        used = {name: _size(self.folder / "volumes" / name) for name in limits}
        return [
            f"{name}: {used[name]} bytes of {limits[name]}"
            for name in limits
            if used[name] > limits[name]
        ]

    def remove(self) -> None:
        self._removed = True
        starting = self._starting.is_alive()
        while True:
            for container in self._made:
                container.remove()
            if not starting:
                return
            self._starting.join(0.2)
            starting = self._starting.is_alive()


def _size(folder: Path) -> int:
    return int(
        subprocess.run(["du", "-sb", folder], capture_output=True, text=True).stdout.split()[0]
    )
