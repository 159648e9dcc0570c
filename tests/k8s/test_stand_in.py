"""The manifests' pods as written, without Kubernetes: pods.py is the kubelet, kuberay.py the operator."""

from __future__ import annotations

import contextlib
import json
import re
import secrets as random
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml

from tests.hosts import why_not

from .container import Image
from .images import lwo_dist_image
from .kuberay import RayCluster
from .manifests import K8S, Object, render
from .pods import Kubelet, Pod, kubelet

if (_why := why_not()) is not None:
    pytest.skip(_why, allow_module_level=True)

UID = 1000
PATIENCE_S = 600


def secrets() -> dict[str, dict[str, str]]:
    """Those that README.md has one make, with values of this test's; without the optional hub's token."""
    text = (K8S / "README.md").read_text().replace("\\\n", " ")
    found = {}
    for name, rest in re.findall(r"create secret generic (\S+) (.*)", text):
        pairs = re.findall(r"--from-literal=([\w-]+)=(\S+)", rest)
        found[name] = {key: random.token_hex(16) if "$" in value else value for key, value in pairs}
    del found["lwo-dist-hub"]
    return found


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    return lwo_dist_image(tmp_path_factory.mktemp("image") / "root")


@pytest.fixture(scope="module")
def node(image: Image) -> Iterator[Kubelet]:
    """The overlay cpu-smoke, applied: MLflow runs, the RayJob is the tests'."""
    with kubelet(render("overlays/cpu-smoke"), lambda _: image, secrets()) as node:
        node.deploy()
        yield node


def rayjob(objects: list[Object]) -> Object:
    (job,) = (thing for thing in objects if thing["kind"] == "RayJob")
    return job


def edit_config(objects: list[Object], edit: Callable[[dict[str, Any]], None]) -> None:
    (of_run,) = (thing["data"] for thing in objects if thing["kind"] == "ConfigMap" and "config.yaml" in thing["data"])
    config = yaml.safe_load(of_run["config.yaml"])
    edit(config)
    of_run["config.yaml"] = yaml.safe_dump(config)


@contextlib.contextmanager
def cluster(node: Kubelet) -> Iterator[RayCluster]:
    """The RayJob's cluster, ready; gone afterwards, with its pods' logs in the report if the test failed."""
    made = RayCluster(node, rayjob(node.objects))
    try:
        made.start()
        yield made
    except BaseException:
        for pod in made.pods():
            print(f"===== {pod.name}\n{pod.log[-6000:]}")
        made.remove()
        raise
    made.delete()


def until(done: Callable[[], bool], pod: Pod) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not done():
        if not pod.container.runs or time.monotonic() > deadline:
            pytest.fail(f"{pod.name} ended, or it took too long")
        time.sleep(0.2)


ASK_MLFLOW = """
import json
from mlflow import MlflowClient

client = MlflowClient()

def files(run, folder=None):
    for file in client.list_artifacts(run.info.run_id, folder):
        yield from files(run, file.path) if file.is_dir else [file.path]

experiments = [experiment.experiment_id for experiment in client.search_experiments()]
models = client.search_logged_models(experiments)
print(json.dumps([
    {
        "name": run.info.run_name, "status": run.info.status, "metrics": run.data.metrics, "files": list(files(run)),
        "models": [str(model.status) for model in models if model.source_run_id == run.info.run_id],
    }
    for run in client.search_runs(experiments)
]))
"""


def runs_in_mlflow(pod: Pod, name: str) -> list[dict[str, Any]]:
    """What MLflow's server tells the pod, which asks with its own environment."""
    done = pod.exec("python", "-c", ASK_MLFLOW)
    assert done.returncode == 0, done.stderr
    return [run for run in json.loads(done.stdout.splitlines()[-1]) if run["name"] == name]


def http_status(pod: Pod, url: str) -> str:
    """What the pod gets from `url`, an expression of the shell, without a login or token."""
    ask = "import sys, urllib.request, urllib.error\ntry: print(urllib.request.urlopen(sys.argv[1]).status)"
    ask += "\nexcept urllib.error.HTTPError as error: print(error.code)"
    return pod.exec("sh", "-c", f'exec python -c "$0" "{url}"', ask).stdout.strip()


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

        trained = [actor["address"]["ipAddress"] for actor in ray.actors() if actor["actorClass"] == "RayTrainWorker"]
        assert sorted(trained) == sorted(worker.address for worker in ray.workers)

        (found,) = runs_in_mlflow(ray.head, "smoke")
        assert (found["status"], found["models"]) == ("FINISHED", ["READY"])
        assert {"train/loss", "eval/loss"} <= found["metrics"].keys()
        assert {"config.yaml", "report.html", "pictures/loss_by_layer.png"} <= set(found["files"])
        assert http_status(ray.head, "$MLFLOW_TRACKING_URI/api/2.0/mlflow/experiments/search?max_results=1") == "401"
        assert http_status(ray.head, "http://127.0.0.1:8265/api/jobs/") == ray.status(token="") == "401"
        assert ray.status(token="wrong") == "403"

        for pod in (node.pod("mlflow"), ray.head, *ray.workers):
            assert pod.probe("startup") and pod.probe("readiness") and pod.probe("liveness"), pod.name
            assert pod.over_limit() == []


