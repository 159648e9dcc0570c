"""What Ray may try again, and what we try again because Ray does not."""

from __future__ import annotations

import pickle
import re
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import RayTaskError
from ray.train import ControllerError, WorkerGroupError

from lwo_dist import lease
from lwo_dist.cluster import nodes, ray_train, worker
from lwo_dist.cluster.failures import Failures, cannot_connect
from lwo_dist.cluster.worker import Interrupted
from lwo_dist.config import ClusterConfig, Config
from lwo_dist.errors import UserError
from lwo_dist.stop import Stopped
from lwo_dist.storage import RunFolder

CONFIG = Config(run_name="r")


def in_a_task(cause: Exception) -> ControllerError:
    """As Ray's controller fails when a task on a worker did, before training began."""
    return ControllerError(RayTaskError("_setup_torch_process_group", "traceback", cause))


CANNOT_CONNECT = in_a_task(RuntimeError("Gloo connectFullMesh failed with ...\nand more"))


def fits(monkeypatch: pytest.MonkeyPatch, *outcomes: Any) -> list[float]:
    """Let Ray's fit end so, one after the other; the seconds that were waited."""
    waits: list[float] = []
    left = list(outcomes)

    def fit(*_: Any) -> Any:
        assert groups == {"the caller's"}
        outcome = left.pop(0)
        if isinstance(outcome, Exception):
            groups.add(f"of attempt {len(left)}")
            raise outcome
        return outcome

    monkeypatch.setattr(ray_train, "_fit", fit)
    # Each attempt leaves one behind, beside one of the caller's own; it must not.
    groups = {"the caller's"}
    monkeypatch.setattr(ray_train, "placement_groups", lambda: set(groups))
    monkeypatch.setattr(ray_train, "remove_placement_groups", groups.difference_update)
    monkeypatch.setattr(ray_train.time, "sleep", waits.append)
    return waits


def fit() -> Any:
    return ray_train._fit_until_done(CONFIG, {"CPU": 1}, None, None)


def test_workers_that_cannot_connect_are_started_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waits = fits(monkeypatch, CANNOT_CONNECT, in_a_task(ConnectionError("reset")), {"steps": 3})
    assert fit() == {"steps": 3}
    assert waits == [5, 10]
    first, second = capsys.readouterr().out.splitlines()
    assert (
        first
        == "the workers could not connect (RayTaskError: Gloo connectFullMesh failed with ...);"
        " trying again in 5 s (1 of 4)"
    )
    assert second.endswith("trying again in 10 s (2 of 4)")


def test_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = fits(monkeypatch, *[CANNOT_CONNECT] * 5)
    with pytest.raises(ControllerError):
        fit()
    assert waits == [5, 10, 20, 40]


