"""What the meter says of the steps that it was told of."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from lwo_dist.hook import LWO
from lwo_dist.tasks.completion import LineCompletion
from lwo_dist.training.meter import Meter
from lwo_dist.training.results import Results
from lwo_dist.training.system_metrics import SystemMetrics
from tests import oracle
from tests.distributed.training import attach
from tests.ranks import run_ranks

CPU = torch.device("cpu")
TOKENS = 50
NAMES = """train/loss train/tokens train/learning_rate train/grad_norm train/tokens_per_second
    train/elapsed_seconds train/skipped_steps lwo/active_layer lwo/cycle comm/bytes_per_step
    time/step_seconds time/switch_seconds memory/peak_bytes memory/parameter_bytes
    memory/gradient_bytes memory/optimizer_state_bytes memory/park_bytes
    memory/ranks/peak_bytes_0"""


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Metered:
    """A hook with a meter; a step takes one second of the clock."""

    def __init__(self, folder: Path, **config: object):
        self.clock = Clock()
        recipe = oracle.Recipe(steps_per_layer=2)
        method = str(config.pop("method", "lwo"))
        self.lwo: LWO = attach(
            "replicate", recipe, tied=False, dtype=torch.float32, method=method, **config
        )
        self.results = Results(folder, LineCompletion(), "loss", writes=False)
        system = SystemMetrics(CPU, folder, enabled=False)
        self.meter = Meter(self.lwo, self.results, system, CPU, clock=self.clock)

    def step(self, loss: float | None = None) -> float:
        """Train a step of the oracle's batch; returns its loss, or tells the meter of `loss`."""
        self.meter.begin_step()
        tokens, labels = oracle.global_batch(self.lwo.step_count)
        mean = oracle.loss_sum(self.lwo.model, tokens, labels) / (labels[:, 1:] != -100).sum()
        self.lwo.backward(mean)
        report = self.lwo.step()
        self.clock.now += 1.0
        told = mean.detach() if loss is None else torch.tensor(loss)
        self.meter.after_step(told, TOKENS, report)
        return float(told)


def weights(lwo: LWO) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in lwo.model.named_parameters()}


def distance(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float((after[n] - before[n]).double().square().sum()) for n in before))


def test_a_reading_is_of_the_steps_since_the_restart(tmp_path: Path) -> None:
    run = Metered(tmp_path)
    run.step(), run.step()
    run.meter.read()
    run.clock.now += 1000.0  # callbacks
    run.meter.restart()
    assert run.meter.steps == 0
    losses = [run.step() for _ in range(4)]
    assert run.meter.steps == 4
    reading = run.meter.read()
    metrics = reading.metrics
    assert set(metrics) == set(NAMES.split())
    assert metrics["train/loss"] == pytest.approx(sum(losses) / 4)
    assert metrics["train/tokens_per_second"] == TOKENS
    assert metrics["time/step_seconds"] == reading.step_seconds == 1.0
    assert metrics["train/elapsed_seconds"] == run.results.training_seconds == 6.0
    assert metrics["train/tokens"] == run.results.tokens == 6 * TOKENS
    assert metrics["train/learning_rate"] == run.lwo.config.lr
    assert metrics["train/grad_norm"] > 0
    assert metrics["lwo/active_layer"] == 2.0  # the layer that the last step trained
    assert run.lwo.active_layer.name == "layer_2"
    assert metrics["lwo/cycle"] == 0.0
    assert 0 < metrics["time/switch_seconds"] <= run.lwo.switch_seconds


def test_the_cycle_of_a_last_step_is_its_own(tmp_path: Path) -> None:
    run = Metered(tmp_path)
    for _ in range(run.lwo.schedule.steps_per_cycle):
        run.step()
    assert run.meter.read().metrics["lwo/cycle"] == 0.0
    run.step()
    assert run.meter.read().metrics["lwo/cycle"] == 1.0


def test_what_is_off_the_clock_is_in_no_time(tmp_path: Path) -> None:
    run = Metered(tmp_path)
    run.step()
    with run.meter.off_the_clock():
        run.clock.now += 1000.0
    with pytest.raises(ZeroDivisionError), run.meter.off_the_clock():  # a stop in an evaluation
        run.clock.now += 1000.0
        raise ZeroDivisionError
    run.step()
    reading = run.meter.read()
    assert reading.metrics["train/elapsed_seconds"] == 2.0
    [visit] = reading.visits
    assert visit.metrics["visit/seconds"] == 2.0


