"""What our manifests promise: pods that may do no more than they need, and a job that fits its
config and image.
"""

from __future__ import annotations

import re
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import yaml

from lwo_dist.config.reading import load_config

from .listeners import listeners, missing_policies
from .manifests import K8S, Object, containers, pods

__all__ = ["POLICY_RULES"]

Rule = Callable[[list[Object]], Iterator[str]]

REPOSITORY = Path(__file__).parents[2]
PART = "lwo-dist/part"
_SECRET_NAME = re.compile(r"token|secret|passw|credential|(?<!flask)[-_]key", re.IGNORECASE)
_SECRET_TEXT = re.compile(
    r"://[^/\s:]+:(?!\$\()[^/\s@]+@|hf_\w{10}|AKIA\w{16}|-----BEGIN [A-Z ]*PRIVATE KEY"
)


# Kinds that the rules here check; other kinds would bypass them all.
_KINDS = {
    "ConfigMap",
    "Deployment",
    "Namespace",
    "NetworkPolicy",
    "PersistentVolumeClaim",
    "PodDisruptionBudget",
    "RayJob",
    "Service",
    "ServiceAccount",
    "StatefulSet",
}
# Secret -> the parts that get it. KubeRay distributes Ray's token.
_SECRETS_FOR = {
    "lwo-dist-mlflow": {"mlflow"},
    "lwo-dist-mlflow-training": {"mlflow", "head", "worker"},
    "lwo-dist-hub": {"head", "worker"},
    "lwo-dist-s3": {"head", "worker"},
    "lwo-dist-postgres": {"mlflow", "postgres"},
}


def _of_kind(objects: list[Object], kind: str) -> list[Object]:
    return [thing for thing in objects if thing["kind"] == kind]


def non_root(objects: list[Object]) -> Iterator[str]:
    for name, pod in pods(objects):
        context = pod["spec"].get("securityContext", {})
        if context.get("runAsNonRoot") is not True or not context.get("runAsUser"):
            yield f"{name}: runAsNonRoot and a runAsUser other than 0"
    for name, container in containers(objects):
        context = container.get("securityContext", {})
        if context.get("runAsNonRoot") is False or context.get("runAsUser") == 0:
            yield f"{name}: root"


def no_privilege_escalation(objects: list[Object]) -> Iterator[str]:
    for name, container in containers(objects):
        context = container.get("securityContext", {})
        if context.get("allowPrivilegeEscalation") is not False or context.get("privileged"):
            yield f"{name}: allowPrivilegeEscalation must be false"


def capabilities_dropped(objects: list[Object]) -> Iterator[str]:
    for name, container in containers(objects):
        if container.get("securityContext", {}).get("capabilities") != {"drop": ["ALL"]}:
            yield f"{name}: capabilities must be drop: [ALL]"


def seccomp(objects: list[Object]) -> Iterator[str]:
    usual = {"type": "RuntimeDefault"}
    for name, pod in pods(objects):
        if pod["spec"].get("securityContext", {}).get("seccompProfile") != usual:
            yield f"{name}: seccompProfile must be RuntimeDefault"
    for name, container in containers(objects):
        if container.get("securityContext", {}).get("seccompProfile", usual) != usual:
            yield f"{name}: another seccompProfile than the pod's"


def read_only_root(objects: list[Object]) -> Iterator[str]:
    for name, container in containers(objects):
        if container.get("securityContext", {}).get("readOnlyRootFilesystem") is not True:
            yield f"{name}: readOnlyRootFilesystem must be true"


def room_to_write(objects: list[Object]) -> Iterator[str]:
    """Where programs write by themselves, a volume is mounted that can be written."""
    for name, container in containers(objects):
        mounts = [
            PurePosixPath(m["mountPath"])
            for m in container.get("volumeMounts", [])
            if not m.get("readOnly")
        ]
        written = {"TMPDIR": "/tmp"} | {
            variable["name"]: variable["value"]
            for variable in container.get("env", [])
            if variable["name"] in ("HOME", "TMPDIR", "RAY_TMPDIR", "HF_HOME", "PGDATA")
            or (variable["name"].startswith("LWO_") and variable["name"].endswith("_DIR"))
        }
        for variable, folder in written.items():
            if not any(PurePosixPath(folder).is_relative_to(mount) for mount in mounts):
                yield f"{name}: {variable} = {folder} is on the read-only root"