@pytest.mark.parametrize(
    "error",
    [
        ControllerError(UserError("no model there")),
        in_a_task(UserError("no model there")),
        in_a_task(ImportError("no lwo_dist there")),
        WorkerGroupError("failed in training", {0: RuntimeError("Gloo connectFullMesh failed")}),
    ],
)
def test_nothing_else_is(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    assert not cannot_connect(error)
    fits(monkeypatch, error)
    with pytest.raises(type(error)):
        fit()


def test_a_user_error_ends_the_run_whatever_max_failures_says() -> None:
    error = UserError("no model there")
    with pytest.raises(UserError, match="no model there"):
        Failures(-1).after_exception(None, {0: RuntimeError("peer is gone"), 1: error})
    with pytest.raises(UserError, match="no model there"):
        ray_train._raise_user_error(ControllerError(error))


def test_a_worker_s_traceback_comes_along(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray sends the exception without it; the long form is `test_ray_train.py`'s."""

    def fails(*_: Any) -> None:
        Path("/dev/null/evaluations").mkdir()

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(worker, "run_on_worker", fails)
    with pytest.raises(OSError) as raised:
        ray_train._train_loop(CONFIG)()
    sent = pickle.loads(pickle.dumps(raised.value))
    error = WorkerGroupError("failed in training", {0: sent})
    ray_train._raise_user_error(error)
    (note,) = error.__notes__
    assert re.search(r"rank 0 on .*: Traceback", note)
    assert "in fails" in note and "/dev/null/evaluations" in note


def test_a_restart_is_said_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([100.0, 100.2, 101.5, 110.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    failures = Failures(1)
    for _ in range(4):
        failures.after_exception(None, {1: RuntimeError("out of memory\nsome lines")})
    monkeypatch.undo()
    assert capsys.readouterr().out.splitlines() == [
        (
            "failure 1 of at most 1 (cluster.max_failures): rank 1: RuntimeError: out of memory;"
            " the workers start again from the newest checkpoint"
        ),
        (
            "failure 2 of at most 1 (cluster.max_failures): rank 1: RuntimeError: out of memory; no"
            " more restarts"
        ),
    ]


@pytest.mark.parametrize(("is_lost", "ended"), [(False, ["FAILED"]), (True, [])])
def test_the_end_of_a_run_that_is_lost_is_for_the_other_process_to_say(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, is_lost: bool, ended: list[str]
) -> None:
    run = RunFolder(str(tmp_path), "r")
    said: list[str] = []

    def prepare(config: Config, *, elsewhere: bool) -> Config:
        lease.take(run)
        return config

    def fails(*_: Any) -> None:
        if is_lost:
            other = {**lease.this_process(), "holder": "0123456789abcdef"}
            with monkeypatch.context() as patch:
                patch.setattr(lease, "this_process", lambda: other)
                lease.take(run, force=True)
        raise RuntimeError("peer is gone")

    monkeypatch.setattr(ray_train, "_set_environment", lambda: True)
    monkeypatch.setattr(ray_train, "joined_ray", lambda: nullcontext([]))
    monkeypatch.setattr(ray_train, "resources_per_worker", lambda *_: {"CPU": 1})
    monkeypatch.setattr("lwo_dist.driver.prepare", prepare)
    monkeypatch.setattr(ray_train, "forwarded", lambda _: nullcontext())
    monkeypatch.setattr(ray_train, "watched_waiting", lambda *_: nullcontext())
    monkeypatch.setattr(ray_train, "_fit_until_done", fails)
    monkeypatch.setattr("lwo_dist.driver.end_run", lambda *told: said.append(told[-1]))
    with pytest.raises(RuntimeError, match="peer is gone"):
        ray_train.train(Config(run_name="r", storage=str(tmp_path)))
    assert said == ended


def interrupted(*preempted: str) -> Interrupted:
    return Interrupted(Stopped("SIGTERM", 7, Path("/r/checkpoints/step_000007")), preempted)


@pytest.mark.parametrize(("others", "goes_on"), [([{"CPU": 1.0}], True), ([{"CPU": 0.0}], False)])
def test_a_preempted_node_takes_only_its_workers_along(
    monkeypatch: pytest.MonkeyPatch, others: list[nodes.Node], goes_on: bool
) -> None:
    monkeypatch.setattr(
        ray_train, "nodes_of_cluster", lambda without: others if without == {"n"} else []
    )
    fits(monkeypatch, interrupted("n"), {"steps": 3})
    if goes_on:
        assert fit() == {"steps": 3}
    else:
        with pytest.raises(Stopped):
            fit()


def test_a_node_that_was_announced_before_gives_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    # Both are still alive when the second one is announced.
    cluster = {"m": {"CPU": 1.0}, "n": {"CPU": 1.0}, "o": {"CPU": 1.0}}
    alive = lambda without: [node for name, node in cluster.items() if name not in without]  # noqa: E731
    monkeypatch.setattr(ray_train, "nodes_of_cluster", alive)
    fits(monkeypatch, interrupted("n"), interrupted("m"), interrupted("o"), {"steps": 3})
    with pytest.raises(Stopped, match="preemption|stopped"):
        fit()


def test_a_stop_is_final(monkeypatch: pytest.MonkeyPatch) -> None:
    fits(monkeypatch, interrupted())
    with pytest.raises(
        Stopped, match="stopped by SIGTERM at step 7; checkpoint /r/checkpoints/step_000007"
    ):
        fit()


def test_room_for_the_fewest_workers_is_enough() -> None:
    elastic = ClusterConfig(num_workers=(1, 4))
    assert nodes.resources_per_worker(elastic, [{"CPU": 2.0, "GPU": 0}]) == {"CPU": 1}
    with pytest.raises(
        UserError, match=r"^cluster.num_workers = \[3, 4\]: .* set it to at most 2, or add nodes"
    ):
        nodes.resources_per_worker(ClusterConfig(num_workers=(3, 4)), [{"CPU": 2.0, "GPU": 0}])
