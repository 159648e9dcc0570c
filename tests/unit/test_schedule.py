"""The schedule and the learning rate are pure functions of the step."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lwo_dist.config import LWOConfig
from lwo_dist.errors import UserError
from lwo_dist.schedule import LayerSchedule, learning_rate, make_schedule

SCHEDULES = st.builds(
    LayerSchedule,
    num_layers=st.integers(1, 12),
    steps_per_layer=st.integers(1, 9),
    order=st.sampled_from(["ascending", "descending", "random"]),
    seed=st.integers(0, 99),
)


@given(SCHEDULES, st.integers(0, 5))
def test_a_cycle_visits_every_layer_once_for_steps_per_layer_steps(
    schedule: LayerSchedule, cycle: int
) -> None:
    first = cycle * schedule.steps_per_cycle
    active = [
        schedule.active_layer(step) for step in range(first, first + schedule.steps_per_cycle)
    ]
    visits = active[:: schedule.steps_per_layer]
    assert sorted(visits) == list(range(schedule.num_layers))
    assert active == [layer for layer in visits for _ in range(schedule.steps_per_layer)]
    assert {schedule.cycle(step) for step in range(first, first + schedule.steps_per_cycle)} == {
        cycle
    }


def test_the_orders() -> None:
    def visits(order: str, cycles: int = 1, **more: object) -> list[int]:
        schedule = LayerSchedule(4, 2, order, **more)  # type: ignore[arg-type]
        return [schedule.active_layer(step) for step in range(0, 8 * cycles, 2)]

    assert visits("ascending", 2) == [0, 1, 2, 3, 0, 1, 2, 3]
    assert visits("descending") == [3, 2, 1, 0]
    shuffled = visits("random", 20, seed=1)
    assert len({tuple(shuffled[i : i + 4]) for i in range(0, 80, 4)}) > 5  # reshuffled each cycle
    assert shuffled != visits("random", 20, seed=2)
    drawn = visits("weighted", 100, weights=(1.0, 1.0, 1.0, 7.0))
    assert 240 < drawn.count(3) < 320  # 70 % of 400 draws


def test_another_process_draws_the_same_order() -> None:
    code = (
        "from lwo_dist.schedule import LayerSchedule as S; "
        "s = S(9, 1, 'random', 5); print([s.active_layer(i) for i in range(27)])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    schedule = LayerSchedule(9, 1, "random", 5)
    assert done.stdout.strip() == str([schedule.active_layer(step) for step in range(27)])


def test_a_short_run_names_the_layers_it_never_trains() -> None:
    schedule = LayerSchedule(5, 10, "descending")
    assert schedule.never_active(21) == [0, 1]
    assert schedule.never_active(20) == [0, 1, 2]
    assert schedule.never_active(50) == []


def test_layer_weights_name_layers_that_exist() -> None:
    config = LWOConfig(order="weighted", layer_weights={"head": 2.0})
    assert make_schedule(config, ["embed", "layer_0", "head"]).weights == (1.0, 1.0, 2.0)
    with pytest.raises(UserError, match=r"'head'; the trained layers are embed_head, layer_0"):
        make_schedule(config, ["embed_head", "layer_0"])


def rates(steps: int, **settings: object) -> list[float]:
    config = LWOConfig(lr=1.0, steps_per_layer=5, **settings)  # type: ignore[arg-type]
    schedule = LayerSchedule(2, 5)
    return [round(learning_rate(config, schedule, step), 6) for step in range(steps)]


def test_the_learning_rate_over_run_cycle_and_visit() -> None:
    assert rates(3) == [1.0, 1.0, 1.0]  # auto, without a length
    assert rates(4, max_steps=4) == rates(4, lr_scheduler_type="linear", max_steps=4)
    assert rates(4, lr_scheduler_type="constant", max_steps=4) == [1.0] * 4
    assert rates(4, lr_scheduler_type="linear", max_steps=4) == [1.0, 0.75, 0.5, 0.25]
    assert rates(5, lr_scheduler_type="linear", max_steps=4, warmup_steps=2) == [
        0.5,
        1.0,
        1.0,
        0.5,
        0.0,
    ]
    assert (
        rates(10, lr_scheduler_type="linear", lr_schedule_over="visit")
        == [1.0, 0.8, 0.6, 0.4, 0.2] * 2
    )
    cycle = rates(20, lr_scheduler_type="cosine", lr_schedule_over="cycle")
    assert cycle[:10] == cycle[10:] and cycle[5] == 0.5 and cycle[0] == 1.0


def test_a_ramp_starts_each_visit_at_a_fraction_and_never_at_zero() -> None:
    assert rates(10, visit_ramp_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0] * 2


@given(st.integers(0, 200), st.integers(0, 9), st.sampled_from(["linear", "cosine"]))
def test_the_rate_stays_within_0_and_the_peak(step: int, warmup: int, kind: str) -> None:
    config = LWOConfig(lr=1.0, lr_scheduler_type=kind, max_steps=100, warmup_steps=warmup)  # type: ignore[arg-type]
    rate = learning_rate(config, LayerSchedule(3, 7), step)
    assert 0.0 <= rate <= 1.0 and (rate > 0.0 or step >= 100)


def test_a_decay_over_the_run_needs_its_length() -> None:
    with pytest.raises(UserError, match="needs its length; set max_steps"):
        rates(1, lr_scheduler_type="cosine")
