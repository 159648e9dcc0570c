"""The Kubernetes manifests: each overlay renders, fits the schemas, the operator and our policy."""

from __future__ import annotations

import fnmatch
import json
import os
import re
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import pytest
import yaml

from lwo_dist.config.reading import load_config
from tests import sizes

from .manifests import K8S, OVERLAYS, Object, build, containers, pods, render, schema_problems
from .operator_rules import OPERATOR_RULES
from .policy_rules import POLICY_RULES
from .quantities import quantity

RULES = (*OPERATOR_RULES, *POLICY_RULES)
DIGEST = f"sha256:{'0123456789abcdef' * 4}"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_keeps_every_rule(overlay: str) -> None:
    objects = render(overlay)
    assert {rule.__name__: found for rule in RULES if (found := list(rule(objects)))} == {}
    names = [(thing["kind"], thing["metadata"]["name"]) for thing in objects]
    assert len(names) == len(set(names))


def test_components_go_together(tmp_path: Path) -> None:
    """An overlay of one's own, as the README describes it."""
    k8s = Path(os.path.relpath(K8S, tmp_path))
    components = [f"{k8s}/components/{folder.name}" for folder in (K8S / "components").iterdir()]
    own = {"resources": [f"{k8s}/base"], "components": components}
    (tmp_path / "kustomization.yaml").write_text(json.dumps(own))
    objects = build(tmp_path)
    assert {rule.__name__: found for rule in RULES if (found := list(rule(objects)))} == {}
    apart = [
        {(t["kind"], t["metadata"]["name"]) for t in render(f"overlays/{name}")}
        for name in ("s3", "postgres")
    ]
    together = {(thing["kind"], thing["metadata"]["name"]) for thing in objects}
    configs = {
        name for name in apart[0] if name[1].startswith("lwo-dist-config")
    }  # An overlay's own.
    assert (apart[0] | apart[1]) - configs <= together


def test_custom_digests_reach_every_container(tmp_path: Path) -> None:
    """As set with `kustomize edit set image` in README.md."""
    k8s = Path(os.path.relpath(K8S, tmp_path))
    images = [
        {"name": "lwo-dist", "newName": "registry:5000/lwo-dist", "digest": DIGEST},
        {"name": "postgres", "newName": "mirror/postgres", "digest": DIGEST},
    ]
    own = {"resources": [f"{k8s}/overlays/postgres"], "images": images}
    (tmp_path / "kustomization.yaml").write_text(json.dumps(own))
    found = {container["image"] for _, container in containers(build(tmp_path))}
    assert found == {f"registry:5000/lwo-dist@{DIGEST}", f"mirror/postgres@{DIGEST}"}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_fits_the_core_schemas(overlay: str) -> None:
    core = [thing for thing in render(overlay) if thing["apiVersion"] != "ray.io/v1"]
    assert {
        thing["metadata"]["name"]: found for thing in core if (found := schema_problems(thing))
    } == {}
    assert len(core) >= 15


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_fits_kuberay_s_schema(overlay: str) -> None:
    (job,) = [thing for thing in render(overlay) if thing["kind"] == "RayJob"]
    assert schema_problems(job) == []


def test_overlays_differ_where_they_say_so() -> None:
    gpu, s3, smoke = (
        render("overlays/gpu-kueue"),
        render("overlays/s3"),
        render("overlays/cpu-smoke"),
    )
    job = next(thing for thing in gpu if thing["kind"] == "RayJob")
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "lwo-dist"
    assert job["spec"]["suspend"] is True
    assert all(c["image"].endswith("-cuda") for _, c in containers(gpu))
    assert [name for name, c in containers(s3) if "envFrom" in c] == [
        "RayJob head, container ray-head",
        "RayJob workers, container ray-worker",
    ]
    assert not [thing for thing in smoke if thing["metadata"]["name"] == "https"]  # no way out


REQUESTS = {"cpu": "CPUs", "memory": "GiB", "nvidia.com/gpu": "GPU"}


