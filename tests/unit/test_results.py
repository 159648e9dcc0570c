"""What a run has achieved: which checkpoint is best, what it gained, what people read of it, and
what a restart keeps.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lwo_dist.registry import TASKS
from lwo_dist.tasks.base import LOSS
from lwo_dist.tasks.completion import LineCompletion
from lwo_dist.tasks.intervals import paired_interval
from lwo_dist.tasks.scores import Score
from lwo_dist.training.evaluate import Evaluation, Sample
from lwo_dist.training.results import Results, format_summary

ROUND_1 = Path(__file__).parents[1] / "data" / "round1" / "run"
COMPLETION = TASKS.get("completion")
METRICS = {
    "train/loss": 3.0,
    "memory/peak_bytes": 2e9,
    "memory/optimizer_state_bytes": 5e6,
    "comm/bytes_per_step": 1e6,
}


class Repair(LineCompletion):
    """Two scores of opposite directions, and one without a column."""

    name = "repair"
    example = ("function", "functions")
    scores = (
        Score("tests_passed", "tests passed", "%", count_label="functions repaired"),
        Score("edits", "edits", "characters", higher_is_better=False, digits=1),
        Score("variety", "variety", per_example=False),
        LOSS,
    )


def evaluation(columns: Mapping[str, list[float]], **totals: float) -> Evaluation:
    """Totals are the means of the columns, unless given."""
    count = len(next(iter(columns.values())))
    means = {f"eval/{name}": float(np.mean(column)) for name, column in columns.items()}
    return Evaluation(
        scores={**means, **{f"eval/{name}": v for name, v in totals.items()}},
        columns={name: np.array(column) for name, column in columns.items()},
        tokens=np.ones(count, dtype=np.int64),
        bytes=np.ones(count, dtype=np.int64),
        predictions=("x",) * count,
        samples=(Sample(0, "a.py", 3, "before", "x = 1", "x"),),
    )


def repaired(passed: list[float], edits: list[float], loss: list[float]) -> Evaluation:
    columns = {"tests_passed": passed, "edits": edits, "loss": loss}
    return evaluation(columns, variety=7.5, functions=float(len(passed)))


def filled(folder: Path, metric: str = "loss", **more: Any) -> Results:
    """Step 4 is best by tests passed, step 8 by edits and loss."""
    results = Results(folder, Repair(), metric, writes=True)
    for _ in range(10):
        results.add_time(2.0, 500)
        results.add_metrics(METRICS)
    results.add_evaluation(0, repaired([0, 0, 100, 0], [9, 8, 7, 9], [4, 4, 5, 4]))
    results.add_evaluation(4, repaired([100, 0, 100, 100], [6, 8, 7, 8], [3, 3, 4, 3]))
    results.add_evaluation(8, repaired([100, 0, 100, 0], [3, 2, 2, 4], [2, 2, 2, 3]))
    return results


@pytest.mark.parametrize(
    ("metric", "best"), [("tests_passed", 4), ("edits", 8), ("loss", 8), ("variety", 4)]
)
def test_the_best_step_goes_by_the_direction_of_the_score(
    tmp_path: Path, metric: str, best: int
) -> None:
    assert filled(tmp_path, metric).best_step == best  # of equal ones the first


def test_before_training_there_is_no_best_step(tmp_path: Path) -> None:
    results = Results(tmp_path, Repair(), "edits", writes=True)
    assert results.best_step == 0
    results.add_evaluation(0, repaired([0, 0], [1, 1], [1, 1]))
    assert results.best_step == 0


@pytest.mark.parametrize("metric", ["loss", "tests_passed"])
def test_a_score_that_is_no_number_is_never_the_best(tmp_path: Path, metric: str) -> None:
    results = Results(tmp_path, Repair(), metric, writes=False)
    results.add_evaluation(2, repaired([math.nan] * 2, [1, 1], [math.nan] * 2))
    results.add_evaluation(4, repaired([0, 0], [1, 1], [5, 5]))
    results.add_evaluation(6, repaired([math.nan] * 2, [1, 1], [math.nan] * 2))
    assert results.best_step == 4


def test_a_gain_is_positive_where_it_is_better(tmp_path: Path) -> None:
    gains = filled(tmp_path).gains()
    assert list(gains) == ["tests_passed", "edits", "loss"]  # not the one without a column
    mean, low, high = paired_interval([9, 8, 7, 9], [3, 2, 2, 4])
    assert mean < 0
    assert gains["edits"] == pytest.approx({"mean": -mean, "low": -high, "high": -low})
    assert gains["loss"]["low"] > 0
    mean, low, high = paired_interval([0, 0, 100, 0], [100, 0, 100, 0])
    assert gains["tests_passed"] == {"mean": mean, "low": low, "high": high}


def test_a_gain_is_after_minus_before_of_the_totals(tmp_path: Path) -> None:
    """The total loss is a mean over tokens, and lines differ in length."""
    task = Repair()
    results = Results(tmp_path, task, "loss", writes=True)
    tokens = np.array([1, 2, 30, 4])
    for step, losses in ((0, [9.0, 8.0, 1.0, 5.0]), (4, [1.0, 2.0, 1.5, 4.0])):
        total = float(np.average(losses, weights=tokens))
        repair = repaired([0] * 4, [1] * 4, losses)
        scores = {**repair.scores, "eval/loss": total}
        results.add_evaluation(step, replace(repair, scores=scores, tokens=tokens))
    gain = results.gains()["loss"]
    before, after = (results.evaluations[step]["eval/loss"] for step in (0, 4))
    assert gain["mean"] == pytest.approx(before - after)
    assert gain["mean"] != pytest.approx(np.mean([8.0, 6.0, -0.5, 1.0]))
    assert gain["low"] < gain["mean"] < gain["high"]


def test_what_became_right_and_wrong_is_counted(tmp_path: Path) -> None:
    results = filled(tmp_path)
    results.add_evaluation(12, repaired([100, 100, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]))
    assert results.best_step == 12
    assert results.changed() == {"tests_passed": {"gained": 2, "lost": 1}}


def test_an_evaluation_on_disk(tmp_path: Path) -> None:
    filled(tmp_path)
    names = sorted(path.name for path in (tmp_path / "evaluations").iterdir())
    assert names == ["step_000000.json", "step_000004.json", "step_000008.json"]
    written = json.loads((tmp_path / "evaluations" / "step_000004.json").read_text())
    assert written["scores"]["eval/tests_passed"] == 75
    assert written["cost"] == {"training_seconds": 20.0, "tokens": 5000}
    assert written["lines"] == {
        "tests_passed": [100, 0, 100, 100],
        "edits": [6, 8, 7, 8],
        "loss": [3, 3, 4, 3],
    }
    assert written["samples"] == [
        {
            "index": 0,
            "name": "a.py",
            "line": 3,
            "context": "before",
            "reference": "x = 1",
            "prediction": "x",
        }
    ]
    Results(tmp_path / "other", Repair(), "loss", writes=False).add_evaluation(
        0, repaired([0, 0], [1, 1], [1, 1])
    )
    assert not (tmp_path / "other").exists()


def test_the_summary(tmp_path: Path) -> None:
    results = filled(tmp_path)
    results.losses = [4.0] * 5 + [2.0] * 15
    results.blocked_seconds = 0.25
    summary = results.summary()
    assert json.loads(json.dumps(summary)) == summary
    scores = summary.pop("eval")
    assert summary == {
        "tokens": 5000,
        "training_seconds": 20.0,
        "tokens_per_second": 250.0,
        "checkpoint_blocked_seconds": 0.25,
        "peak_memory_bytes": 2_000_000_000,
        "optimizer_state_bytes": 5_000_000,
        "comm_bytes_per_step": 1e6,
        "loss_first": 4.0,
        "loss_last": 2.0,
    }
    assert scores["best_step"] == 8
    assert scores["before"] == results.evaluations[0]
    assert scores["after"] == results.evaluations[8]
    assert scores["gain_95"] == results.gains()
    assert [score["name"] for score in scores["scores"]] == [
        "tests_passed",
        "edits",
        "variety",
        "loss",
    ]
    assert scores["example"] == ["function", "functions"]
    assert scores["curve"] == [
        {"step": step, "training_seconds": 20.0, "tokens": 5000, **results.evaluations[step]}
        for step in (0, 4, 8)
    ]


def summary_of(results: Results) -> dict[str, Any]:
    return json.loads(json.dumps({**results.summary(), "steps": 8, "export": "runs/r/model"}))


def test_the_summary_for_people(tmp_path: Path) -> None:
    text = format_summary(summary_of(filled(tmp_path)))
    gains = filled(tmp_path).gains()

    def interval(name: str, digits: int) -> str:
        mean, low, high = (f"{gains[name][end]:+.{digits}f}" for end in ("mean", "low", "high"))
        return f"{mean} ({low} to {high})"

    assert text.splitlines() == [
        "4 held-out functions        before     after   gain (95 % interval)",
        "tests passed, %              25.00     50.00   " + interval("tests_passed", 2),
        "edits, characters              8.2       2.8   " + interval("edits", 1),
        "variety                       7.50      7.50",
        "loss, nats per token         4.250     2.250   " + interval("loss", 3),
        "functions repaired               1         2   1 gained, 0 lost",
        "training time 20s for 8 steps, 250 tokens/s on average; saves blocked training for 0s",
        "peak memory 2.0 GB per worker (optimizer state: 5.0 MB); sent 1.0 MB per step",
        "model: runs/r/model",
    ]
    assert interval("edits", 1).startswith("+5.5 (+")
    early = summary_of(filled(tmp_path)) | {"ended_early": "no better loss"}
    assert format_summary(early).splitlines()[-2:] == [
        "ended early, at step 8: no better loss",
        "model: runs/r/model",
    ]


def test_the_summary_of_an_older_run_has_the_plain_names(tmp_path: Path) -> None:
    results = Results(tmp_path, COMPLETION, "loss", writes=True)
    results.add_time(1.0, 10)
    results.add_metrics(METRICS)
    columns = {"loss": [3.0, 4.0], "exact_match": [0.0, 100.0], "edit_similarity": [5.0, 100.0]}
    results.add_evaluation(0, evaluation(columns, bleu=1.0, lines=2.0))
    results.add_evaluation(8, evaluation(columns, bleu=2.0, lines=2.0))
    summary = summary_of(results)
    assert (
        "lines exactly right              1         1   0 gained, 0 lost"
        in format_summary(summary).splitlines()
    )
    for name in ("scores", "example"):
        del summary["eval"][name]
    rows = format_summary(summary).splitlines()
    assert rows[0].startswith("2 held-out lines ")
    assert [row.split()[0] for row in rows[1:5]] == [
        "loss",
        "exact_match",
        "edit_similarity",
        "bleu",
    ]
    assert rows[4].split() == ["bleu", "1.000", "2.000"]


def test_a_restart_keeps_everything(tmp_path: Path) -> None:
    first = filled(tmp_path)
    first.blocked_seconds = 0.5
    second = Results(tmp_path, Repair(), "loss", writes=True)
    state = first.state_dict()
    assert json.loads(json.dumps(state)) == state
    second.load_state_dict(state)
    assert second.summary() == first.summary()
    assert second.state_dict() == first.state_dict()
    second.add_metrics(METRICS)
    assert first.state_dict() != second.state_dict()
    assert len(first.losses) == 10  # nothing is shared


def test_the_state_of_round_1_loads(tmp_path: Path) -> None:
    shutil.copytree(ROUND_1 / "evaluations", tmp_path / "evaluations")
    state = json.loads((ROUND_1 / "checkpoints" / "step_000011" / "state.json").read_text())
    results = Results(tmp_path, COMPLETION, "loss", writes=True)
    results.load_state_dict(state["results"])
    assert results.state_dict() == {**state["results"], "costs": {}}
    before = json.loads((tmp_path / "evaluations" / "step_000000.json").read_text())
    columns = {
        "loss": [loss - 1 for loss in before["lines"]["loss"]],
        "exact_match": before["lines"]["exact_match"],
        "edit_similarity": before["lines"]["edit_similarity"],
    }
    results.add_evaluation(20, evaluation(columns, bleu=0.0, lines=10.0))
    summary = results.summary()
    assert summary["eval"]["best_step"] == 20
    assert summary["eval"]["before"] == before["scores"]
    assert summary["eval"]["gain_95"]["loss"]["mean"] == pytest.approx(1)
    assert format_summary(summary | {"steps": 20, "export": "m"}).startswith("10 held-out lines")
