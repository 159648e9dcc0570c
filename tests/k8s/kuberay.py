"""KubeRay's operator for tests: what v1.7 makes of a RayJob in K8sJobMode, with the flags of its
chart.

It mirrors, in ray-operator/controllers/ray: common/pod.go (DefaultHeadPodTemplate,
DefaultWorkerPodTemplate, BuildPod, setMissingRayStartParams, generateRayStartCommand,
convertParamMap, setContainerEnvVars, setInitContainerEnvVars, SetContainerTokenAuthEnvVars,
labelPod, initLivenessAndReadinessProbe), common/service.go (BuildServiceForHeadPod), common/job.go
(BuildJobSubmitCommand) and rayjob_controller.go (configureSubmitterContainer, Reconcile). Left out
is what no manifest here asks for: autoscaling, TLS, fault tolerance of the GCS, history, the
default /dev/shm.
"""

from __future__ import annotations

import copy
import json
import math
import secrets
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

from .kubelet import Kubelet
from .manifests import Object
from .pods import Deletion, Pod
from .quantities import quantity

__all__ = ["RayCluster"]

GCS_PORT, DASHBOARD_PORT, AGENT_PORT, METRICS_PORT = "6379", 8265, "52365", "8080"
SHELL = ["/bin/bash", "-c", "--"]


