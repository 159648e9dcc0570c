"""Runs `lwo_dist.run.run` on the workers of Ray Train: a local Ray, or the cluster that RAY_ADDRESS names."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shlex
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from lwo_dist.config import ClusterConfig, Config, UserError
from lwo_dist.storage import storage_folder

__all__ = ["train"]

# Ray reads most of its environment when it is imported, so `import ray` stands inside the functions here.
_DRIVER_ENVIRONMENT = {
    # The workers' lines as they are: no prefix, no colour, none folded, none printed twice, none late.
    "RAY_DISABLE_WORKER_LOG_PREFIX": "1",
    "RAY_COLOR_PREFIX": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_FLUSH_DRIVER_LOGS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Ray Train looks at its workers every 2 s by default, and each checkpoint waits for a look.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
}
_LOCAL_ENVIRONMENT = {
    # A token of this run's own, below: nobody else on the machine gets in, and no file is made in the home folder.
    "RAY_AUTH_MODE": "token",
    # Preemption is a matter of cloud nodes; its watcher prints a warning at every start.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}
# What the driver knows about hubs, object stores and MLflow, tokens included, the workers know too.
_PASSED_ON = ("HF_", "HUGGING", "TRANSFORMERS_", "MLFLOW_", "AWS_", "GOOGLE_", "AZURE_", "LWO_")
_TRACEBACK = "lwo_dist_traceback"

_Node = Mapping[str, float]
"""What a node offers: CPU, GPU, memory (bytes), ... -> amount."""


def train(config: Config) -> dict[str, Any]:
    """Prepare the run, train it on `config.cluster`'s workers and return its summary.

    Raises:
        UserError: bad input, found here or on a worker; too few CPUs or GPUs; no cluster at RAY_ADDRESS.
        ray.train.TrainingFailedError: another failure of a worker.
        KeyboardInterrupt: Ctrl-C; the workers are gone by then.
    """
    joins = _set_environment()
    with contextlib.ExitStack() as stack:
        nodes = stack.enter_context(_joined_ray()) if joins else [_this_machine()]
        resources = _resources_per_worker(config.cluster, nodes)
        from lwo_dist.run import prepare  # After the first check: it brings transformers and more.

        config = prepare(config)
        if not joins:
            stack.enter_context(_local_ray(nodes[0]))
        threads = None if joins else max(1, int(nodes[0]["CPU"]) // config.cluster.num_workers)
        try:
            return _fit(config, resources, threads)
        except BaseException as error:
            from lwo_dist.tracking.mlflow import end_run

            # Workers that were killed could not tell MLflow.
            status = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
            end_run(config, storage_folder(config.storage), str(config.run_name), status)
            _raise_user_error(error)
            raise


def _set_environment() -> bool:
    """Set what Ray reads, where the user has not; return whether there is a Ray to join."""
    imported = "ray" in sys.modules  # Then it has read its environment, and a new token would not fit the old mode.
    joins = os.environ.get("RAY_ADDRESS", "local") not in ("", "local")
    if imported and sys.modules["ray"].is_initialized():
        joins = True
    environment = dict(_DRIVER_ENVIRONMENT)
    if not joins and not imported:
        environment |= _LOCAL_ENVIRONMENT | {"RAY_AUTH_TOKEN": secrets.token_hex(32)}
    for name, value in environment.items():
        os.environ.setdefault(name, value)
    return joins


def _resources_per_worker(cluster: ClusterConfig, nodes: list[_Node]) -> dict[str, float]:
    """What one worker takes. Raises UserError where the workers do not all fit: Ray would wait for ever."""
    on_gpu: dict[str, float] = {"CPU": 1, "GPU": 1, **cluster.resources_per_worker}
    on_cpu: dict[str, float] = {"CPU": 1, **cluster.resources_per_worker}
    if cluster.use_gpu is None:
        wanted = on_gpu if _room(nodes, on_gpu) >= cluster.num_workers else on_cpu
    else:
        wanted = on_gpu if cluster.use_gpu else on_cpu
    room = _room(nodes, wanted)
    if room < cluster.num_workers:
        offer = ", ".join(f"{sum(node.get(name, 0) for node in nodes):g} {name}s" for name in wanted)
        needs = ", ".join(f"{amount:g} {name}" for name, amount in wanted.items())
        lower = "set cluster.use_gpu=false" if "GPU" in wanted else "lower cluster.resources_per_worker"
        remedy = f"set it to at most {room}" if room else lower
        raise UserError(
            f"cluster.num_workers = {cluster.num_workers}: this Ray cluster has {offer}, and a worker takes {needs}; "
            f"{remedy}, or add nodes"
        )
    return wanted


def _room(nodes: list[_Node], wanted: Mapping[str, float]) -> int:
    """How many workers fit, each wholly on one node."""
    asked = {name: amount for name, amount in wanted.items() if amount > 0}
    return sum(min((int(node.get(name, 0) // amount) for name, amount in asked.items()), default=1) for node in nodes)


def _this_machine() -> _Node:
    import torch

    # Ray is told the same numbers, so that what was checked is what there is.
    allowed = getattr(os, "sched_getaffinity", None)
    return {"CPU": len(allowed(0)) if allowed else os.cpu_count() or 1, "GPU": torch.cuda.device_count()}


@contextlib.contextmanager
def _joined_ray() -> Iterator[list[_Node]]:
    """The nodes of the caller's Ray, which is the caller's to end, or of the cluster at RAY_ADDRESS."""
    import ray

    ours = not ray.is_initialized()
    if ours:
        address = os.environ["RAY_ADDRESS"]
        try:
            host, _, port = address.removeprefix("ray://").rpartition(":")
            if port.isdigit():  # Ray itself would try for minutes.
                socket.create_connection((host, int(port)), timeout=10).close()
            ray.init(address=address, logging_level=logging.WARNING)
        except (OSError, ValueError) as error:
            raise UserError(
                f"RAY_ADDRESS = {address}: no Ray can be joined there ({error}); give host:port of a running Ray, and "
                "its token in RAY_AUTH_TOKEN if it has one, or unset RAY_ADDRESS for a local Ray"
            ) from None
    try:
        yield [node["Resources"] for node in ray.nodes() if node["Alive"]]
    finally:
        if ours:
            ray.shutdown()


@contextlib.contextmanager
def _local_ray(machine: _Node) -> Iterator[None]:
    import ray

    # Else Ray's own actors look for "the" Ray of the machine, and complain where there are two.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{port}"
    # Ray starts workers through a shell and does not quote a path with spaces.
    python = shlex.quote(sys.executable)
    ray.init(
        address="local",
        dashboard_host="127.0.0.1",
        dashboard_port=port,
        num_cpus=int(machine["CPU"]),
        num_gpus=int(machine["GPU"]),
        runtime_env={} if python == sys.executable else {"py_executable": python},
        logging_level=logging.WARNING,
        **_short_temp_dir(),
    )
    try:
        yield
    finally:
        ray.shutdown()
        del os.environ["RAY_API_SERVER_ADDRESS"]


def _short_temp_dir() -> dict[str, str]:
    # Ray puts sockets about 70 characters below this folder, and a socket's path has at most 107 bytes.
    folder = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    return {} if len(os.fsencode(folder)) <= 35 else {"_temp_dir": "/tmp/ray"}


def _fit(config: Config, resources: dict[str, float], threads: int | None) -> dict[str, Any]:
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    use_gpu = "GPU" in resources
    worker_environment = dict(config.cluster.env)
    if "OMP_NUM_THREADS" in os.environ or threads is not None:
        worker_environment.setdefault("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", str(threads)))
    trainer = TorchTrainer(
        _train_loop(config),
        # Ray Train does not try again when workers fail to connect, and on a busy machine they take their time.
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo", timeout_s=max(120, config.cluster.timeout_s)),
        scaling_config=ScalingConfig(
            num_workers=config.cluster.num_workers, use_gpu=use_gpu, resources_per_worker=resources
        ),
        run_config=RunConfig(
            name="ray",
            storage_path=f"{config.storage}/{config.run_name}",
            # The next command with this run_name goes on from the last checkpoint.
            failure_config=FailureConfig(max_failures=0),
            worker_runtime_env={"env_vars": worker_environment},
            logging_config=LoggingConfig(log_level="CRITICAL"),
        ),
    )
    handler = signal.getsignal(signal.SIGINT)
    try:
        summary: dict[str, Any] = trainer.fit().return_value
    except SystemExit:  # Ray's handler of Ctrl-C ends the workers, then exits with 0, as if all were well.
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGINT, handler)
    return summary


def _train_loop(config: Config) -> Callable[[], dict[str, Any] | None]:
    # In the function that is sent, not in a runtime_env: Ray writes that into its logs and shows it on its pages.
    environment = {name: value for name, value in os.environ.items() if name.startswith(_PASSED_ON)}

    def train_loop_per_worker() -> dict[str, Any] | None:
        os.environ.update(environment)
        from lwo_dist.run import run

        from .gauges import RayGauges

        try:
            return run(config, [RayGauges()])
        except Exception as error:
            # Ray sends the exception without its traceback, and shows 1,000 characters of that.
            now = datetime.now(UTC).isoformat(timespec="milliseconds")
            where = f"{now} rank {os.environ['RANK']} on {socket.gethostname()}"
            error.__dict__[_TRACEBACK] = f"{where}: {traceback.format_exc()}"
            raise

    return train_loop_per_worker


def _raise_user_error(error: BaseException) -> None:
    """Raise the UserError that is behind Ray's `error`; else note the traceback of the worker that failed first."""
    failures = getattr(error, "worker_failures", {}).values()
    for failure in failures:
        if isinstance(failure, UserError):
            raise failure from None
    tracebacks = sorted(filter(None, (getattr(failure, _TRACEBACK, None) for failure in failures)))
    if tracebacks:
        error.add_note(tracebacks[0])
