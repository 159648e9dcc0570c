"""Training across three hosts, a head and two workers, started by launch/ray_cluster.sh; and what
happens to them.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.cluster.launching import (
    REPOSITORY,
    Followed,
    environment,
    followed,
    free_port,
    make_inputs,
    overrides,
    summary_of,
)
from tests.hosts import Host, hosts, why_not
from tests.listening import Watch, listed

REASON = why_not()
pytestmark = [pytest.mark.long, pytest.mark.skipif(REASON is not None, reason=str(REASON))]

STEPS, STEPS_PER_LAYER, SAVE_EVERY = 160, 80, 10
CUT_SECONDS = 30
# Two CPUs for each worker, so that there is one on each host.
SETTINGS = (
    f"train.steps={STEPS}",
    "train.sequence_length=256",
    "train.global_batch_size=8",
    "train.logging_steps=5",
    f"lwo.steps_per_layer={STEPS_PER_LAYER}",
    f"checkpoint.steps={SAVE_EVERY}",
    "eval.num_lines=2",
    "eval.max_new_tokens=1",
    "cluster.num_workers=2",
    "cluster.resources_per_worker.CPU=2",
)
STRATEGIES = {
    "fsdp": ("strategy=fsdp",),
    "deepspeed": ("strategy=deepspeed", "deepspeed.zero_stage=3"),
}


class Cluster:
    """The scripts on their hosts, and jobs sent to the head from the head."""

    def __init__(self, folder: Path, stack: ExitStack):
        self.folder = folder
        self.head, *self.workers = stack.enter_context(hosts(3))
        self._stack = stack
        self._environment = environment(
            folder,
            RAY_AUTH_TOKEN="0123456789abcdef" * 4,
            RAY_AUTH_MODE="token",
            OMP_NUM_THREADS="1",
            LWO_VENV=sys.prefix,
            RAY_TMPDIR=str(self.head.ray_folder),
        )
        self.start(self.head)
        self.scripts = [self.start(host) for host in self.workers]

    def start(self, host: Host) -> Followed:
        """launch/ray_cluster.sh, as soon as its Ray runs."""
        role = ["head"] if host is self.head else ["worker", self.head.name]
        script = host.command("bash", str(REPOSITORY / "launch" / "ray_cluster.sh"), *role)
        started = self._stack.enter_context(followed(script, self._environment))
        started.until("Ray runtime started")
        return started

    def submit(self, run_name: str, *more: str) -> Any:
        client = [
            sys.executable,
            "-m",
            "lwo_dist.cli",
            "submit",
            "--address",
            "http://127.0.0.1:8265",
        ]
        return followed(
            self.head.command(
                *client,
                "--working-dir",
                str(self.folder / "home"),
                *self._overrides(run_name, *more),
            ),
            self._environment,
        )

    def _overrides(self, run_name: str, *more: str) -> list[str]:
        return overrides(self.folder, run_name, *SETTINGS, *more)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with ExitStack() as stack:
        yield Cluster(make_inputs(tmp_path_factory.mktemp("hosts")), stack)


@dataclass(frozen=True)
class Unbroken:
    """A run that nothing happened to."""

    strategy: str
    weights: dict[str, torch.Tensor]
    received: list[int]
    """Bytes that came over the workers' links."""


@pytest.fixture(scope="module", params=STRATEGIES)
def unbroken(cluster: Cluster, request: pytest.FixtureRequest) -> Unbroken:
    before = [host.bytes_received() for host in cluster.workers]
    with cluster.submit(
        f"unbroken-{request.param}", *STRATEGIES[request.param], "tracking.enabled=true"
    ) as job:
        said = job.end()
    assert job.process.returncode == 0, said
    received = [
        host.bytes_received() - number for host, number in zip(cluster.workers, before, strict=True)
    ]
    return Unbroken(request.param, weights_of(cluster, f"unbroken-{request.param}"), received)


def weights_of(cluster: Cluster, run_name: str) -> dict[str, torch.Tensor]:
    assert summary_of(cluster.folder, run_name)["steps"] == STEPS
    return load_file(cluster.folder / "runs" / run_name / "model" / "model.safetensors")


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def in_mid_visit(cluster: Cluster, job: Followed, run_name: str) -> None:
    """Wait for a checkpoint in the second visit. The job's log comes seconds late, the folder does
    not.
    """
    job.until("^step ")
    checkpoints = cluster.folder / "runs" / run_name / "checkpoints"
    deadline = time.monotonic() + 120
    while (
        max((int(path.parent.name[-6:]) for path in checkpoints.glob("*/state.json")), default=0)
        <= STEPS_PER_LAYER
    ):
        assert job.process.poll() is None and time.monotonic() < deadline, job.said
        time.sleep(0.05)


def test_a_cluster_listens_as_documented(cluster: Cluster) -> None:
    """While it runs a job."""
    watches = [Watch(host.namespace) for host in (cluster.head, *cluster.workers)]
    with cluster.submit("listening", *STRATEGIES["fsdp"], "train.steps=10") as job:
        said = job.end()
    assert job.process.returncode == 0, said
    head, first, second = [watch.stop() for watch in watches]
    listeners = listed("ray_cluster.sh worker") | listed("lwo-dist submit, worker")
    assert first == second == listeners
    assert head == listed("ray_cluster.sh head") | listed("lwo-dist submit, head")