def test_right_after_a_switch_memory_is_what_the_layer_before_held(tmp_path: Path) -> None:
    run = Metered(tmp_path, state="keep")
    run.step()
    in_visit = run.meter.read().metrics
    held = run.lwo.memory()
    run.step()
    assert run.lwo.memory()["optimizer_state_bytes"] == 0  # of the new layer, before its first step
    after_switch = run.meter.read().metrics
    for name in ("optimizer_state_bytes", "gradient_bytes", "parameter_bytes"):
        assert after_switch[f"memory/{name}"] == in_visit[f"memory/{name}"] == held[name] > 0
    # But the parks are those of now, with what the layer before has left.
    assert in_visit["memory/park_bytes"] == 0
    assert after_switch["memory/park_bytes"] == run.lwo.memory()["park_bytes"] > 0
    run.step()
    next_layer = run.meter.read().metrics["memory/optimizer_state_bytes"]
    assert next_layer == run.lwo.memory()["optimizer_state_bytes"] != held["optimizer_state_bytes"]


def test_each_visit_s_change_is_its_own(tmp_path: Path) -> None:
    # A layer is drawn twice in a row; each time its masters are compared with those of the start.
    run = Metered(tmp_path, order="weighted", layer_weights={"layer_1": 1000.0})
    changes = []
    for _ in range(3):
        assert run.lwo.active_layer.name == "layer_1"
        before = weights(run.lwo)
        run.step(), run.step()
        changes.append(distance(before, weights(run.lwo)))
        assert run.meter._visits.masters_before == []  # the host's memory is free again
    visits = run.meter.read().visits
    assert [visit.step for visit in visits] == [2, 4, 6]
    assert [visit.metrics["visit/change_norm"] for visit in visits] == pytest.approx(
        changes, rel=1e-5
    )
    assert run.meter.read().visits == []  # told once


def test_a_visit_that_began_before_a_resume_has_no_change(tmp_path: Path) -> None:
    first = Metered(tmp_path)
    for _ in range(3):
        first.step()
    resumed = Metered(tmp_path)
    resumed.lwo.load_state_dict(first.lwo.state_dict())
    meter = Meter(resumed.lwo, resumed.results, SystemMetrics(CPU, tmp_path, enabled=False), CPU)
    resumed.meter = meter
    for _ in range(3):
        resumed.step()
    cut, whole = meter.read().visits
    assert (cut.step, cut.layer) == (4, "layer_0") and whole.step == 6
    assert whole.metrics.keys() - cut.metrics.keys() == {"visit/change_norm", "visit/loss_drop"}


def test_skipped_steps_do_not_count_in_a_visit(tmp_path: Path) -> None:
    run = Metered(tmp_path)
    before = weights(run.lwo)
    run.meter.begin_step()
    tokens, labels = oracle.global_batch(0)
    run.lwo.backward(oracle.loss_sum(run.lwo.model, tokens, labels) * math.nan)
    report = run.lwo.step()
    run.meter.after_step(torch.tensor(math.nan), TOKENS, report)
    run.step()
    change = distance(before, weights(run.lwo))
    reading = run.meter.read()
    [visit] = reading.visits
    assert reading.metrics["train/skipped_steps"] == 1.0
    assert math.isnan(reading.metrics["train/loss"])
    assert visit.metrics["visit/change_norm"] == pytest.approx(change, rel=1e-5)
    assert visit.metrics["visit/grad_norm"] == pytest.approx(reading.metrics["train/grad_norm"])


def test_full_fine_tuning_has_memory_of_now_and_no_visits(tmp_path: Path) -> None:
    run = Metered(tmp_path, method="full")
    for _ in range(4):
        run.step()
        reading = run.meter.read()
        assert reading.visits == []
        held = run.lwo.memory()["optimizer_state_bytes"]
        assert reading.metrics["memory/optimizer_state_bytes"] == held > 0
        assert reading.metrics["lwo/active_layer"] == 0.0


def read_on_each_rank(folder: Path) -> tuple[float, float, bool, list[float], float]:
    rank = torch.distributed.get_rank()
    run = Metered(folder)
    for loss in (1.0, 3.0):
        run.step(loss * (rank + 1))
        run.clock.now += rank
    reading = run.meter.read(save_is_written=rank == 0)
    peaks = [reading.metrics[f"memory/ranks/peak_bytes_{r}"] for r in (0, 1)]
    assert reading.metrics["memory/peak_bytes"] == max(peaks) and min(peaks) > 0
    return (
        reading.metrics["train/loss"],
        reading.metrics["time/step_seconds"],
        reading.save_is_written,
        peaks,
        reading.step_seconds,
    )


def test_ranks_agree_on_a_reading(tmp_path: Path) -> None:
    first, second = run_ranks(read_on_each_rank, 2, tmp_path)
    assert first[0] == second[0] == (1 + 3 + 2 + 6) / 2  # the sum of their shares, a step
    assert (first[1], second[1]) == (1.0, 2.0)  # the own time
    assert first[2] and second[2]
    assert first[3] == second[3]
    assert first[4] == second[4] == 2.0  # the slowest one's
