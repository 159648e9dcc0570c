"""The manifests' pods as written, without Kubernetes: kubelet.py is the kubelet, kuberay.py the
operator.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from .container import Image
from .kubelet import Kubelet, kubelet
from .kuberay import RayCluster
from .manifests import Object, render
from .pods import Pod
from .stand_in import (
    PATIENCE_S,
    cluster,
    edit_config,
    http_status,
    rayjob,
    runs_in_mlflow,
    secrets,
    until,
)

UID = 1000


@pytest.fixture(scope="module")
def node(image: Image) -> Iterator[Kubelet]:
    """The overlay cpu-smoke, applied: MLflow runs, the RayJob is the tests'."""
    with kubelet(render("overlays/cpu-smoke"), lambda _: image, secrets()) as node:
        node.deploy()
        yield node


@pytest.mark.long
def test_the_main_job_ends_well(node: Kubelet) -> None:
    with cluster(node) as ray:
        submitter = ray.submit()
        assert submitter.wait(PATIENCE_S) == 0
        assert ray.status() == "SUCCEEDED: Job finished successfully."
        for line in ("lwo with fsdp on 2 CPU worker(s)", "step 20/20", "model: /runs/smoke/model"):
            assert line in submitter.log

        run = node.claim("lwo-dist-runs") / "smoke"
        summary = json.loads((run / "summary.json").read_text())
        assert (summary["steps"], summary["world_size"]) == (20, 2)
        assert {file.stat().st_uid for file in run.rglob("*")} == {UID}
        assert (run / "model" / "model.safetensors").is_file()

        trained = [
            actor["address"]["ipAddress"]
            for actor in ray.actors()
            if actor["actorClass"] == "RayTrainWorker"
        ]
        assert sorted(trained) == sorted(worker.address for worker in ray.workers)

        (found,) = runs_in_mlflow(ray.head, "smoke")
        assert (found["status"], found["models"]) == ("FINISHED", ["READY"])
        assert {"train/loss", "eval/loss"} <= found["metrics"].keys()
        assert {"config.yaml", "report.html", "pictures/loss_by_layer.png"} <= set(found["files"])
        assert (
            http_status(
                ray.head, "$MLFLOW_TRACKING_URI/api/2.0/mlflow/experiments/search?max_results=1"
            )
            == "401"
        )
        assert (
            http_status(ray.head, "http://127.0.0.1:8265/api/jobs/")
            == ray.status(token="")
            == "401"
        )
        assert ray.status(token="wrong") == "403"

        for pod in (node.pod("mlflow"), ray.head, *ray.workers):
            assert pod.probe("startup") and pod.probe("readiness") and pod.probe("liveness"), (
                pod.name
            )
            assert pod.over_limit() == []


def _long_run(name: str) -> Callable[[dict[str, Any]], None]:
    """So long that it is in its middle when a pod goes, and saves for no other reason."""

    def edit(config: dict[str, Any]) -> None:
        config["run_name"] = name
        config["train"]["steps"], config["checkpoint"]["steps"] = 300, 1000

    return edit


def _submit_and_take_away(ray: RayCluster, pod: Pod) -> Pod:
    """The submitter of a run that was in its middle when `pod` was deleted; its hook had the run
    leave in time.
    """
    submitter = ray.submit()
    until(lambda: "step 20/300" in submitter.log, submitter)
    deletion = pod.delete()
    assert deletion.hook is not None and deletion.hook.returncode == 0 and not deletion.killed, (
        deletion
    )
    return submitter


def _stopped_at(log: str) -> int:
    assert "failed with exit code 75" in log, log
    stopped = re.search(r"stopped by .* at step (\d+); checkpoint (\S+);", log)
    assert (
        stopped
        and 20 <= int(stopped[1]) < 300
        and stopped[2].endswith(f"step_{int(stopped[1]):06d}")
    ), log
    return int(stopped[1])


@pytest.mark.long
def test_a_worker_pod_goes_and_the_next_try_goes_on_from_that_step(node: Kubelet) -> None:
    edit_config(node.objects, _long_run("worker-goes"))
    with cluster(node) as ray:
        submitter = _submit_and_take_away(ray, ray.workers[0])
        # Not 1: `ray job logs --follow` takes no notice of how the job ended. The operator asks for
        # that.
        assert submitter.wait(PATIENCE_S) == 0
        assert ray.status().startswith("FAILED")
        step = _stopped_at(submitter.log)
        assert "stopped by the preemption of node" in submitter.log
    with cluster(node) as ray:  # backoffLimit's.
        submitter = ray.submit()
        assert submitter.wait(PATIENCE_S) == 0
        assert ray.status().startswith("SUCCEEDED")
        assert f", from step {step}\n" in submitter.log
        (found,) = runs_in_mlflow(ray.head, "worker-goes")
        assert found["status"] == "FINISHED"


@pytest.mark.long
def test_the_head_pod_goes_and_the_run_is_saved_before(node: Kubelet) -> None:
    edit_config(node.objects, _long_run("head-goes"))
    with cluster(node) as ray:
        submitter = _submit_and_take_away(ray, ray.head)
        submitter.wait(PATIENCE_S)
        step = _stopped_at(submitter.log)
        assert "stopped by SIGTERM" in submitter.log
        assert (
            node.claim("lwo-dist-runs")
            / "head-goes"
            / "checkpoints"
            / f"step_{step:06d}"
            / "state.json"
        ).is_file()


def _as_probe(pod: Object, script: str) -> Object:
    """The pod, with a script in place of what its container does."""
    (container,) = pod["spec"]["containers"]
    container["command"], container["args"] = ["sh", "-c", script], []
    pod["spec"].pop("initContainers", None)
    return pod


