"""What KubeRay's operator (v1.7) refuses though its CRD allows it: its validation.go and
features.go.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from .manifests import Object

__all__ = ["OPERATOR_RULES"]

Rule = Callable[[list[Object]], Iterator[str]]


def _jobs(objects: list[Object]) -> Iterator[dict[str, Any]]:
    return (thing for thing in objects if thing["kind"] == "RayJob")


def _groups(job: Object) -> list[dict[str, Any]]:
    cluster = job["spec"]["rayClusterSpec"]
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def short_name(objects: list[Object]) -> Iterator[str]:
    for job in _jobs(objects):
        name = job["metadata"]["name"]
        if len(name) > 47 or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
            yield f"{name}: at most 47 characters, a DNS-1035 label"


def token_needs_ray_2_52(objects: list[Object]) -> Iterator[str]:
    for job in _jobs(objects):
        cluster = job["spec"]["rayClusterSpec"]
        version = tuple(map(int, cluster["rayVersion"].split(".")[:2]))
        if cluster.get("authOptions", {}).get("mode") == "token" and version < (2, 52):
            yield f"rayVersion {cluster['rayVersion']}: authOptions.mode token needs 2.52"


def no_kubernetes_token_auth(objects: list[Object]) -> Iterator[str]:
    for job in _jobs(objects):
        if job["spec"]["rayClusterSpec"].get("authOptions", {}).get("enableK8sTokenAuth"):
            yield "authOptions.enableK8sTokenAuth is refused for a RayJob"


def no_alpha_gates(objects: list[Object]) -> Iterator[str]:
    for job in _jobs(objects):
        cluster = job["spec"]["rayClusterSpec"]
        for field in ("networkPolicy", "tlsOptions"):
            if field in cluster:
                yield f"{field} needs an alpha gate that is off by default"
        if cluster.get("gcsFaultToleranceOptions", {}).get("backend") == "rocksdb":
            yield (
                "gcsFaultToleranceOptions.backend rocksdb needs an alpha gate that is off by"
                " default"
            )


def shut_down_before_ttl_or_suspend(objects: list[Object]) -> Iterator[str]:
    for job in _jobs(objects):
        if not job["spec"].get("shutdownAfterJobFinishes"):
            for field in ("ttlSecondsAfterFinished", "suspend"):
                if job["spec"].get(field):
                    yield f"{field} needs shutdownAfterJobFinishes"


def retries_need_a_cluster_of_their_own(objects: list[Object]) -> Iterator[str]:
    for job in _jobs(objects):
        spec = job["spec"]
        if spec.get("backoffLimit") and (
            spec.get("clusterSelector") or spec.get("submissionMode") == "InteractiveMode"
        ):
            yield "backoffLimit goes neither with clusterSelector nor with InteractiveMode"


def worker_bounds(objects: list[Object]) -> Iterator[str]:
    for job in _jobs(objects):
        cluster = job["spec"]["rayClusterSpec"]
        for group in cluster["workerGroupSpecs"]:
            bounds = group.get("minReplicas"), group.get("maxReplicas")
            if not cluster.get("enableInTreeAutoscaling") and None in bounds:
                yield (
                    f"{group['groupName']}: minReplicas and maxReplicas are required without"
                    " autoscaling"
                )


def resources_said_once(objects: list[Object]) -> Iterator[str]:
    for job in _jobs(objects):
        for group in _groups(job):
            twice = {"num-cpus", "num-gpus", "memory", "resources"} & group.get(
                "rayStartParams", {}
            ).keys()
            if group.get("resources") and twice:
                yield (
                    f"resources are in the group and in rayStartParams ({', '.join(sorted(twice))})"
                )


def labels_in_the_group(objects: list[Object]) -> Iterator[str]:
    for job in _jobs(objects):
        if any("labels" in group.get("rayStartParams", {}) for group in _groups(job)):
            yield "labels belong into the group, not into rayStartParams"


def sidecar_submits_itself(objects: list[Object]) -> Iterator[str]:
    for job in _jobs(objects):
        if job["spec"].get("submissionMode") == "SidecarMode":
            for field in ("submitterPodTemplate", "submitterConfig", "clusterSelector"):
                if field in job["spec"]:
                    yield f"SidecarMode takes no {field}"


OPERATOR_RULES: tuple[Rule, ...] = (
    short_name,
    token_needs_ray_2_52,
    no_kubernetes_token_auth,
    no_alpha_gates,
    shut_down_before_ttl_or_suspend,
    retries_need_a_cluster_of_their_own,
    worker_bounds,
    resources_said_once,
    labels_in_the_group,
    sidecar_submits_itself,
)
