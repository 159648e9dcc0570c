"""What the tests of the pods share: Secrets, a changed config, a cluster for a while, questions to
MLflow.
"""

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

from .kubelet import Kubelet
from .kuberay import RayCluster
from .manifests import K8S, Object
from .pods import Pod

__all__ = [
    "PATIENCE_S",
    "cluster",
    "edit_config",
    "http_status",
    "rayjob",
    "runs_in_mlflow",
    "secrets",
    "until",
]

PATIENCE_S = 600


def secrets() -> dict[str, dict[str, str]]:
    """Those that README.md has one make, with values of this test's; without the optional hub's
    token.
    """
    text = (K8S / "README.md").read_text().replace("\\\n", " ")
    found = {}
    for name, rest in re.findall(r"create secret generic (\S+) (.*)", text):
        pairs = re.findall(r"--from-literal=([\w-]+)=(\S+)", rest)
        found[name] = {key: random.token_hex(16) if "$" in value else value for key, value in pairs}
    del found["lwo-dist-hub"]
    return found


def rayjob(objects: list[Object]) -> Object:
    (job,) = (thing for thing in objects if thing["kind"] == "RayJob")
    return job


def edit_config(objects: list[Object], edit: Callable[[dict[str, Any]], None]) -> None:
    (of_run,) = (
        thing["data"]
        for thing in objects
        if thing["kind"] == "ConfigMap" and "config.yaml" in thing["data"]
    )
    config = yaml.safe_load(of_run["config.yaml"])
    edit(config)
    of_run["config.yaml"] = yaml.safe_dump(config)


@contextlib.contextmanager
def cluster(node: Kubelet) -> Iterator[RayCluster]:
    """The RayJob's cluster, ready; gone afterwards, with its pods' logs in the report if the test
    failed.
    """
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
        "name": run.info.run_name, "status": run.info.status, "metrics": run.data.metrics,
        "files": list(files(run)),
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
    ask = (
        "import sys, urllib.request, urllib.error\ntry:"
        " print(urllib.request.urlopen(sys.argv[1]).status)"
    )
    ask += "\nexcept urllib.error.HTTPError as error: print(error.code)"
    return pod.exec("sh", "-c", f'exec python -c "$0" "{url}"', ask).stdout.strip()
