"""Each rule and schema bites: a change that breaks it is found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from .manifests import Object, render, schema_problems
from .test_manifests import DIGEST, RULES

HEAD = "RayJob.spec.rayClusterSpec.headGroupSpec"
POD = f"{HEAD}.template.spec"
WORKER = "RayJob.spec.rayClusterSpec.workerGroupSpecs.0"
MLFLOW = "Deployment.spec.template.spec"
SUBMITTER = "RayJob.spec.submitterPodTemplate.spec"
POSTGRES = "StatefulSet.spec.template.spec.containers.0"
BACKEND = f"{MLFLOW}.containers.0.env.MLFLOW_BACKEND_STORE_URI"


def _at(objects: list[Object], path: str) -> tuple[Any, Any]:
    """The container of what `path` names, and its key there. `Kind` or `Kind/name` comes first; the
    entries of a list go by number or by their name."""
    kind, *keys = path.split(".")
    kind, _, name = kind.partition("/")
    place: Any = next(
        o for o in objects if o["kind"] == kind and o["metadata"]["name"].startswith(name)
    )
    for i, key in enumerate(keys):
        found: Any = key
        if isinstance(place, list):
            found = int(key) if key.isdigit() else [entry["name"] for entry in place].index(key)
        if i == len(keys) - 1:
            return place, found
        place = place[found]
    raise AssertionError(path)


def put(path: str, value: Any) -> Callable[[list[Object]], None]:
    def change(objects: list[Object]) -> None:
        place, key = _at(objects, path)
        place[key] = value

    return change


def drop(path: str) -> Callable[[list[Object]], None]:
    def change(objects: list[Object]) -> None:
        place, key = _at(objects, path)
        del place[key]

    return change


def forget(kind: str, name: str) -> Callable[[list[Object]], None]:
    def change(objects: list[Object]) -> None:
        thing = next(o for o in objects if o["kind"] == kind and o["metadata"]["name"] == name)
        objects.remove(thing)

    return change


def secret_for(container: str, secret: str, key: str) -> Callable[[list[Object]], None]:
    """Add a variable to `container`, from a key of a Secret."""

    def change(objects: list[Object]) -> None:
        place, at = _at(objects, container)
        reference = {"secretKeyRef": {"name": secret, "key": key}}
        place[at]["env"].append({"name": "MORE", "valueFrom": reference})

    return change


def open_to(policy: str, side: str, *rules: Object) -> Callable[[list[Object]], None]:
    """Add a rule to a NetworkPolicy."""

    def change(objects: list[Object]) -> None:
        place, at = _at(objects, f"NetworkPolicy/{policy}.spec")
        place[at].setdefault(side, []).extend(rules)

    return change


def config(old: str, new: str) -> Callable[[list[Object]], None]:
    def change(objects: list[Object]) -> None:
        data, _ = _at(objects, "ConfigMap/lwo-dist-config.data.")
        assert old in data["config.yaml"]
        data["config.yaml"] = data["config.yaml"].replace(old, new)

    return change


# What breaks each rule, as (rule, change to a sound copy).
BROKEN: list[tuple[str, Callable[[list[Object]], None]]] = [
    ("short_name", put("RayJob.metadata.name", "a" * 48)),
    ("short_name", put("RayJob.metadata.name", "1st-run")),
    ("token_needs_ray_2_52", put("RayJob.spec.rayClusterSpec.rayVersion", "2.51.1")),
    (
        "no_kubernetes_token_auth",
        put("RayJob.spec.rayClusterSpec.authOptions.enableK8sTokenAuth", True),
    ),
    ("no_alpha_gates", put("RayJob.spec.rayClusterSpec.networkPolicy", {})),
    ("no_alpha_gates", put("RayJob.spec.rayClusterSpec.tlsOptions", {})),
    (
        "no_alpha_gates",
        put("RayJob.spec.rayClusterSpec.gcsFaultToleranceOptions", {"backend": "rocksdb"}),
    ),
    ("shut_down_before_ttl_or_suspend", drop("RayJob.spec.shutdownAfterJobFinishes")),
    (
        "retries_need_a_cluster_of_their_own",
        put("RayJob.spec.clusterSelector", {"ray.io/cluster": "x"}),
    ),
    ("retries_need_a_cluster_of_their_own", put("RayJob.spec.submissionMode", "InteractiveMode")),
    ("worker_bounds", drop(f"{WORKER}.minReplicas")),
    ("resources_said_once", put(f"{HEAD}.resources", {"cpu": "1"})),
    ("labels_in_the_group", put(f"{HEAD}.rayStartParams.labels", "a=b")),
    ("sidecar_submits_itself", put("RayJob.spec.submissionMode", "SidecarMode")),
    ("non_root", put(f"{POD}.securityContext.runAsNonRoot", False)),
    ("non_root", put(f"{MLFLOW}.securityContext.runAsUser", 0)),
    ("non_root", put(f"{MLFLOW}.containers.0.securityContext.runAsUser", 0)),
    (
        "no_privilege_escalation",
        drop(f"{POD}.containers.0.securityContext.allowPrivilegeEscalation"),
    ),
    ("no_privilege_escalation", put(f"{MLFLOW}.containers.0.securityContext.privileged", True)),
    (
        "capabilities_dropped",
        put(f"{MLFLOW}.containers.0.securityContext.capabilities", {"drop": ["NET_RAW"]}),
    ),
    (
        "capabilities_dropped",
        put(f"{POD}.containers.0.securityContext.capabilities.add", ["SYS_PTRACE"]),
    ),
    ("seccomp", put(f"{POD}.securityContext.seccompProfile.type", "Unconfined")),
    (
        "seccomp",
        put(f"{POD}.containers.0.securityContext.seccompProfile", {"type": "Unconfined"}),
    ),
    (
        "seccomp",
        put(f"{MLFLOW}.initContainers.0.securityContext.seccompProfile", {"type": "Unconfined"}),
    ),
    ("read_only_root", put(f"{POD}.containers.0.securityContext.readOnlyRootFilesystem", False)),
    ("room_to_write", put(f"{POD}.containers.0.volumeMounts.tmp.mountPath", "/temporary")),
    ("room_to_write", put(f"{POD}.containers.0.env.HOME.value", "/var/somebody")),
    ("shared_memory", put(f"{WORKER}.template.spec.volumes.shm.emptyDir", {})),
    ("nothing_of_the_host", put(f"{POD}.hostNetwork", True)),
    (
        "nothing_of_the_host",
        put(f"{POD}.volumes.runs", {"name": "runs", "hostPath": {"path": "/"}}),
    ),
    ("nothing_of_the_host", put(f"{POD}.containers.0.ports.0.hostPort", 6379)),
    ("no_api_token", drop("ServiceAccount.automountServiceAccountToken")),
    ("no_api_token", put(f"{POD}.serviceAccountName", "default")),
    ("no_api_token", drop(f"{MLFLOW}.automountServiceAccountToken")),
    (
        "no_api_token",
        put(
            f"{POD}.volumes.tmp",
            {"name": "tmp", "projected": {"sources": [{"serviceAccountToken": {"path": "t"}}]}},
        ),
    ),
    ("no_service_links", drop(f"{POD}.enableServiceLinks")),
    ("no_service_links", put("StatefulSet.spec.template.spec.enableServiceLinks", True)),
    ("known_kinds", put("PodDisruptionBudget.kind", "CronJob")),
    ("known_kinds", put("PodDisruptionBudget.kind", "RoleBinding")),
    ("secrets_where_needed", secret_for(f"{POD}.containers.0", "lwo-dist-mlflow", "username")),
    ("secrets_where_needed", secret_for(f"{MLFLOW}.containers.0", "lwo-dist-mlflow", "password")),
    (
        "secrets_where_needed",
        put(f"{MLFLOW}.containers.0.envFrom", [{"secretRef": {"name": "lwo-dist-mlflow"}}]),
    ),
    (
        "secrets_where_needed",
        put(
            f"{WORKER}.template.spec.volumes.tmp",
            {"name": "tmp", "secret": {"secretName": "lwo-dist-mlflow"}},
        ),
    ),
    (
        "secrets_where_needed",
        put(
            f"{WORKER}.template.spec.volumes.tmp",
            {"name": "tmp", "projected": {"sources": [{"secret": {"name": "lwo-dist-mlflow"}}]}},
        ),
    ),
    ("secrets_where_needed", secret_for(f"{SUBMITTER}.containers.0", "lwo-dist-hub", "token")),
    ("secrets_where_needed", secret_for(f"{MLFLOW}.initContainers.0", "lwo-dist-hub", "token")),
    (
        "secrets_where_needed",
        put(f"{SUBMITTER}.containers.0.envFrom", [{"secretRef": {"name": "lwo-dist-s3"}}]),
    ),
    (
        "secrets_where_needed",
        secret_for(f"{POD}.containers.0", "lwo-dist-postgres", "password"),
    ),
    (
        "restricted_namespace",
        put("Namespace.metadata.labels", {"pod-security.kubernetes.io/enforce": "baseline"}),
    ),
    ("restricted_namespace", put("RayJob.metadata.namespace", "default")),
    ("resources_set", drop(f"{MLFLOW}.containers.0.resources.limits")),
    (
        "resources_set",
        drop("RayJob.spec.submitterPodTemplate.spec.containers.0.resources.requests.memory"),
    ),
    ("probed", drop(f"{MLFLOW}.containers.0.readinessProbe")),
    ("probed", drop("StatefulSet.spec.template.spec.containers.0.livenessProbe")),
    ("images_pinned", put(f"{POSTGRES}.image", "registry:5000/postgres")),
    ("images_pinned", put(f"{POSTGRES}.image", "postgres:latest")),
    ("images_pinned", put(f"{POSTGRES}.image", "postgres:17.11-bookworm")),
    ("images_pinned", put(f"{POSTGRES}.image", f"postgres:17.11-bookworm@{DIGEST[:-1]}")),
    ("images_pinned", put(f"{MLFLOW}.initContainers.0.image", "busybox:1.37")),
    ("images_pinned", put(f"{POD}.containers.0.image", "other/lwo-dist-extra:1.0")),
    ("images_pinned", put(f"{POD}.containers.0.image", "lwo-dist:latest")),
    ("images_pinned", put(f"{POD}.containers.0.image", "registry:5000/lwo-dist")),
    ("one_version_of_ray", put("RayJob.spec.rayClusterSpec.rayVersion", "2.59.0")),
    (
        "one_version_of_ray",
        put(f"{WORKER}.template.spec.containers.0.image", "lwo-dist:0.1.0-ray2.59.0-cpu"),
    ),
    (
        "one_version_of_ray",
        put(f"{WORKER}.template.spec.containers.0.image", "lwo-dist:0.0.9-ray2.60.0-cpu"),
    ),
    (
        "database_driver",
        put(
            f"{BACKEND}.value", "postgresql://mlflow:$(POSTGRES_PASSWORD)@lwo-dist-postgres/mlflow"
        ),
    ),
    (
        "database_driver",
        put(f"{BACKEND}.value", "postgresql+psycopg://mlflow:$(PASSWORD)@lwo-dist-postgres/mlflow"),
    ),
    (
        "no_secret_literal",
        put(
            f"{POD}.containers.0.env.MLFLOW_TRACKING_PASSWORD",
            {"name": "MLFLOW_TRACKING_PASSWORD", "value": "x"},
        ),
    ),
    (
        "no_secret_literal",
        put(
            f"{POD}.containers.0.env.MLFLOW_TRACKING_URI.value",
            "http://user:secret@lwo-dist-mlflow:5000",
        ),
    ),
    ("no_secret_literal", config("method: lwo", "method: lwo  # hf_abcdefghijklmnop")),
    ("no_secret_literal", put("Namespace.kind", "Secret")),
    ("token_on", put("RayJob.spec.rayClusterSpec.authOptions.mode", "disabled")),
    ("references_resolve", put(f"{POD}.volumes.runs.persistentVolumeClaim.claimName", "nowhere")),
    (
        "references_resolve",
        put(
            f"{POD}.containers.0.env.MLFLOW_TRACKING_USERNAME.valueFrom.secretKeyRef.name",
            "nowhere",
        ),
    ),
    (
        "references_resolve",
        put(
            f"{POD}.containers.0.env.MLFLOW_TRACKING_USERNAME.valueFrom.secretKeyRef.key",
            "user-name",
        ),
    ),
    ("network_closed", forget("NetworkPolicy", "default-deny")),
    ("network_closed", drop("NetworkPolicy/mlflow.spec.ingress.0.from")),
    ("listeners_named", forget("NetworkPolicy", "ray")),
    ("listeners_named", forget("NetworkPolicy", "dashboard")),
    ("listeners_named", forget("NetworkPolicy", "submitter")),
    ("listeners_named", forget("NetworkPolicy", "mlflow")),
    ("listeners_named", forget("NetworkPolicy", "postgres")),
    ("listeners_named", forget("NetworkPolicy", "mlflow-to-postgres")),
    # A new listener without a policy, declared in various ways.
    (
        "listeners_named",
        put(f"{MLFLOW}.containers.0.ports", [{"name": "http", "containerPort": 5001}]),
    ),
    ("listeners_named", put(f"{MLFLOW}.containers.0.args.4", "--port=5001")),
    ("listeners_named", put(f"{HEAD}.rayStartParams.ray-client-server-port", "10011")),
    ("listeners_named", put(f"{MLFLOW}.containers.0.livenessProbe.httpGet.port", 9000)),
    # A policy that is too wide.
    ("listeners_named", drop("NetworkPolicy/mlflow.spec.ingress.0.ports")),
    ("listeners_named", put("NetworkPolicy/mlflow.spec.ingress.0.from.0.podSelector", {})),
    ("listeners_named", put("NetworkPolicy/mlflow.spec.ingress.0.ports.0.endPort", 6000)),
    ("listeners_named", put("NetworkPolicy/mlflow.spec.ingress.0.ports.0.protocol", "UDP")),
    ("listeners_named", put("NetworkPolicy/postgres.spec.ingress.0.ports.0.port", 5433)),
    ("listeners_named", put("NetworkPolicy/dashboard.spec.ingress.0.from.1.namespaceSelector", {})),
    ("listeners_named", drop("NetworkPolicy/dashboard.spec.ingress.0.from.1.podSelector")),
    ("listeners_named", open_to("mlflow", "ingress", {"ports": [{"port": 22}]})),
    (
        "listeners_named",
        open_to("postgres", "ingress", {"from": [{"ipBlock": {"cidr": "0.0.0.0/0"}}]}),
    ),
    (
        "listeners_named",
        open_to(
            "submitter",
            "egress",
            {
                "to": [{"podSelector": {"matchLabels": {"lwo-dist/part": "mlflow"}}}],
                "ports": [{"port": 5000}],
            },
        ),
    ),
    ("listeners_named", drop("NetworkPolicy/https.spec.egress.0.to.0.ipBlock.except")),
    ("listeners_named", put("NetworkPolicy/https.spec.podSelector", {})),
    ("services_are_internal", put("Service.spec.type", "NodePort")),
    ("services_are_internal", put("Service/lwo-dist-postgres.spec.type", "LoadBalancer")),
    ("services_are_internal", put("Service.spec.externalIPs", ["192.0.2.1"])),
    ("selectors_match", put("Service.spec.selector", {"lwo-dist/part": "mlfow"})),
    (
        "selectors_match",
        put("PodDisruptionBudget.spec.selector.matchLabels", {"lwo-dist/part": "heads"}),
    ),
    ("head_kept", put("PodDisruptionBudget.spec", {"maxUnavailable": 0})),
    ("resumes", drop("RayJob.spec.backoffLimit")),
    ("resumes", drop(f"{WORKER}.template.spec.containers.0.lifecycle")),
    ("resumes", put(f"{POD}.terminationGracePeriodSeconds", 30)),
    ("config_fits", config("run_name: first", "")),
    ("config_fits", config("checkpoint:\n  steps: 50", "")),
    ("config_fits", config("storage: /runs", "storage: /tmp/runs")),
    ("config_fits", put(f"{HEAD}.rayStartParams", {})),
    ("config_fits", put(f"{WORKER}.replicas", 3)),
    ("config_fits", config("num_workers: 2", "num_workers: 2\n  use_gpu: true")),
]


@pytest.mark.parametrize(
    ("rule", "change"), BROKEN, ids=[f"{name}-{i}" for i, (name, _) in enumerate(BROKEN)]
)
def test_a_rule_is_broken(rule: str, change: Callable[[list[Object]], None]) -> None:
    objects = render("overlays/postgres")
    change(objects)
    (check,) = [candidate for candidate in RULES if candidate.__name__ == rule]
    assert list(check(objects)) != []


def test_every_rule_is_shown_to_bite() -> None:
    assert {rule.__name__ for rule in RULES} == {rule for rule, _ in BROKEN}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("Deployment.spec.strategie", {}), "strategie"),
        (put(f"{MLFLOW}.containers.0.readynessProbe", {}), "readynessProbe"),
        (put("Deployment.spec.replicas", "one"), "one"),
        (drop("Service.spec.ports.0.port"), "port"),
        (put("RayJob.spec.shutdownAfterJobFinish", True), "shutdownAfterJobFinish"),
        (put("RayJob.spec.backoffLimit", "5"), "5"),
        (put(f"{POD}.containers.0.imagePolicy", "Always"), "imagePolicy"),
        (drop(f"{WORKER}.groupName"), "groupName"),
    ],
)
def test_the_schemas_refuse(change: Callable[[list[Object]], None], message: str) -> None:
    objects = render("base")
    change(objects)
    found = [problem for thing in objects for problem in schema_problems(thing)]
    assert len(found) == 1
    assert message in found[0]