def shared_memory(objects: list[Object]) -> Iterator[str]:
    for name, pod in pods(objects):
        if pod["metadata"]["labels"].get(PART) in ("head", "worker"):
            mounted = {
                m["name"]
                for c in pod["spec"]["containers"]
                for m in c["volumeMounts"]
                if m["mountPath"] == "/dev/shm"
            }
            volumes = [v for v in pod["spec"]["volumes"] if v["name"] in mounted]
            if not any(v.get("emptyDir", {}).get("medium") == "Memory" for v in volumes):
                yield f"{name}: /dev/shm must be an emptyDir of medium Memory"


def nothing_of_the_host(objects: list[Object]) -> Iterator[str]:
    for name, pod in pods(objects):
        for field in ("hostNetwork", "hostPID", "hostIPC"):
            if pod["spec"].get(field):
                yield f"{name}: {field}"
        yield from (
            f"{name}: hostPath" for volume in pod["spec"].get("volumes", []) if "hostPath" in volume
        )
    for name, container in containers(objects):
        yield from (
            f"{name}: hostPort" for port in container.get("ports", []) if "hostPort" in port
        )


def no_api_token(objects: list[Object]) -> Iterator[str]:
    accounts = {
        a["metadata"]["name"]: a.get("automountServiceAccountToken")
        for a in _of_kind(objects, "ServiceAccount")
    }
    for name, pod in pods(objects):
        account = pod["spec"].get("serviceAccountName")
        if (
            accounts.get(account) is not False
            or pod["spec"].get("automountServiceAccountToken") is not False
        ):
            yield f"{name}: a service account of ours, whose token is not mounted"
        for volume in pod["spec"].get("volumes", []):
            sources = volume.get("projected", {}).get("sources", [])
            if any("serviceAccountToken" in source for source in sources):
                yield f"{name}: an API token in volume {volume['name']}"


def no_service_links(objects: list[Object]) -> Iterator[str]:
    """Otherwise every pod's environment holds the addresses of all Services in the namespace."""
    for name, pod in pods(objects):
        if pod["spec"].get("enableServiceLinks") is not False:
            yield f"{name}: enableServiceLinks must be false"


def known_kinds(objects: list[Object]) -> Iterator[str]:
    for thing in objects:
        if thing["kind"] not in _KINDS:
            yield f"{thing['kind']} {thing['metadata']['name']}: no rule looks at this kind"


def secrets_where_needed(objects: list[Object]) -> Iterator[str]:
    for name, pod in pods(objects):
        part = pod["metadata"]["labels"].get(PART)
        for secret in sorted(_secrets_of(pod)):
            if part not in _SECRETS_FOR.get(secret, set()):
                yield f"{name}: Secret {secret} is not for {part}"
    for name, container in containers(objects):
        keys = {(ref["name"], ref.get("key", "")) for ref in _secret_refs(container)}
        if {("lwo-dist-mlflow", "password"), ("lwo-dist-mlflow", "")} & keys and not name.endswith(
            "container users"
        ):
            yield f"{name}: only the init container may get MLflow's admin password"


def _secrets_of(pod: Object) -> set[str]:
    spec = pod["spec"]
    every = [*spec.get("initContainers", []), *spec["containers"]]
    found = {ref["name"] for container in every for ref in _secret_refs(container)}
    for volume in spec.get("volumes", []):
        sources = [*volume.get("projected", {}).get("sources", []), volume]
        found |= {
            source["secret"].get("secretName") or source["secret"]["name"]
            for source in sources
            if "secret" in source
        }
    return found


