"""Runs `lwo_dist.run.run` on the workers of Ray Train: a local Ray, or the cluster that RAY_ADDRESS
names.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from lwo_dist import lease
from lwo_dist.access import umask_of
from lwo_dist.config import Config
from lwo_dist.console import say
from lwo_dist.distributed import loopback_only
from lwo_dist.errors import UserError
from lwo_dist.files import absolute_uri
from lwo_dist.stop import Stopped, StopRequest
from lwo_dist.storage import RunFolder

from .nodes import (
    joined_ray,
    local_ray,
    nodes_of_cluster,
    placement_groups,
    remove_placement_groups,
    resources_per_worker,
    room,
    this_machine,
)
from .waiting import watched_waiting
from .worker import Interrupted, forwarded

__all__ = ["train"]

# Ray reads most of its environment when it is imported, so `import ray` stands inside the functions
# here.
_DRIVER_ENVIRONMENT = {
    # The workers' lines as they are: no prefix, no colour, none folded, none printed twice, none
    # late.
    "RAY_DISABLE_WORKER_LOG_PREFIX": "1",
    "RAY_COLOR_PREFIX": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_FLUSH_DRIVER_LOGS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Ray Train looks at its workers every 2 s by default, and each checkpoint waits for a look.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    # For so long a run asks for its slots before it asks again, or, if elastic, for fewer. Ray's
    # default is 60.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",
}
_LOCAL_ENVIRONMENT = {
    # With a token made for this run (below), and not stored in the home folder. Ray requires it
    # on every port except for /metrics.
    "RAY_AUTH_MODE": "token",
    # Makes all of Ray's processes listen on 127.0.0.1, as they do by default on Windows and
    # macOS; there is no other switch for it.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # Preemption is a matter of cloud nodes; its watcher prints a warning at every start.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}
# What the driver knows about hubs, object stores and MLflow, tokens included, the workers know too.
_PASSED_ON = ("HF_", "HUGGING", "TRANSFORMERS_", "MLFLOW_", "AWS_", "GOOGLE_", "AZURE_", "LWO_")
_PATHS = ("_URI", "_HOME", "_CACHE", "_DIR", "_PATH", "_FILE", "_CREDENTIALS", "_BUNDLE")
_TRACEBACK = "lwo_dist_traceback"

# How often workers that cannot connect are started again; after 5, 10, 20, 40 s.
_CONNECTION_ATTEMPTS = 4


def train(config: Config) -> dict[str, Any]:
    """Prepare the run, train it on `config.cluster`'s workers and return its summary.

    Raises:
        UserError: bad input, found here or on a worker; too few CPUs or GPUs; no cluster at
            RAY_ADDRESS.
        Stopped: SIGTERM, SIGUSR1, Ctrl-C, `train.max_seconds`, or Ray took a node away and the
            others have no room. Before the first step, or after a second Ctrl-C, nothing is saved.
        ray.train.TrainingFailedError: another failure of a worker.
    """
    joins = _set_environment()
    stop = StopRequest(config.train.max_seconds)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(umask_of(config.access))
            stack.enter_context(stop.interrupting())
            if joins:
                say("joining Ray")
                nodes = stack.enter_context(joined_ray())
                stack.enter_context(stop.interrupting())  # Ray sets a handler of its own
            else:
                nodes = [this_machine()]
            resources = resources_per_worker(config.cluster, nodes)
            from lwo_dist.driver import ending_tracking, prepare

            config = prepare(config, elsewhere=joins)
            stack.enter_context(ending_tracking(config))
            stack.enter_context(lease.renewed(RunFolder(config.storage, str(config.run_name))))
            if not joins:
                say("starting Ray")
                stack.enter_context(local_ray(nodes[0]))
            say(f"starting {config.cluster.max_workers} worker(s)")
            threads = None if joins else _threads_of_each(config.cluster.max_workers)
            stack.enter_context(stop.listening())
            flag = stack.enter_context(forwarded(stop))
            stack.enter_context(watched_waiting(config, resources, stop))
            return _fit_until_done(config, resources, threads, flag)
    except KeyboardInterrupt:
        from lwo_dist.driver import stopped_early

        # Ray turns a SIGTERM while it starts into its own exit.
        raise stopped_early(config, stop.reason or "SIGTERM") from None
    except Stopped:
        raise
    except Exception as error:
        _raise_user_error(error)
        raise


def _set_environment() -> bool:
    """Set what Ray reads, where the user has not; return whether there is a Ray to join."""
    imported = (
        "ray" in sys.modules
    )  # Then it has read its environment, and a new token would not fit the old mode.
    joins = os.environ.get("RAY_ADDRESS", "local") not in ("", "local")
    if imported and sys.modules["ray"].is_initialized():
        joins = True
    environment = dict(_DRIVER_ENVIRONMENT)
    if not joins and not imported:
        environment |= _LOCAL_ENVIRONMENT | {"RAY_AUTH_TOKEN": secrets.token_hex(32)}
    for name, value in environment.items():
        os.environ.setdefault(name, value)
    return joins


def _fit_until_done(
    config: Config, resources: dict[str, float], threads: int | None, flag: Any
) -> dict[str, Any]:
    """Fit; and again where Ray gives up although the run can go on."""
    from ray.train import ControllerError

    from .failures import cannot_connect, first_line

    failures = 0
    leaving = set[str]()
    while True:
        before = set(placement_groups())
        try:
            outcome = _fit(config, resources, threads, flag)
        except ControllerError as error:
            if not cannot_connect(error) or failures == _CONNECTION_ATTEMPTS:
                raise
            problem = first_line(error.controller_failure)
        else:
            if not isinstance(outcome, Interrupted):
                summary: dict[str, Any] = outcome
                return summary
            # A node that is taken away takes only its workers along, if the others have room for
            # them. One that was announced earlier may still be alive, but Ray places nothing on it
            # any more.
            lost = outcome.preempted_nodes
            leaving |= set(lost)
            if (
                not lost
                or room(nodes_of_cluster(without=leaving), resources) < config.cluster.min_workers
            ):
                raise outcome.stopped
            print(f"{outcome.stopped}; going on without it", flush=True)
            continue
        # Ray 2.60 leaves them behind after such a failure, and the next attempt would wait for
        # their room for ever.
        remove_placement_groups(set(placement_groups()) - before)
        wait = 5 * 2**failures
        failures += 1
        print(
            f"the workers could not connect ({problem}); trying again in {wait} s ({failures} of "
            f"{_CONNECTION_ATTEMPTS})",
            flush=True,
        )
        time.sleep(wait)


def _fit(config: Config, resources: dict[str, float], threads: int | None, flag: Any) -> Any:
    """The summary, or Interrupted."""
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig

    from .failures import Failures
    from .trainer import Trainer

    cluster = config.cluster
    use_gpu = "GPU" in resources
    run_config = RunConfig(
        # Ray's folder is the run's own: a checkpoint that is reported must lie in it.
        name=config.run_name,
        storage_path=config.storage,
        failure_config=FailureConfig(max_failures=cluster.max_failures),
        worker_runtime_env={"env_vars": _worker_environment(cluster.env, threads)},
        logging_config=LoggingConfig(log_level="CRITICAL"),
        callbacks=[Failures(cluster.max_failures)],
    )
    _forget_reports(run_config.storage_context)
    trainer = Trainer(
        _train_loop(config, flag),
        # Connecting takes its time on a busy machine.
        torch_config=TorchConfig(
            backend="nccl" if use_gpu else "gloo", timeout_s=max(120, cluster.timeout_s)
        ),
        scaling_config=ScalingConfig(
            num_workers=cluster.num_workers,
            use_gpu=use_gpu,
            resources_per_worker=resources,
            elastic_resize_monitor_interval_s=cluster.elastic_resize_monitor_interval_s,
        ),
        run_config=run_config,
    )
    try:
        return trainer.fit().return_value
    except KeyboardInterrupt:
        trainer.abort()
        raise


def _threads_of_each(workers: int) -> int:
    """Threads for each of the workers of this machine.

    Together as many as torch would start: one for each physical core that this process may use.
    More of them wait for each other, and hyperthreads share the units that multiply.
    """
    import torch

    return max(1, torch.get_num_threads() // workers)


def _worker_environment(given: Mapping[str, str], threads: int | None) -> dict[str, str]:
    """The variables that a worker gets besides those of its node.

    Args:
        given: `cluster.env`, which goes before all else.
        threads: of each worker of a local Ray. None: of a cluster, where Ray sets as many as the
            worker asks for CPUs.
    """
    environment = {**(loopback_only() if threads is not None else {}), **given}
    chosen = os.environ.get("OMP_NUM_THREADS", threads)
    if chosen is not None:
        environment.setdefault("OMP_NUM_THREADS", str(chosen))
    return environment


def _forget_reports(storage: Any) -> None:
    """Remove Ray's list of the checkpoints of an earlier driver.

    Ray refuses to start where one of them is gone, and we have pruned them. Our store knows which
    there are.
    """
    with contextlib.suppress(FileNotFoundError):
        storage.storage_filesystem.delete_file(storage.checkpoint_manager_snapshot_path)


def _train_loop(config: Config, flag: Any = None) -> Callable[[], Any]:
    # In the function that is sent, not in a runtime_env: Ray writes that into its logs and shows it
    # on its pages.
    environment = _passed_on(os.environ)
    holder = lease.this_process()["holder"]

    def train_loop_per_worker() -> Any:
        os.environ.update(environment)
        from .worker import run_on_worker

        try:
            with umask_of(config.access):
                return run_on_worker(config, flag, holder)
        except Exception as error:
            # Ray sends the exception without its traceback, and shows 1,000 characters of that.
            now = datetime.now(UTC).isoformat(timespec="milliseconds")
            where = f"{now} rank {os.environ['RANK']} on {socket.gethostname()}"
            error.__dict__[_TRACEBACK] = f"{where}: {traceback.format_exc()}"
            raise

    return train_loop_per_worker


def _passed_on(environment: Mapping[str, str]) -> dict[str, str]:
    """What the workers get of the driver's environment. Ray Train moves each to a folder of its
    own, so paths are absolute."""
    return {
        name: absolute_uri(value) if name.endswith(_PATHS) else value
        for name, value in environment.items()
        if name.startswith(_PASSED_ON)
    }


def _raise_user_error(error: BaseException) -> None:
    """Raise the UserError that is behind Ray's `error`; else note the traceback of the worker that
    failed first.
    """
    failures = list(getattr(error, "worker_failures", {}).values())
    for failure in [*failures, getattr(error, "controller_failure", None)]:
        if isinstance(failure, UserError):
            raise failure from None
    tracebacks = sorted(filter(None, (getattr(failure, _TRACEBACK, None) for failure in failures)))
    if tracebacks:
        error.add_note(tracebacks[0])
