"""Listening ports of the manifests' pods, and the traffic that the NetworkPolicies allow."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from .kuberay import RayCluster
from .manifests import Object, pods
from .policies import selects

__all__ = ["listeners", "missing_policies"]

PART = "lwo-dist/part"
ANY = "any port"
Door = tuple[int | str, str]
"""A port, and the peer."""

# Ray always opens these on the head: client server, and metrics of autoscaler and dashboard.
_RAY_HEAD = {10001, 44217, 44227}
_OPERATOR, _DNS = "operator of KubeRay", "kube-system"
_OF_OPERATOR = {
    "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kuberay-system"}},
    "podSelector": {"matchLabels": {"app.kubernetes.io/name": "kuberay-operator"}},
}
_OUTSIDE = "outside, but the metadata service"
_AMONG_RAY: set[Door] = {(ANY, "head"), (ANY, "worker")}
# In addition to probes from the node. Ray, gloo and NCCL choose their ports, so head and workers
# open all ports to each other.
_INGRESS: dict[str, set[Door]] = {
    "head": {*_AMONG_RAY, (8265, "submitter"), (8265, _OPERATOR)},
    "worker": _AMONG_RAY,
    "submitter": set(),
    "mlflow": {(5000, "head"), (5000, "worker")},
    "postgres": {(5432, "mlflow")},
}
_TO_DNS: set[Door] = {(53, _DNS)}
_EGRESS: dict[str, set[Door]] = {
    "head": {*_TO_DNS, *_AMONG_RAY, (5000, "mlflow"), (443, _OUTSIDE)},
    "worker": {*_TO_DNS, *_AMONG_RAY, (5000, "mlflow"), (443, _OUTSIDE)},
    "submitter": {*_TO_DNS, (8265, "head")},
    "mlflow": {*_TO_DNS, (5432, "postgres")},
    "postgres": _TO_DNS,
}


def listeners(objects: list[Object]) -> dict[str, set[int]]:
    """Part -> the fixed ports on which its pods listen: those that containers declare, those in
    their commands (including the commands that KubeRay makes), and those of probes.
    """
    found: dict[str, set[int]] = {}
    for part, pod in _pods(objects):
        ports = found.setdefault(part, set())
        for container in pod["spec"]["containers"]:
            ports |= {entry["containerPort"] for entry in container.get("ports", [])}
            words = " ".join([*container.get("command", []), *container.get("args", [])])
            if part != "submitter":  # It names a port of the head.
                ports |= {int(port) for port in re.findall(r"--[\w-]*port=(\d+)", words)}
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                port = container.get(probe, {}).get("httpGet", {}).get("port")
                ports |= {port} if isinstance(port, int) else set()
        if part == "head":
            ports |= _RAY_HEAD
    return found


def missing_policies(objects: list[Object]) -> Iterator[str]:
    """Differences between the policies and the needed traffic; open ports without a listener."""
    heard = listeners(objects)
    for part, pod in _pods(objects):
        ingress = _doors(objects, pod, "ingress")
        for port in sorted(heard[part]):
            if not {port, ANY} & {opened for opened, _ in ingress}:
                yield f"{part}:{port}: no NetworkPolicy covers this port"
        for port, _ in ingress:
            if port != ANY and port not in heard[part]:
                yield f"{part}:{port}: open, but nothing listens there"
        wanted = {
            door for door in _INGRESS.get(part, set()) if door[1] in heard or door[1] == _OPERATOR
        }
        yield from _differences(f"into {part}", wanted, ingress)
        outside = _OUTSIDE in {peer for _, peer in _doors(objects, pod, "egress")}
        wanted = {
            door
            for door in _EGRESS.get(part, set())
            if door[1] in heard or door[1] == _DNS or (door[1] == _OUTSIDE and outside)
        }
        yield from _differences(f"out of {part}", wanted, _doors(objects, pod, "egress"))


def _differences(what: str, wanted: set[Door], there: set[Door]) -> Iterator[str]:
    for port, peer in sorted(wanted - there, key=str):
        yield f"{what}: {port}, {peer}: needed, but closed"
    for port, peer in sorted(there - wanted, key=str):
        yield f"{what}: {port}, {peer}: open, but not needed"


def _pods(objects: list[Object]) -> Iterator[tuple[str, Object]]:
    """Part -> one of its pods; those of a RayJob as KubeRay creates them."""
    for name, pod in pods(objects):
        if not name.startswith("RayJob"):
            yield pod["metadata"]["labels"].get(PART, name), pod
    unused: Any = None
    for job in (thing for thing in objects if thing["kind"] == "RayJob"):
        ray = RayCluster(unused, job)
        yield "head", ray.head_pod()
        yield "worker", next(ray.worker_pods())
        yield "submitter", ray.submitter_pod()


def _doors(objects: list[Object], pod: Object, direction: str) -> set[Door]:
    """The ports of a pod that policies open, and their peers."""
    labels = pod["metadata"]["labels"]
    peers_key = {"ingress": "from", "egress": "to"}[direction]
    found: set[Door] = set()
    for thing in objects:
        if thing["kind"] == "NetworkPolicy" and selects(thing["spec"]["podSelector"], labels):
            for rule in thing["spec"].get(direction, []):
                peers = {
                    name for peer in rule.get(peers_key) or [{}] for name in _names(objects, peer)
                }
                found |= {(port, peer) for port in _ports(rule, pod) for peer in peers}
    return found


def _ports(rule: Object, pod: Object) -> Iterator[int | str]:
    """Port numbers; a range or another protocol as written, which matches no wanted door."""
    named = {
        entry["name"]: entry["containerPort"]
        for container in pod["spec"]["containers"]
        for entry in container.get("ports", [])
        if "name" in entry
    }
    for entry in rule.get("ports") or [{}]:
        port = entry.get("port", ANY)
        port = named.get(port, port)
        plain = entry.get("protocol", "TCP") == "TCP" or port == 53
        yield port if plain and "endPort" not in entry else str(entry)


def _names(objects: list[Object], peer: Object) -> Iterator[str]:
    if "ipBlock" in peer:
        usual = {"cidr": "0.0.0.0/0", "except": ["169.254.169.254/32"]}
        yield _OUTSIDE if peer["ipBlock"] == usual else str(peer["ipBlock"])
    elif peer == {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": _DNS}}}:
        yield _DNS
    elif "namespaceSelector" in peer:
        yield _OPERATOR if peer == _OF_OPERATOR else str(peer)
    elif peer.get("podSelector"):
        parts: dict[str, list[bool]] = defaultdict(list)
        for part, pod in _pods(objects):
            parts[part].append(selects(peer["podSelector"], pod["metadata"]["labels"]))
        yield from (part for part, chosen in parts.items() if any(chosen))
    else:
        yield "everybody"