def restricted_namespace(objects: list[Object]) -> Iterator[str]:
    spaces = _of_kind(objects, "Namespace")
    if [
        s["metadata"].get("labels", {}).get("pod-security.kubernetes.io/enforce") for s in spaces
    ] != ["restricted"]:
        yield "one namespace, with pod security restricted"
    names = {
        thing["metadata"].get("namespace") for thing in objects if thing["kind"] != "Namespace"
    }
    if names != {space["metadata"]["name"] for space in spaces}:
        yield f"objects outside the namespace: {names}"


def resources_set(objects: list[Object]) -> Iterator[str]:
    for name, container in containers(objects):
        for side in ("requests", "limits"):
            missing = {"cpu", "memory", "ephemeral-storage"} - container.get("resources", {}).get(
                side, {}
            ).keys()
            if missing:
                yield f"{name}: no {side} of {', '.join(sorted(missing))}"


def probed(objects: list[Object]) -> Iterator[str]:
    for name, pod in pods(objects):
        if pod["metadata"]["labels"].get(PART) != "submitter":
            for container in pod["spec"]["containers"]:
                missing = {"startupProbe", "readinessProbe", "livenessProbe"} - container.keys()
                if missing:
                    yield f"{name}: no {', '.join(sorted(missing))}"


def images_pinned(objects: list[Object]) -> Iterator[str]:
    """By digest; our own image, whose digest is unknown until the reader builds it, by tag."""
    for name, container in containers(objects):
        image = container["image"]
        if re.search("@sha256:[0-9a-f]{64}$", image):
            continue
        path, _, tag = image.rpartition("/")[2].partition(":")
        if path != "lwo-dist":
            yield f"{name}: image {image} has no digest"
        elif tag in ("", "latest"):
            yield f"{name}: image {image} has neither a digest nor a fixed tag"


def one_version_of_ray(objects: list[Object]) -> Iterator[str]:
    """The image's tag, rayVersion and the pin agree; and the tag names this version of lwo_dist."""
    pins = dict(
        line.split("==") for line in (REPOSITORY / "launch" / "constraints.txt").read_text().split()
    )
    version = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]
    for job in _of_kind(objects, "RayJob"):
        ray = job["spec"]["rayClusterSpec"]["rayVersion"]
        if ray != pins["ray"]:
            yield f"rayVersion {ray}, and launch/constraints.txt has {pins['ray']}"
    for name, container in containers(objects):
        repository, _, tag = container["image"].partition(":")
        if repository == "lwo-dist" and not re.fullmatch(
            re.escape(f"{version}-ray{pins['ray']}-") + "(cpu|cuda)", tag
        ):
            yield f"{name}: image tag {tag}, expected {version}-ray{pins['ray']}-cpu or -cuda"


def database_driver(objects: list[Object]) -> Iterator[str]:
    """A database's URI names its driver, which the image has; SQLAlchemy's default one changes with
    its version.
    """
    pins = (REPOSITORY / "launch" / "constraints.txt").read_text()
    for name, container in containers(objects):
        for variable in container.get("env", []):
            match = re.match(r"(postgresql|mysql|mssql)\+?(\w*)://", variable.get("value", ""))
            if match and (not match[2] or not re.search(rf"(?m)^{match[2]}(-binary)?==", pins)):
                yield (
                    f"{name}: {variable['name']} must name a driver that is pinned:"
                    f" {match[1]}+psycopg2://"
                )


def no_secret_literal(objects: list[Object]) -> Iterator[str]:
    yield from (
        f"Secret {thing['metadata']['name']}: made by hand, not kept here"
        for thing in _of_kind(objects, "Secret")
    )
    for name, container in containers(objects):
        for variable in container.get("env", []):
            if "value" in variable and _SECRET_NAME.search(variable["name"]):
                yield f"{name}: {variable['name']} as a literal; use a secretKeyRef"
    for thing in objects:
        if _SECRET_TEXT.search(yaml.dump(thing, width=10_000)):
            yield (
                f"{thing['kind']} {thing['metadata']['name']}: a password, token or key in its text"
            )


