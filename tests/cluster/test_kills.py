"""Kills leave no trace in a run's losses and weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks import kills
from tests.benchmarks.kill_points import Moment

LEVERS = ("lwo.order=ascending", "lwo.batches=cycle", "lwo.suffix_backward=0.5")


@pytest.mark.parametrize(
    ("number", "seed", "more"),
    [
        (2, 3, ()),
        pytest.param(20, 1, (), marks=pytest.mark.long),
        pytest.param(9, 2, LEVERS, marks=pytest.mark.long),
    ],
)
def test_a_killed_run_ends_as_the_unbroken_one(
    number: int, seed: int, more: tuple[str, ...], tmp_path: Path
) -> None:
    """The long form has each of the three victims in each of the three places, twice."""
    moments = kills.draw(number, seed)
    assert len({moment.who for moment in moments}) == min(number, 3)
    assert len({moment.where for moment in moments}) == min(number, 3)
    result = kills.measure(tmp_path / "run", number, seed, *more)
    assert len(result["kills"]) == number
    assert all(kill["recovered"] for kill in result["kills"]), result["kills"]
    # At most what was done since the last checkpoint but one, which may be on its way to the disk.
    assert all(kill["steps_lost"] <= 2 * kills.SAVE_EVERY for kill in result["kills"]), result[
        "kills"
    ]
    assert result["bitwise_equal"]


def test_kills_are_drawn_by_the_seed() -> None:
    assert kills.draw(20, 3) == kills.draw(20, 3) != kills.draw(20, 4)
    moments = kills.draw(18, 3)
    assert all(isinstance(moment, Moment) for moment in moments)
    # Every kind twice in 18.
    assert sorted((moment.who, moment.where) for moment in moments[:9]) == sorted(
        (moment.who, moment.where) for moment in moments[9:]
    )
    assert [moment.step for moment in moments] == sorted(moment.step for moment in moments)