def _long_run(name: str) -> Callable[[dict[str, Any]], None]:
    """So long that it is in its middle when a pod goes, and saves for no other reason."""

    def edit(config: dict[str, Any]) -> None:
        config["run_name"] = name
        config["train"]["steps"], config["checkpoint"]["steps"] = 300, 1000

    return edit


def _stopped_at(log: str) -> int:
    assert "failed with exit code 75" in log, log
    stopped = re.search(r"stopped by .* at step (\d+); checkpoint (\S+);", log)
    assert stopped and 20 <= int(stopped[1]) < 300 and stopped[2].endswith(f"step_{int(stopped[1]):06d}"), log
    return int(stopped[1])


@pytest.mark.long
def test_a_worker_pod_goes_and_the_next_try_goes_on_from_that_step(node: Kubelet) -> None:
    edit_config(node.objects, _long_run("worker-goes"))
    with cluster(node) as ray:
        submitter = ray.submit()
        until(lambda: "step 20/300" in submitter.log, submitter)
        deletion = ray.workers[0].delete()
        assert deletion.hook is not None and deletion.hook.returncode == 0 and not deletion.killed, deletion
        # Not 1: `ray job logs --follow` takes no notice of how the job ended. The operator asks for that.
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
        submitter = ray.submit()
        until(lambda: "step 20/300" in submitter.log, submitter)
        deletion = ray.head.delete()
        assert deletion.hook is not None and deletion.hook.returncode == 0 and not deletion.killed, deletion
        submitter.wait(PATIENCE_S)
        step = _stopped_at(submitter.log)
        assert "stopped by SIGTERM" in submitter.log
        assert (node.claim("lwo-dist-runs") / "head-goes" / "checkpoints" / f"step_{step:06d}" / "state.json").is_file()


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
    pods += [node.pod_of(thing) for thing in node.objects if thing["kind"] in ("Deployment", "StatefulSet")]
    return {pod["metadata"]["labels"]["lwo-dist/part"]: node.run(_as_probe(pod, script)) for pod in pods}


def test_only_the_volumes_can_be_written(image: Image) -> None:
    places = "/ /usr /etc /etc/lwo-dist /opt/lwo /proc /sys /dev /tmp /runs /scratch /dev/shm /mlflow /etc/mlflow"
    probe = f'id -u; for place in {places}; do if (: >"$place/probe") 2>/dev/null; then echo "$place"; fi; done; true'
    with kubelet(render("overlays/cpu-smoke"), lambda _: image, secrets()) as node:
        found = {}
        for part, pod in _pods_of(node, probe).items():
            assert pod.wait(60) == 0, pod.log
            uid, *found[part] = pod.container.log.split()
            assert uid == str(UID)
    of_ray = ["/tmp", "/runs", "/scratch", "/dev/shm"]
    # The runtime gives every container a /dev/shm of 64 MB.
    assert found == {
        "head": of_ray, "worker": of_ray, "submitter": ["/tmp", "/dev/shm"], "mlflow": ["/tmp", "/dev/shm", "/mlflow"]
    }  # fmt: skip


# Answers on some ports; what `exec` runs in the pod tells which of the doors named by its arguments open.
LISTEN = """
import socket, time
for port in (5000, 6379, 8265, 12345):
    server = socket.socket(); server.bind(("", port)); server.listen(64); globals()[f"server_{port}"] = server
print("listening", flush=True); time.sleep(600)
"""
KNOCK = """
import concurrent.futures, socket, sys
def opens(door):
    host, port = door.split(":")
    try: socket.create_connection((host, int(port)), timeout=1).close()
    except OSError: return ""
    return door
with concurrent.futures.ThreadPoolExecutor(20) as threads: print("\\n".join(threads.map(opens, sys.argv[1:])))
"""


def _open_doors(pods: dict[str, Pod]) -> set[str]:
    names = {pod.address: part for part, pod in pods.items()}
    found = set()
    for part, pod in pods.items():
        doors = [f"{other.address}:{port}" for other in pods.values() if other is not pod for port in PORTS]
        for door in pod.exec("python", "-c", KNOCK, *doors).stdout.split():
            address, _, port = door.partition(":")
            found.add(f"{part} -> {names[address]}:{port}")
    return found


PORTS = (5000, 6379, 8265, 12345)
AMONG_RAY = {f"{a} -> {b}:{port}" for a, b in (("head", "worker"), ("worker", "head")) for port in PORTS}
TO_MLFLOW = {"head -> mlflow:5000", "worker -> mlflow:5000"}
SUBMISSION = {"submitter -> head:8265"}


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
            node.objects[:] = [t for t in everything if (t["kind"], t["metadata"]["name"]) != ("NetworkPolicy", name)]
            node.refresh()
            assert _open_doors(pods) == (AMONG_RAY | TO_MLFLOW | SUBMISSION) - lost, name