def token_on(objects: list[Object]) -> Iterator[str]:
    for job in _of_kind(objects, "RayJob"):
        auth = job["spec"]["rayClusterSpec"].get("authOptions", {})
        if auth.get("mode") != "token" or not auth.get("secretName"):
            yield "authOptions must be mode token with a secretName"


def references_resolve(objects: list[Object]) -> Iterator[str]:
    """ConfigMaps and claims are in the set; Secrets are what README.md has the reader make."""
    there = {(thing["kind"], thing["metadata"]["name"]) for thing in objects}
    readme = (K8S / "README.md").read_text()
    for name, pod in pods(objects):
        for volume in pod["spec"].get("volumes", []):
            for field, kind, key in (
                ("configMap", "ConfigMap", "name"),
                ("persistentVolumeClaim", "PersistentVolumeClaim", "claimName"),
            ):
                if field in volume and (kind, volume[field][key]) not in there:
                    yield f"{name}: no {kind} {volume[field][key]}"
    refs = {
        (ref["name"], ref.get("key", ""))
        for _, container in containers(objects)
        for ref in _secret_refs(container)
    }
    for job in _of_kind(objects, "RayJob"):
        refs.add((job["spec"]["rayClusterSpec"]["authOptions"].get("secretName"), "auth_token"))
    for secret, key in sorted(refs):
        made = rf"create secret generic {secret} (?:(?!kubectl)[^`])*--from-literal={key}"
        if not re.search(made, readme):
            yield f"Secret {secret} with {key}: README.md does not say how to make it"


def _secret_refs(container: Object) -> Iterator[Object]:
    for variable in container.get("env", []):
        if ref := variable.get("valueFrom", {}).get("secretKeyRef"):
            yield ref
    yield from (
        source["secretRef"] for source in container.get("envFrom", []) if "secretRef" in source
    )


def network_closed(objects: list[Object]) -> Iterator[str]:
    policies = {
        policy["metadata"]["name"]: policy["spec"] for policy in _of_kind(objects, "NetworkPolicy")
    }
    if policies.get("default-deny") != {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}:
        yield "no NetworkPolicy default-deny for all pods, both ways"
    for name, spec in policies.items():
        for direction, side, peers in (("ingress", "Ingress", "from"), ("egress", "Egress", "to")):
            for entry in spec.get(direction, []):
                if side not in spec["policyTypes"] or not entry.get(peers):
                    yield f"NetworkPolicy {name}: {direction} that names nobody opens it to all"


def listeners_named(objects: list[Object]) -> Iterator[str]:
    """README.md's table lists exactly the peers that can reach each port."""
    yield from missing_policies(objects)
    readme = (K8S / "README.md").read_text()
    for part, ports in listeners(objects).items():
        for port in sorted(ports):
            if not re.search(rf"(?m)^\| {part}\b[^|]*\| [^|]*\b{port}\b", readme):
                yield f"{part}:{port}: missing from README.md's table of listening ports"


def services_are_internal(objects: list[Object]) -> Iterator[str]:
    for service in _of_kind(objects, "Service"):
        spec = service["spec"]
        if spec.get("type", "ClusterIP") != "ClusterIP" or spec.get("externalIPs"):
            yield f"Service {service['metadata']['name']}: opens a port outside the cluster"


def selectors_match(objects: list[Object]) -> Iterator[str]:
    """Services, budgets and policies select pods that there are."""
    parts = {pod["metadata"]["labels"].get(PART) for _, pod in pods(objects)}
    for thing in objects:
        if thing["kind"] in ("Service", "PodDisruptionBudget", "NetworkPolicy"):
            text = yaml.dump(thing["spec"])
            wanted = set(re.findall(rf"{PART}: (\S+)", text)) | set(
                re.findall(r"^ +- (head|worker)$", text, re.MULTILINE)
            )
            if wanted - parts:
                yield (
                    f"{thing['kind']} {thing['metadata']['name']}: no pod is"
                    f" {', '.join(sorted(wanted - parts))}"
                )


