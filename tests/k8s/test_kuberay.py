"""What the stand-ins for KubeRay's operator and the kubelet make of a manifest, before anything
runs.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest

from .environment import expand
from .kuberay import RayCluster
from .manifests import OVERLAYS, Object, render, schema_problems
from .policies import selects
from .quantities import quantity


def cluster_of(overlay: str) -> RayCluster:
    (job,) = (thing for thing in render(overlay) if thing["kind"] == "RayJob")
    unused: Any = None
    return RayCluster(unused, job)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_its_pods_fit_the_core_schemas(overlay: str) -> None:
    ray = cluster_of(overlay)
    pods = [ray.head_pod(), *ray.worker_pods(), ray.submitter_pod()]
    assert [schema_problems({"apiVersion": "v1", "kind": "Pod", **pod}) for pod in pods] == [
        []
    ] * len(pods)
    assert (
        len({pod["metadata"]["name"] for pod in pods})
        == len(pods)
        == (6 if "gpu" in overlay else 4)
    )


def _command(pod: Object) -> list[str]:
    (container,) = pod["spec"]["containers"]
    return container["args"][0].split()


def test_how_ray_starts() -> None:
    ray = cluster_of("overlays/gpu-kueue")
    common = ["--block", "--dashboard-agent-listen-port=52365"]
    limit = ["ulimit", "-n", "${RAY_START_ULIMIT_OPEN_FILES:-65536};", "ray", "start"]
    head = [
        "--dashboard-host=0.0.0.0",
        "--memory=8589934592",
        "--metrics-export-port=8080",
        "--num-cpus=0",
    ]
    assert _command(ray.head_pod()) == [*limit, "--head", *common, *head]
    address = f"--address={ray.name}-head-svc.lwo-dist.svc.cluster.local:6379"
    worker = ["--memory=68719476736", "--metrics-export-port=8080", "--num-cpus=8", "--num-gpus=1"]
    assert _command(next(ray.worker_pods())) == [*limit, address, *common, *worker]


def test_the_head_service_finds_the_head_alone() -> None:
    ray = cluster_of("base")
    selector = ray.service["spec"]["selector"].items()
    pods = [ray.head_pod(), *ray.worker_pods(), ray.submitter_pod(), cluster_of("base").head_pod()]
    assert [selector <= pod["metadata"]["labels"].items() for pod in pods] == [
        True,
        False,
        False,
        False,
        False,
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("$(A)/$(B)", "1/$(B)"),
        ("$$(A)", "$(A)"),
        ("$$$(A)", "$1"),
        ("$A ${A}", "$A ${A}"),
        ("$(A", "$(A"),
    ],
)
def test_variables_in_variables(text: str, expected: str) -> None:
    assert expand(text, {"A": "1"}) == expected


@pytest.mark.parametrize(
    ("operator", "values", "labels"),
    [
        ("In", ["a", "b"], [{"part": "a"}]),
        ("NotIn", ["a", "b"], [{"part": "c"}, {}]),
        ("Exists", None, [{"part": "a"}, {"part": "c"}]),
        ("DoesNotExist", None, [{}]),
    ],
)
def test_whom_a_policy_selects(
    operator: str, values: list[str] | None, labels: list[dict[str, str]]
) -> None:
    expression = {"key": "part", "operator": operator} | (
        {} if values is None else {"values": values}
    )
    every: list[dict[str, str]] = [{"part": "a"}, {"part": "c"}, {}]
    assert [own for own in every if selects({"matchExpressions": [expression]}, own)] == labels
    assert not selects({"matchLabels": {"other": "x"}, "matchExpressions": [expression]}, labels[0])


def test_quantities() -> None:
    assert [quantity(text) for text in ("500m", "2Gi", "1k", 4, "0.5")] == [
        Decimal("0.5"),
        2**31,
        1000,
        4,
        Decimal("0.5"),
    ]
    with pytest.raises(ValueError, match="'2GB' is no quantity"):
        quantity("2GB")
