"""`tracking.log_completions: false` keeps source lines and completions out of all published files;
otherwise they are redacted.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lwo_dist.config import Config, TrackingConfig
from lwo_dist.registry import TASKS
from lwo_dist.report import write_report
from lwo_dist.run_info import RunInfo, run_parameters
from lwo_dist.spool import Spool
from lwo_dist.tracking.close import append_end
from lwo_dist.training.evaluate import Evaluation, Sample
from lwo_dist.training.results import Results

TOKEN = "ghp_" + "a1" * 18
LINES = ("the context of it", "the reference of it", "the prediction of it")


def evaluation(*lines: str) -> Evaluation:
    column = np.array([1.0, 2.0])
    names = ("exact_match", "edit_similarity", "loss")
    return Evaluation(
        scores={**{f"eval/{name}": 1.5 for name in names}, "eval/bleu": 1.0, "eval/lines": 2.0},
        columns=dict.fromkeys(names, column),
        tokens=np.ones(2, dtype=np.int64),
        bytes=np.ones(2, dtype=np.int64),
        predictions=(lines[2], lines[2]),
        samples=(Sample(0, "a.py", 3, *lines),),
    )


def run(folder: Path, *, log_completions: bool, samples: bool, lines: tuple[str, ...]) -> Spool:
    """A run with two evaluations; `samples`: whether they include source lines."""
    results = Results(folder, TASKS.get("completion"), "loss", writes=True, with_samples=samples)
    for step in (0, 10):
        results.add_evaluation(step, evaluation(*lines))
    config = Config(tracking=TrackingConfig(log_completions=log_completions))
    info = RunInfo(
        config=config,
        run_dir=folder,
        world_size=1,
        start_step=0,
        layers=("all",),
        layer_sizes=(1,),
        parameters=1,
        device="cpu",
    )
    spool = Spool(folder / "metrics.jsonl")
    spool.append("run", run_name="x", layers=["all"], parameters=run_parameters(info))
    spool.append_metrics(1, {"train/loss": 1.0})
    return spool


def published(folder: Path, *, evaluations: bool = True) -> str:
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".png"]
    if not evaluations:
        files = [path for path in files if path.parent.name != "evaluations"]
    return "\n".join(path.read_text() for path in files)


@pytest.mark.parametrize("samples", [False, True])
def test_without_completions_no_file_contains_source_lines(tmp_path: Path, samples: bool) -> None:
    """With samples: an earlier attempt wrote them under another setting."""
    spool = run(tmp_path, log_completions=False, samples=samples, lines=LINES)
    append_end(spool, "FINISHED", best_step=10)
    spool.close()
    sent = [file.name for file in write_report(spool.path, "FINISHED", 10)]
    assert "report.html" in sent and "scores.json" in sent and "completions.json" not in sent
    text = published(tmp_path, evaluations=not samples)
    assert "exact_match" in text
    assert "completions.json" not in text
    assert not any(line in text for line in LINES)


def test_with_completions_the_source_lines_are_shown(tmp_path: Path) -> None:
    spool = run(tmp_path, log_completions=True, samples=True, lines=LINES)
    files = write_report(spool.path, "FINISHED", 10)
    spool.close()
    for name in ("report.html", "completions.json"):
        [file] = [file for file in files if file.name == name]
        assert all(line in file.read_text() for line in LINES)


def test_no_completion_shows_a_token(tmp_path: Path) -> None:
    lines = tuple(f"x = '{TOKEN}' # {line}" for line in LINES)
    spool = run(tmp_path, log_completions=True, samples=True, lines=lines)
    write_report(spool.path, "FINISHED", 10)
    spool.close()
    text = published(tmp_path)
    assert "ghp_***" in text and TOKEN not in text