class RayCluster:
    """One try of a RayJob: a cluster of its own and the job on it."""

    def __init__(self, kubelet: Kubelet, job: Object):
        self.kubelet, self.job, self.spec = kubelet, job, job["spec"]["rayClusterSpec"]
        self.namespace = job["metadata"]["namespace"]
        self.name = f"{job['metadata']['name']}-{secrets.token_hex(3)[:5]}"
        self.submission = f"{job['metadata']['name']}-{secrets.token_hex(3)[:5]}"
        self.domain = f"{self.name}-head-svc.{self.namespace}.svc.cluster.local"
        self.service = _head_service(self.name, self.namespace)
        self.workers: list[Pod] = []
        self._made: list[Pod] = []

    def start(self) -> None:
        """Head and workers, until all of them are ready; the operator submits only then."""
        self.kubelet.objects.append(self.service)
        self.head = self._run(self.head_pod())
        self.workers = [self._run(pod) for pod in self.worker_pods()]
        for pod in (self.head, *self.workers):
            pod.wait_ready()

    def submit(self) -> Pod:
        return self._run(self.submitter_pod())

    def _run(self, pod: Object) -> Pod:
        self._made.append(self.kubelet.run(pod))
        return self._made[-1]

    def status(self, token: str | None = None) -> str:
        """The job's, asked as the operator asks: of the head's dashboard, with the token."""
        try:
            job = self._ask(f"/api/jobs/{self.submission}", token)
        except urllib.error.HTTPError as error:
            return str(error.code)
        return f"{job['status']}: {job['message']}"

    def actors(self) -> list[Any]:
        """All that there are or were."""
        return list(self._ask("/logical/actors")["data"]["actors"].values())

    def _ask(self, path: str, token: str | None = None) -> Any:
        if token is None:
            token = self.kubelet.secrets[self.spec["authOptions"]["secretName"]]["auth_token"]
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        request = urllib.request.Request(
            f"http://{self.head.address}:{DASHBOARD_PORT}{path}", headers=headers
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def pods(self) -> list[Pod]:
        """Those that are left of it, its submitters too."""
        return [pod for pod in self._made if pod in self.kubelet.pods]

    def delete(self) -> list[Deletion]:
        """Before a retry, or at the end."""
        deletions = self.kubelet.delete(self.pods())
        self.kubelet.objects.remove(self.service)
        return deletions

    def remove(self) -> None:
        """Without a notice."""
        for pod in self.pods():
            self.kubelet.forget(pod)
        self.kubelet.objects.remove(self.service)

    def head_pod(self) -> Object:
        group = self.spec["headGroupSpec"]
        given: dict[str, str] = {"dashboard-host": "0.0.0.0"}
        pod = self._pod(group, "head", "headgroup", given)
        pod["metadata"]["name"] = f"{self.name}-head"
        return pod

    def worker_pods(self) -> Iterator[Object]:
        for group in self.spec["workerGroupSpecs"]:
            for _ in range(group["replicas"]):
                given = {"address": f"{self.domain}:{GCS_PORT}"}
                pod = self._pod(group, "worker", group["groupName"], given)
                pod["metadata"]["name"] = (
                    f"{self.name}-{group['groupName']}-worker-{secrets.token_hex(3)[:5]}"
                )
                yield pod

    def _pod(self, group: Object, kind: str, group_name: str, given: dict[str, str]) -> Object:
        pod = copy.deepcopy(group["template"])
        container = pod["spec"]["containers"][0]
        params = given | {
            "metrics-export-port": METRICS_PORT,
            "dashboard-agent-listen-port": AGENT_PORT,
        }
        params |= group.get("rayStartParams", {}) | {"block": "true"}
        for name, value in _resources(container["resources"]).items():
            params.setdefault(name, value)
        start = f"ray start {'--head ' if kind == 'head' else ''}{_flags(params)}"
        if kind == "worker":
            pod["spec"].setdefault("initContainers", []).append(self._wait_for_gcs(container))
        for waiting in pod["spec"].get("initContainers", []):
            waiting["env"] += [
                _env("FQ_RAY_IP", self.domain),
                _env("RAY_IP", self.domain.split(".")[0]),
            ]
            waiting["env"] += self._token()
        before = " ".join([*container.get("command", []), *container.get("args", [])])
        limit = "ulimit -n ${RAY_START_ULIMIT_OPEN_FILES:-65536}"
        container["command"] = SHELL
        container["args"] = [f"{before} && {limit}; {start}" if before else f"{limit}; {start}"]
        # The token comes first there, then the rest.
        container.setdefault("env", []).extend([*self._token(), *self._environment(kind, start)])
        names = {entry["name"] for entry in container["env"]}
        assert len(names) == len(container["env"]), "a variable that KubeRay sets too"
        for probe in ("livenessProbe", "readinessProbe"):
            container.setdefault(
                probe, {"httpGet": {"path": "/api/healthz", "port": int(AGENT_PORT)}}
            )
        pod["metadata"] = {
            "namespace": self.namespace,
            "labels": self._labels(kind, group_name, pod),
        }
        return pod

    def _labels(self, kind: str, group: str, pod: Object) -> dict[str, str]:
        fixed = {"ray.io/cluster": self.name, "ray.io/node-type": kind, "ray.io/group": group}
        usual = _selector() | {
            "ray.io/is-ray-node": "yes",
            "ray.io/identifier": f"{self.name}-{kind}",
        }
        return usual | pod["metadata"].get("labels", {}) | fixed

    def _wait_for_gcs(self, ray: Object) -> Object:
        check = f"ray health-check --address {self.domain}:{GCS_PORT}"
        waits = (
            f'until {check} >/dev/null 2>&1; do echo "$SECONDS seconds: waiting for GCS to be'
            ' ready."; sleep 5; done'
        )
        size = {"cpu": "200m", "memory": "256Mi"}
        waiting = {
            key: copy.deepcopy(ray[key])
            for key in ("image", "securityContext", "volumeMounts", "env")
        }
        resources = {"limits": size, "requests": size}
        return waiting | {
            "name": "wait-gcs-ready",
            "command": SHELL,
            "args": [waits],
            "resources": resources,
        }

    def _environment(self, kind: str, start: str) -> list[Object]:
        address = "127.0.0.1" if kind == "head" else self.domain
        made = [
            _field("RAY_CLUSTER_NAME", "metadata.labels['ray.io/cluster']"),
            _field("RAY_CLUSTER_NAMESPACE", "metadata.namespace"),
            _field("RAY_CLOUD_INSTANCE_ID", "metadata.name"),
            _field("RAY_NODE_TYPE_NAME", "metadata.labels['ray.io/group']"),
            _env("KUBERAY_GEN_RAY_START_CMD", start),
            _env("RAY_PORT", GCS_PORT),
            _env("RAY_ADDRESS", f"{address}:{GCS_PORT}"),
            _env("RAY_USAGE_STATS_KUBERAY_IN_USE", "1"),
            _env("RAY_DASHBOARD_ENABLE_K8S_DISK_USAGE", "1"),
        ]
        if kind == "head":
            return [
                *made,
                _env("RAY_USAGE_STATS_EXTRA_TAGS", "kuberay_version=v1.7.0;kuberay_crd=RayJob"),
            ]
        return [_env("FQ_RAY_IP", address), _env("RAY_IP", address.split(".")[0]), *made]

    def _token(self) -> list[Object]:
        options = self.spec.get("authOptions", {})
        if options.get("mode") != "token":
            return []
        reference = {"name": options.get("secretName") or self.name, "key": "auth_token"}
        token = {"name": "RAY_AUTH_TOKEN", "valueFrom": {"secretKeyRef": reference}}
        return [_env("RAY_AUTH_MODE", "token"), token]

    def submitter_pod(self) -> Object:
        pod = copy.deepcopy(self.job["spec"]["submitterPodTemplate"])
        container = pod["spec"]["containers"][0]
        address = f"{self.domain}:{DASHBOARD_PORT}"
        if "command" not in container:
            container["command"], container["args"] = (
                ["/bin/bash", "-ce", "--"],
                [self._submit(f"http://{address}")],
            )
        container["env"] += [_env("PYTHONUNBUFFERED", "1"), _env("RAY_DASHBOARD_ADDRESS", address)]
        container["env"] += [_env("RAY_JOB_SUBMISSION_ID", self.submission), *self._token()]
        name = f"{self.job['metadata']['name']}-{secrets.token_hex(3)[:5]}"
        pod["metadata"] |= {"name": name, "namespace": self.namespace}
        return pod

    def _submit(self, url: str) -> str:
        # Submits once, however often the pod starts, and follows the log, whose end is no word on
        # how the job ended: `ray job logs --follow` exits with 0 after a failure too. The operator
        # asks for the job's status.
        asks = (
            f"import urllib.request; r=urllib.request.urlopen('{url}/api/gcs_healthz',"
            " timeout=10); "
        )
        healthy = f"python -c \"{asks}exit(0 if b'success' in r.read() else 1)\" >/dev/null 2>&1"
        waits = (
            f'until {healthy} ; do echo "Waiting for Ray Dashboard GCS to become healthy at {url}'
            ' ..." ; sleep 2 ; done'
        )
        known = f"ray job status --address {url} {self.submission} >/dev/null 2>&1"
        entrypoint = self.job["spec"]["entrypoint"].strip()
        submit = (
            f"ray job submit --address {url} --no-wait --submission-id {self.submission} --"
            f" {entrypoint}"
        )
        follow = f"ray job logs --address {url} --follow {self.submission}"
        return f"{waits} ; if ! {known} ; then {submit} ; fi ; {follow}"


def _head_service(cluster: str, namespace: str) -> Object:
    selector = _selector() | {"ray.io/cluster": cluster, "ray.io/node-type": "head"}
    spec = {"clusterIP": "None", "publishNotReadyAddresses": True, "ports": []}
    selector["ray.io/identifier"] = f"{cluster}-head"
    metadata = {"name": f"{cluster}-head-svc", "namespace": namespace}
    return {"kind": "Service", "metadata": metadata, "spec": {**spec, "selector": selector}}


def _selector() -> dict[str, str]:
    return {"app.kubernetes.io/name": "kuberay", "app.kubernetes.io/created-by": "kuberay-operator"}


def _resources(resources: Object) -> dict[str, str]:
    limits, requests = resources.get("limits", {}), resources.get("requests", {})
    found = {}
    if cpu := limits.get("cpu", requests.get("cpu")):
        found["num-cpus"] = str(math.ceil(quantity(cpu)))
    if memory := limits.get("memory"):
        found["memory"] = str(math.ceil(quantity(memory)))
    gpus = [amount for name, amount in limits.items() if name.endswith("gpu")]
    if gpus:
        found["num-gpus"] = str(gpus[0])
    return found


def _flags(params: dict[str, str]) -> str:
    switch = {"true": True, "false": False}
    flags = ""
    for name, value in sorted(params.items()):
        special = name in ("log-color", "include-dashboard", "include-log-monitor")
        if value.lower() not in switch or special:
            flags += f" --{name}={value} "
        elif switch[value.lower()]:
            flags += f" --{name} "
    return flags


def _env(name: str, value: str) -> Object:
    return {"name": name, "value": value}


def _field(name: str, path: str) -> Object:
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}
