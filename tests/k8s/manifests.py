"""The manifests as a cluster would get them, and the schemas that it would hold them against."""

from __future__ import annotations

import copy
import functools
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

__all__ = [
    "K8S",
    "OVERLAYS",
    "REPOSITORY",
    "Object",
    "build",
    "containers",
    "pods",
    "render",
    "schema_problems",
]

REPOSITORY = Path(__file__).parents[2]
K8S = REPOSITORY / "k8s"
OVERLAYS = ("base", "overlays/cpu-smoke", "overlays/gpu-kueue", "overlays/s3", "overlays/postgres")
CORE_VERSION = "1.32"

Object = dict[str, Any]


def render(overlay: str) -> list[Object]:
    """The objects of an overlay, the caller's to change."""
    return copy.deepcopy(_render(overlay))


@functools.cache
def _render(overlay: str) -> list[Object]:
    return build(K8S / overlay)


def build(folder: Path) -> list[Object]:
    """What kustomize makes of a folder; the test is skipped where there is none."""
    if kubectl := shutil.which("kubectl"):
        command = [kubectl, "kustomize"]
    elif kustomize := shutil.which("kustomize"):
        command = [kustomize, "build"]
    else:
        pytest.skip(
            "no kubectl and no kustomize here; https://kubernetes.io/docs/tasks/tools (any kubectl"
            " from 1.25)"
        )
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return list(yaml.load_all(done.stdout, yaml.CSafeLoader))


def pods(objects: list[Object]) -> Iterator[tuple[str, Object]]:
    """Every pod template, with a name for it."""
    for thing in objects:
        spec = thing.get("spec", {})
        if thing["kind"] in ("Deployment", "StatefulSet", "DaemonSet", "Job"):
            yield f"{thing['kind']} {thing['metadata']['name']}", spec["template"]
        elif thing["kind"] == "RayJob":
            cluster = spec["rayClusterSpec"]
            yield "RayJob head", cluster["headGroupSpec"]["template"]
            for group in cluster["workerGroupSpecs"]:
                yield f"RayJob {group['groupName']}", group["template"]
            yield "RayJob submitter", spec["submitterPodTemplate"]


def containers(objects: list[Object]) -> Iterator[tuple[str, Object]]:
    """Every container, init containers too, with a name for it."""
    for name, pod in pods(objects):
        for container in [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]:
            yield f"{name}, container {container['name']}", container


def schema_problems(thing: Object) -> list[str]:
    """What a strict API server would say: unknown fields and wrong types."""
    if thing["apiVersion"] == "ray.io/v1":
        validator = jsonschema.Draft202012Validator(_ray_schema(thing["kind"]))
        return [
            f"{error.json_path}: {error.message[:200]}" for error in validator.iter_errors(thing)
        ]
    import kubernetes_validate

    try:
        kubernetes_validate.validate(thing, CORE_VERSION, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{list(error.path)}: {error.message[:200]}"]
    return []


@functools.cache
def _ray_schema(kind: str) -> Object:
    folder = os.environ.get("LWO_CRD_DIR")
    if not folder:
        pytest.skip(
            "LWO_CRD_DIR is unset: the folder of KubeRay's ray.io_*.yaml (its helm chart's crds/)"
        )
    for path in Path(folder).glob(f"ray.io_{kind.lower()}s.yaml"):
        definition = yaml.load(path.read_text(), yaml.CSafeLoader)
        version = next(
            version for version in definition["spec"]["versions"] if version["name"] == "v1"
        )
        schema = _strict(version["schema"]["openAPIV3Schema"])
        schema["properties"]["metadata"] = {"type": "object"}
        return schema
    pytest.fail(f"LWO_CRD_DIR = {folder}: no ray.io_{kind.lower()}s.yaml there")


def _strict(schema: Object) -> Object:
    """A structural schema of a CRD as a JSON schema that refuses unknown fields. Its CEL rules are
    not looked at.
    """
    schema = dict(schema)
    if schema.pop("x-kubernetes-int-or-string", None):
        return {"type": ["integer", "string"]}
    if "properties" in schema:
        schema["properties"] = {
            name: _strict(value) for name, value in schema["properties"].items()
        }
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            schema.setdefault("additionalProperties", False)
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            schema[key] = _strict(schema[key])
    if schema.pop("nullable", False) and "type" in schema:
        schema["type"] = [schema["type"], "null"]
    return schema
