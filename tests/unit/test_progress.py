"""The lines of a run on the console: enough to follow it, few enough to read."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest

from lwo_dist.config.reading import load_config
from lwo_dist.run_info import RunInfo
from lwo_dist.training.progress import Progress

METRICS = {
    "train/loss": 2.5,
    "train/learning_rate": 1e-3,
    "train/tokens_per_second": 1234.0,
    "train/skipped_steps": 0.0,
    "time/step_seconds": 0.5,
    "lwo/active_layer": 1.0,
    "memory/peak_bytes": 2e9,
}


def started(tmp_path: Path, steps: int, start_step: int = 0) -> Progress:
    progress = Progress()
    progress.on_run_start(
        RunInfo(
            config=load_config(None, [f"train.steps={steps}", "run_name=r"]),
            run_dir=tmp_path,
            world_size=1,
            start_step=start_step,
            layers=("a", "b"),
            layer_sizes=(1, 1),
            parameters=2,
            device="CPU",
            data={"windows": 3},
        )
    )
    return progress


def steps_shown(said: str) -> list[int]:
    return [int(step) for step in re.findall(r"(?m)^step (\d+)/", said)]


@pytest.mark.parametrize(
    ("steps", "every", "start", "most"), [(20, 5, 0, 4), (1000, 10, 0, 34), (10**6, 10, 0, 46)]
)
def test_the_number_of_lines_hardly_depends_on_the_length(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    steps: int,
    every: int,
    start: int,
    most: int,
) -> None:
    progress = started(tmp_path, steps)
    for step in range(every, steps + 1, every):
        progress.on_metrics(step, METRICS)
    shown = steps_shown(capsys.readouterr().out)
    assert shown[:2] == [every, 2 * every]  # the first ones come soon
    assert shown[-1] == steps
    assert min(20, steps // every) <= len(shown) <= most
    assert max(b - a for a, b in pairwise(shown)) <= max(every, steps / 25)


def test_a_resumed_run_begins_with_its_own_first_points(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = started(tmp_path, 10**6, start_step=500_000)
    for step in range(500_010, 500_100, 10):
        progress.on_metrics(step, METRICS)
    assert steps_shown(capsys.readouterr().out) == [500_010, 500_020, 500_040, 500_080]


def test_a_line_holds_what_people_need_and_names_the_newest_save(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = started(tmp_path, 100)
    capsys.readouterr()
    for step in (2, 4):
        progress.on_checkpoint(step, tmp_path / f"step_{step:06d}")
    progress.on_metrics(10, METRICS)
    progress.on_metrics(20, METRICS)
    assert capsys.readouterr().out.splitlines() == [
        "step 10/100  loss 2.5000  lr 1.00e-03  1,234 tokens/s  layer b  peak 2.0 GB  left 45s"
        "  saved step 4",
        "step 20/100  loss 2.5000  lr 1.00e-03  1,234 tokens/s  layer b  peak 2.0 GB  left 40s",
    ]