def test_torchrun_on_two_hosts_listens_as_documented(tmp_path: Path) -> None:
    folder = make_inputs(tmp_path / "inputs")
    with hosts(2) as pair:
        launcher = [
            sys.executable,
            *("-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"),
            *("--master-addr", pair[0].address, "--master-port", str(free_port())),
        ]
        script = [str(REPOSITORY / "launch" / "train.py"), *overrides(folder, "r")]
        settings = environment(folder, OMP_NUM_THREADS="1")
        watches = [Watch(host.namespace) for host in pair]
        agents = [
            host.start(
                *launcher,
                *("--node-rank", str(rank), *script),
                cwd=folder / "home",
                env=settings,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            for rank, host in enumerate(pair)
        ]
        assert [agent.wait(240) for agent in agents] == [0, 0]
        first, second = [watch.stop() for watch in watches]
    assert first == listed("torchrun, several hosts")
    assert second == {("rank", "own")}


def test_a_run_across_hosts(cluster: Cluster, unbroken: Unbroken) -> None:
    from mlflow import MlflowClient

    # In each forward pass a worker gets the half of the fp32 weights that the other one has.
    gathered = STEPS * sum(tensor.numel() for tensor in unbroken.weights.values()) // 2 * 4
    print(
        f"\n{unbroken.strategy}: {unbroken.received} bytes came over the workers' "
        f"links, {gathered} of them in "
        f"forward passes"
    )
    assert all(gathered < number < 10 * gathered for number in unbroken.received)
    summary = summary_of(cluster.folder, f"unbroken-{unbroken.strategy}")
    assert summary["world_size"] == 2
    run = MlflowClient(f"sqlite:///{cluster.folder}/runs/mlflow.db").get_run(
        summary["mlflow_run_id"]
    )
    assert run.info.status == "FINISHED"
    assert sorted(run.data.tags["hosts"].split(", ")) == [host.name for host in cluster.workers]


def test_a_host_that_dies(cluster: Cluster, unbroken: Unbroken) -> None:
    # Rank 0's host once, the other one's once.
    host, run_name = cluster.workers[unbroken.strategy == "fsdp"], f"lost-{unbroken.strategy}"
    with cluster.submit(run_name, *STRATEGIES[unbroken.strategy]) as job:
        in_mid_visit(cluster, job, run_name)
        host.kill()
        lost = time.monotonic()
        job.until("^failure 1 of at most 3")
        noticed = time.monotonic() - lost
        cluster.scripts[cluster.workers.index(host)] = cluster.start(host)
        back = time.monotonic() - lost
        resumed = int(job.until(r"on 2 CPU worker\(s\).*, from step (\d+)")[1])
        took = time.monotonic() - lost
        said = job.end()
    print(
        f"\n{host.name} died: noticed after {noticed:.0f} s, back after {back:.0f} "
        f"s, training goes on from step "
        f"{resumed} after {took:.0f} s"
    )
    assert job.process.returncode == 0, said
    assert STEPS_PER_LAYER < resumed < 2 * STEPS_PER_LAYER
    assert_equal(weights_of(cluster, run_name), unbroken.weights)


def test_a_link_that_is_cut_for_a_while(cluster: Cluster, unbroken: Unbroken) -> None:
    host, run_name = cluster.workers[1], f"cut-{unbroken.strategy}"
    with cluster.submit(run_name, *STRATEGIES[unbroken.strategy]) as job:
        in_mid_visit(cluster, job, run_name)
        host.cut()
        time.sleep(CUT_SECONDS)
        host.mend()
        mended = time.monotonic()
        job.until(r"^step 1[1-6]\d/")
        took = time.monotonic() - mended
        said = job.end()
    failures = "".join(line for line in job.said if line.startswith("failure"))
    print(
        f"\na link was cut for {CUT_SECONDS} s: the next steps came {took:.0f} s after it was"
        f" mended\n{failures}"
    )
    assert job.process.returncode == 0, said
    assert_equal(weights_of(cluster, run_name), unbroken.weights)


def test_a_head_that_dies(cluster: Cluster, unbroken: Unbroken) -> None:
    run_name = f"headless-{unbroken.strategy}"
    with cluster.submit(run_name, *STRATEGIES[unbroken.strategy]) as job:
        in_mid_visit(cluster, job, run_name)
        for script in cluster.scripts:
            script.forget()
        cluster.head.kill()  # and the client, which runs there, too
        lost = time.monotonic()
    cluster.start(cluster.head)
    for script in cluster.scripts:  # They start again by themselves.
        script.until("Ray runtime started")
    back = time.monotonic() - lost
    with cluster.submit(run_name, *STRATEGIES[unbroken.strategy]) as job:
        resumed = int(job.until(r"on 2 CPU worker\(s\).*, from step (\d+)")[1])
        took = time.monotonic() - lost
        said = job.end()
    print(
        f"\nthe head died: all hosts back after {back:.0f} s, training goes on from step {resumed}"
        f" after {took:.0f} s"
    )
    assert job.process.returncode == 0, said
    assert STEPS_PER_LAYER < resumed < 2 * STEPS_PER_LAYER
    assert_equal(weights_of(cluster, run_name), unbroken.weights)