def head_kept(objects: list[Object]) -> Iterator[str]:
    """A budget for the head; in minAvailable, since a RayCluster has no scale subresource to count
    by.
    """
    budgets = [b["spec"] for b in _of_kind(objects, "PodDisruptionBudget")]
    if {"minAvailable": 1, "selector": {"matchLabels": {PART: "head"}}} not in budgets:
        yield "no PodDisruptionBudget that keeps the head"


def resumes(objects: list[Object]) -> Iterator[str]:
    """Tried again after a failure, under the same run_name; and pods have the time to save before
    they go.
    """
    for job in _of_kind(objects, "RayJob"):
        if not (job["spec"].get("backoffLimit") and job["spec"].get("shutdownAfterJobFinishes")):
            yield "a failed run needs backoffLimit and shutdownAfterJobFinishes"
    for name, pod in pods(objects):
        if pod["metadata"]["labels"].get(PART) in ("head", "worker"):
            hook = (
                pod["spec"]["containers"][0]
                .get("lifecycle", {})
                .get("preStop", {})
                .get("exec", {})
                .get("command", [])
            )
            seconds = [
                int(word.partition("=")[2]) for word in hook if word.startswith("--seconds=")
            ]
            if not seconds or seconds[0] + 20 > pod["spec"].get(
                "terminationGracePeriodSeconds", 30
            ):
                yield f"{name}: no preStop that ends 20 s before terminationGracePeriodSeconds"


def config_fits(objects: list[Object]) -> Iterator[str]:
    maps = {thing["metadata"]["name"]: thing["data"] for thing in _of_kind(objects, "ConfigMap")}
    for job in _of_kind(objects, "RayJob"):
        cluster = job["spec"]["rayClusterSpec"]
        head, (workers,) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
        volumes = {volume["name"]: volume for volume in head["template"]["spec"]["volumes"]}
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "config.yaml"
            file.write_text(maps[volumes["config"]["configMap"]["name"]]["config.yaml"])
            config = load_config(file)
        if config.run_name is None:
            yield "config.yaml: run_name must be set, so that a retry goes on"
        if not config.checkpoint.steps:
            yield "config.yaml: checkpoint.steps must be set, so that a retry does not start anew"
        if not config.storage.startswith(("/runs", "s3://")) or not str(
            config.data.cache or "/runs"
        ).startswith("/runs"):
            yield "config.yaml: storage and data.cache must be seen by all workers"
        if head["rayStartParams"].get("num-cpus") != "0":
            yield "the head must have num-cpus 0"
        if {workers["replicas"], workers["minReplicas"], workers["maxReplicas"]} != {
            config.cluster.num_workers
        }:
            yield (
                f"cluster.num_workers = {config.cluster.num_workers}, and other numbers of worker"
                " pods"
            )
        has_gpu = (
            "nvidia.com/gpu" in workers["template"]["spec"]["containers"][0]["resources"]["limits"]
        )
        if has_gpu != bool(config.cluster.use_gpu):
            yield "cluster.use_gpu and the workers' nvidia.com/gpu disagree"


POLICY_RULES: tuple[Rule, ...] = (
    non_root,
    no_privilege_escalation,
    capabilities_dropped,
    seccomp,
    read_only_root,
    room_to_write,
    shared_memory,
    nothing_of_the_host,
    no_api_token,
    no_service_links,
    known_kinds,
    secrets_where_needed,
    restricted_namespace,
    resources_set,
    probed,
    images_pinned,
    one_version_of_ray,
    database_driver,
    no_secret_literal,
    token_on,
    references_resolve,
    network_closed,
    listeners_named,
    services_are_internal,
    selectors_match,
    head_kept,
    resumes,
    config_fits,
)