def _pods_with_requests(objects: list[Object]) -> Iterator[dict[str, Decimal]]:
    """What each pod of a run requests, by the words of README.md."""
    [job] = [thing for thing in objects if thing["kind"] == "RayJob"]
    workers = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"]
    for name, pod in pods(objects):
        spec = pod["spec"]
        requests = {}
        for resource, word in REQUESTS.items():
            side_by_side, first = (
                [quantity(c["resources"]["requests"].get(resource, 0)) for c in spec.get(key, [])]
                for key in ("containers", "initContainers")
            )
            amount = max([sum(side_by_side, Decimal()), *first])
            requests[word] = amount / 2**30 if resource == "memory" else amount
        yield from [requests] * (workers if name == "RayJob workers" else 1)


def _volumes(objects: list[Object]) -> Decimal:
    claims = [thing for thing in objects if thing["kind"] == "PersistentVolumeClaim"]
    for thing in objects:
        claims += thing["spec"].get("volumeClaimTemplates", []) if "spec" in thing else []
    sizes = [quantity(claim["spec"]["resources"]["requests"]["storage"]) for claim in claims]
    return sum(sizes, Decimal()) / 2**30


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_page_gives_the_sizes_of_the_manifests(overlay: str) -> None:
    found = list(_pods_with_requests(render(overlay)))
    total = {word: sum((pod[word] for pod in found), Decimal()) for word in REQUESTS.values()}
    largest = max(found, key=lambda pod: pod["GiB"])
    assert all(largest[word] == max(pod[word] for pod in found) for word in REQUESTS.values())
    shown = ", ".join(f"{float(amount):g} {word}" for word, amount in largest.items() if amount)
    cells = [
        f"`{overlay}`",
        f"{float(total['CPUs']):g}",
        f"{float(total['GiB']):g} GiB",
        f"{float(total['GPU']):g}",
        shown,
        f"{float(_volumes(render(overlay))):g} GiB",
    ]
    assert f"| {' | '.join(cells)} |" in (K8S / "README.md").read_text()


def test_the_page_gives_the_gpu_memory_of_the_formulas() -> None:
    config = load_config(K8S / "overlays" / "gpu-kueue" / "config.yaml")
    peak = sizes.peak("1.5B", config, config.cluster.num_workers)
    assert config.model.name.endswith("-1.5B")
    assert f"takes {peak / 1e9:.0f} GB of each GPU" in (K8S / "README.md").read_text()


def test_the_queue_of_the_page_admits_the_run_with_gpus() -> None:
    """Kueue admits all pods of a run at once, or none."""
    [text] = re.findall(r"```yaml\n(.*?)```", (K8S / "README.md").read_text(), re.DOTALL)
    [queue] = [thing for thing in yaml.safe_load_all(text) if thing["kind"] == "ClusterQueue"]
    [flavor] = queue["spec"]["resourceGroups"][0]["flavors"]
    quota = {entry["name"]: quantity(entry["nominalQuota"]) for entry in flavor["resources"]}
    run = list(_pods_with_requests(render("overlays/gpu-kueue")))
    for resource, word in REQUESTS.items():
        unit = 2**30 if resource == "memory" else 1
        assert sum(pod[word] for pod in run) * unit <= quota[resource]


def test_mlflow_knows_its_own_names() -> None:
    objects = render("base")
    (mlflow,) = [
        container for name, container in containers(objects) if name.endswith("container mlflow")
    ]
    (argument,) = [word for word in mlflow["args"] if word.startswith("--allowed-hosts=")]
    # As mlflow/server/fastapi_security.py compares them.
    allowed = argument.partition("=")[2].split(",")
    service = next(thing for thing in objects if thing["kind"] == "Service")["metadata"]
    hosts = {
        variable["value"].partition("://")[2]
        for _, container in containers(objects)
        for variable in container.get("env", [])
        if variable["name"] == "MLFLOW_TRACKING_URI"
    }
    hosts |= {
        f"{service['name']}.{service['namespace']}.svc.cluster.local:5000",
        "localhost:5000",
        "127.0.0.1:8080",
    }
    assert len(hosts) == 4
    for host in hosts:
        assert any(fnmatch.fnmatch(host, pattern) for pattern in allowed), host
    assert not any(fnmatch.fnmatch("evil.example:5000", pattern) for pattern in allowed)