def _pods_of(node: Kubelet, script: str) -> dict[str, Pod]:
    """One pod of each kind, running `script`."""
    ray = RayCluster(node, rayjob(node.objects))
    pods = [ray.head_pod(), next(ray.worker_pods()), ray.submitter_pod()]
    pods += [
        node.pod_of(thing)
        for thing in node.objects
        if thing["kind"] in ("Deployment", "StatefulSet")
    ]
    return {
        pod["metadata"]["labels"]["lwo-dist/part"]: node.run(_as_probe(pod, script)) for pod in pods
    }


def test_only_the_volumes_can_be_written(image: Image) -> None:
    places = (
        "/ /usr /etc /etc/lwo-dist /opt/lwo /proc /sys /dev /tmp /runs /scratch /dev/shm /mlflow"
        " /etc/mlflow"
    )
    probe = "id -u; awk '$2 == \"/\" {print substr($4, 1, 2)}' /proc/mounts; "
    probe += "awk '/^(CapBnd|NoNewPrivs)/ {print $2}' /proc/self/status; "
    probe += (
        f'for place in {places}; do if (: >"$place/probe") 2>/dev/null; then echo "$place"; fi;'
        " done; true"
    )
    with kubelet(render("overlays/cpu-smoke"), lambda _: image, secrets()) as node:
        found = {}
        for part, pod in _pods_of(node, probe).items():
            assert pod.wait(60) == 0, pod.log
            uid, root, capabilities, no_new_privileges, *found[part] = pod.container.log.split()
            assert (uid, root, int(capabilities, 16), no_new_privileges) == (str(UID), "ro", 0, "1")
    of_ray = ["/tmp", "/runs", "/scratch", "/dev/shm"]
    # The runtime gives every container a /dev/shm of 64 MB.
    assert found == {
        "head": of_ray,
        "worker": of_ray,
        "submitter": ["/tmp", "/dev/shm"],
        "mlflow": ["/tmp", "/dev/shm", "/mlflow"],
    }


# Answers on some ports; what `exec` runs in the pod tells which of the doors named by its arguments
# open.
LISTEN = """
import socket, time
for port in (5000, 6379, 8265, 12345):
    server = socket.socket(); server.bind(("", port)); server.listen(64)
    globals()[f"server_{port}"] = server
print("listening", flush=True); time.sleep(600)
"""
KNOCK = """
import concurrent.futures, socket, sys
def opens(door):
    host, port = door.split(":")
    try: socket.create_connection((host, int(port)), timeout=1).close()
    except OSError: return ""
    return door
with concurrent.futures.ThreadPoolExecutor(20) as threads:
    print("\\n".join(threads.map(opens, sys.argv[1:])))
"""


def _opened(pod: Pod, *doors: str) -> list[str]:
    return pod.exec("python", "-c", KNOCK, *doors).stdout.split()


def _open_doors(pods: dict[str, Pod]) -> set[str]:
    names = {pod.address: part for part, pod in pods.items()}
    found = set()
    for part, pod in pods.items():
        doors = [
            f"{other.address}:{port}"
            for other in pods.values()
            if other is not pod
            for port in PORTS
        ]
        for door in _opened(pod, *doors):
            address, _, port = door.partition(":")
            found.add(f"{part} -> {names[address]}:{port}")
    return found


PORTS = (5000, 6379, 8265, 12345)
AMONG_RAY = {
    f"{a} -> {b}:{port}" for a, b in (("head", "worker"), ("worker", "head")) for port in PORTS
}
TO_MLFLOW = {"head -> mlflow:5000", "worker -> mlflow:5000"}
SUBMISSION = {"submitter -> head:8265"}


@pytest.mark.long
def test_the_network_policies_let_in_whom_they_name(image: Image) -> None:
    with kubelet(render("overlays/cpu-smoke"), lambda _: image, secrets()) as node:
        pods = _pods_of(node, f"exec python -c '{LISTEN}'")
        for pod in pods.values():
            until(lambda pod=pod: "listening" in pod.log, pod)  # type: ignore[misc]
        assert _open_doors(pods) == AMONG_RAY | TO_MLFLOW | SUBMISSION
        everything = list(node.objects)
        lost_without = {
            "ray": AMONG_RAY | TO_MLFLOW,
            "dashboard": SUBMISSION,
            "submitter": SUBMISSION,
            "mlflow": TO_MLFLOW,
        }
        for name, lost in lost_without.items():
            node.objects[:] = [
                t
                for t in everything
                if (t["kind"], t["metadata"]["name"]) != ("NetworkPolicy", name)
            ]
            node.refresh()
            assert _open_doors(pods) == (AMONG_RAY | TO_MLFLOW | SUBMISSION) - lost, name


def test_a_service_opens_its_own_ports_and_leads_to_the_pods_that_are_ready(image: Image) -> None:
    objects = render("overlays/cpu-smoke")
    (service,) = (thing for thing in objects if thing["kind"] == "Service")
    service["spec"]["ports"] = [{"name": "web", "port": 80, "targetPort": "http"}]
    doors = ["lwo-dist-mlflow:80", "lwo-dist-mlflow.lwo-dist:80", "lwo-dist-mlflow:5000"]
    with kubelet(objects, lambda _: image, secrets()) as node:
        pods = _pods_of(node, f"exec python -c '{LISTEN}'")
        mlflow, head = pods["mlflow"], pods["head"]
        until(lambda: "listening" in mlflow.log, mlflow)
        assert _opened(head, *doors) == []
        mlflow.ready = True
        node.refresh()
        assert _opened(head, *doors) == doors[:2]
        # The policy is about the pod's port, wherever the connection came in.
        assert _opened(pods["submitter"], *doors) == []
        service["spec"]["clusterIP"] = "None"
        node.refresh()
        assert _opened(head, *doors) == doors[2:]
