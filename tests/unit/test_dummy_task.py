"""A task from outside of the package: data of its own, and a score of which less is better. Nothing
else is edited for it, and everything that shows scores shows its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lwo_dist import distributed, registry
from lwo_dist.checkpoint.export import export_model
from lwo_dist.checkpoint.format import newest_checkpoint
from lwo_dist.checkpoint.manage import list_checkpoints
from lwo_dist.config import Config, DataConfig
from lwo_dist.config.reading import load_config
from lwo_dist.data.examples import EvalExample, TrainExample
from lwo_dist.driver import prepare
from lwo_dist.errors import UserError
from lwo_dist.registry import TASKS
from lwo_dist.report.history import History
from lwo_dist.report.outcome import Outcome
from lwo_dist.report.page import save_report
from lwo_dist.report.tables import read_evaluations, scores_table
from lwo_dist.run import run
from lwo_dist.spool import read_spool
from lwo_dist.storage import RunFolder
from lwo_dist.tasks.base import LOSS, Task, token_losses
from lwo_dist.tasks.scores import Score, Scores, ScoreSheet
from lwo_dist.training.results import format_summary
from tests.models import save_tiny_model
from tests.ranks import run_ranks

NAME = f"{__name__}:Sums"
HELD_OUT = 6


@dataclass
class Pairs:
    pairs: list[tuple[str, str]]

    @property
    def identity(self) -> list[tuple[str, str]]:
        return self.pairs

    @property
    def counts(self) -> dict[str, int]:
        return {"pairs": len(self.pairs)}


class Sums(Task):
    """Write the sum: `3+4=` is to be followed by `7;`."""

    name = "sums"
    example = ("sum", "sums")
    scores = (
        Score("distance", "distance", "units", higher_is_better=False, digits=1, headline=True),
        Score("answered", "answered", "%", per_example=False, count_label="sums with a number"),
        LOSS,
    )

    def read(self, config: DataConfig, cache: Path) -> Pairs:
        lines = (Path(str(config.source)) / "sums.txt").read_text().split()
        return Pairs([(question + "=", answer) for question, answer in _split(lines)])

    def training_examples(
        self, source: Pairs, tokenizer: Any, config: Config
    ) -> Iterator[TrainExample]:
        for question, answer in source.pairs[HELD_OUT:]:
            context = tokenizer.encode(question)
            yield TrainExample([*context, *tokenizer.encode(answer + ";")], len(context))

    def evaluation_examples(
        self, source: Pairs, tokenizer: Any, config: Config
    ) -> list[EvalExample]:
        return [
            EvalExample(
                tokenizer.encode(question),
                tokenizer.encode(answer + ";"),
                answer,
                "sums.txt",
                number,
            )
            for number, (question, answer) in enumerate(source.pairs[:HELD_OUT], 1)
        ]

    def end_token_ids(self, tokenizer: Any) -> list[int]:
        return [tokenizer.encode(";")[0], tokenizer.eos_token_id]

    def decode(self, tokenizer: Any, example: EvalExample, token_ids: list[int]) -> str:
        return str(tokenizer.decode(token_ids)).partition(";")[0]

    def score(
        self,
        examples: Sequence[EvalExample],
        predictions: Sequence[str],
        losses: Any,
        tokens: Any,
    ) -> Scores:
        numbers = [int(text) if text.isdigit() else None for text in predictions]
        wanted = [int(example.text) for example in examples]
        distance = np.array(
            [
                100.0 if number is None else min(abs(number - right), 100.0)
                for number, right in zip(numbers, wanted, strict=True)
            ]
        )
        answered = 100 * np.mean([number is not None for number in numbers])
        loss, column = token_losses(losses, tokens)
        return Scores(
            {"distance": float(distance.mean()), "answered": float(answered), "loss": loss},
            {"distance": distance, "loss": column},
        )


def _split(lines: list[str]) -> Iterator[tuple[str, str]]:
    for line in lines:
        question, _, answer = line.partition("=")
        yield question, answer


def make_config(folder: Path, *overrides: str) -> Config:
    config = load_config(
        None,
        [
            f"model.name={folder / 'model'}",
            f"data.source={folder / 'source'}",
            f"storage={folder / 'runs'}",
            "run_name=r",
            "strategy=replicate",
            "train.steps=120",
            "train.global_batch_size=8",
            "train.sequence_length=24",
            "train.logging_steps=20",
            "lwo.steps_per_layer=4",
            "lwo.lr=1e-2",
            "eval.steps=60",
            "eval.max_new_tokens=4",
            "eval.batch_size=4",
            "tracking.system_metrics=false",
            "tracking.uri=http://127.0.0.1:9",  # nobody there: the files of the run are enough
            "cluster.num_workers=2",
            *overrides,
        ],
    )
    return config.model_copy(
        update={"task": NAME, "eval": config.eval.model_copy(update={"metric": "distance"})}
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sums")
    (folder / "source").mkdir()
    sums = [f"{a}+{b}={a + b}" for a in range(8) for b in range(8)]
    (folder / "source" / "sums.txt").write_text("\n".join(sums[::-1]))
    save_tiny_model(folder / "model", [line + ";\n" for line in sums])
    return folder


def _whole_run(config: Config) -> dict[str, Any] | None:
    return run(distributed.on_rank_0(prepare, config))


@pytest.fixture(scope="module")
def summary(folder: Path) -> dict[str, Any]:
    first, second = run_ranks(_whole_run, 2, make_config(folder), timeout=180)
    assert second is None
    return first


def test_it_is_found_by_its_address() -> None:
    task = TASKS.get(NAME)
    assert isinstance(task, Sums) and task is TASKS.get(NAME)


def test_a_metric_that_it_does_not_have_is_refused_before_anything_is_made(
    folder: Path, tmp_path: Path
) -> None:
    config = make_config(folder, f"storage={tmp_path / 'runs'}")
    unknown = config.model_copy(
        update={"eval": config.eval.model_copy(update={"metric": "exact_match"})}
    )
    with pytest.raises(
        UserError,
        match="eval.metric = 'exact_match' is not a score of the task sums; give one of distance, "
        "answered, loss",
    ):
        prepare(unknown)
    assert not (tmp_path / "runs").exists()


def test_the_best_checkpoint_is_that_of_the_least_distance(summary: dict[str, Any]) -> None:
    scores = summary["eval"]
    assert scores["before"]["eval/sums"] == HELD_OUT
    evaluations = read_evaluations(Path(summary["checkpoint"]).parents[1])
    distances = {
        step: found["scores"]["eval/distance"] for step, found in evaluations.items() if step
    }
    assert len(distances) == 2
    assert distances[scores["best_step"]] == min(distances.values())
    assert scores["after"]["eval/distance"] < scores["before"]["eval/distance"]
    assert scores["gain_95"]["distance"]["mean"] == pytest.approx(
        scores["before"]["eval/distance"] - scores["after"]["eval/distance"]
    )
    assert list(scores["gain_95"]) == ["distance", "loss"]


def test_the_summary_shows_its_scores(summary: dict[str, Any]) -> None:
    lines = format_summary(summary).splitlines()
    assert lines[0].split("  ")[0] == "6 held-out sums" and "gain (95 % interval)" in lines[0]
    heads = ["distance, units", "answered, %", "loss, nats per token", "sums with a number"]
    assert [line[:24].strip() for line in lines[1:5]] == heads
    gain = summary["eval"]["gain_95"]["distance"]["mean"]
    assert f"{gain:+.1f} (" in lines[1] and "(" not in lines[2]


def test_the_tables_have_its_columns(summary: dict[str, Any]) -> None:
    folder = Path(summary["export"]).parent
    columns, rows = scores_table(read_evaluations(folder))
    assert columns == ["step", "distance", "answered", "loss", "sums"]
    assert [row[0] for row in rows] == [0, 60, 120]
    written = json.loads((folder / "tables" / "scores.json").read_text())
    assert written == {"columns": columns, "data": rows}
    completions = json.loads((folder / "tables" / "completions.json").read_text())
    assert ["random", "sums.txt", 1, "7+7=", "14"] in [row[:5] for row in completions["data"]]


def test_the_report_has_its_cards(summary: dict[str, Any]) -> None:
    page = (Path(summary["export"]).parent / "report.html").read_text()
    last = summary["eval"]["after"]  # the best checkpoint's, as in the summary
    before = summary["eval"]["before"]
    for label, value, start in (
        ("distance, units", f"{last['eval/distance']:.1f}", f"{before['eval/distance']:.1f}"),
        ("loss, nats per token", f"{last['eval/loss']:.3f}", f"{before['eval/loss']:.3f}"),
    ):
        assert (
            f"<div class=label>held-out {label}</div><div class=value>{value}</div>"
            f"<div class=remark>before: {start}</div>"
        ) in page
    assert "held-out answered" not in page and "exact" not in page


def test_the_model_card_and_the_list_have_its_scores(summary: dict[str, Any]) -> None:
    card = (Path(summary["export"]) / "README.md").read_text()
    assert "| 6 held-out sums | before | after | gain (95 % interval) |" in card
    before = summary["eval"]["before"]
    after = summary["eval"]["after"]
    gain = summary["eval"]["gain_95"]["distance"]
    assert (
        f"| distance, units | {before['eval/distance']:.1f}"
        f" | {after['eval/distance']:.1f}"
        f" | {gain['mean']:+.1f} ({gain['low']:+.1f} to {gain['high']:+.1f}) |"
    ) in card
    # A share of all sums has no interval of its own.
    answered = f"{before['eval/answered']:.2f} | {after['eval/answered']:.2f} |  |"
    assert f"| answered, % | {answered}" in card
    assert "Lower is better: distance, loss." in card
    place = RunFolder(str(Path(summary["export"]).parents[1]), "r")
    newest = newest_checkpoint(place)
    assert newest is not None and newest.state["run"]["example"] == ["sum", "sums"]
    lines = list(list_checkpoints(place))
    assert (
        "  held-out distance, units " in lines[-1]
        and "  held-out loss, nats per token " in lines[-1]
    )


def outcome(folder: Path, history: History) -> Outcome:
    sheet = ScoreSheet.read(history.run, history.points)
    return Outcome.read(sheet, read_evaluations(folder), None)


def test_what_reads_a_run_later_imports_no_code_that_it_names(
    summary: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = registry._instance

    def refuse(key: str, target: str) -> Any:
        assert target.startswith("lwo_dist."), f"{key} {target} was imported"
        return make(key, target)

    monkeypatch.setattr("lwo_dist.registry._instance", refuse)
    folder = Path(summary["export"]).parent
    history = History.read(read_spool(folder / "metrics.jsonl"))
    page = save_report(history, outcome(folder, history), ([], []), tmp_path / "r.html").read_text()
    assert "held-out distance, units" in page
    newest = newest_checkpoint(RunFolder(str(folder.parent), "r"))
    assert newest is not None
    card = (export_model(newest, tmp_path / "model") / "README.md").read_text()
    assert "| distance, units | " in card


def test_a_run_from_before_shows_plain_names(summary: dict[str, Any], tmp_path: Path) -> None:
    folder = Path(summary["export"]).parent
    history = History.read(read_spool(folder / "metrics.jsonl"))
    del history.run["scores"]
    page = save_report(history, outcome(folder, history), ([], []), tmp_path / "r.html").read_text()
    assert "held-out distance</div>" in page and "held-out answered</div>" in page
    newest = newest_checkpoint(RunFolder(str(folder.parent), "r"))
    assert newest is not None
    del newest.state["run"]["scores"]
    for scores in newest.state["results"]["evaluations"].values():
        scores["eval/lines"] = scores.pop("eval/sums")  # what runs of before have
    card = (export_model(newest, tmp_path / "model") / "README.md").read_text()
    assert "| 6 held-out lines | before | after |" in card
    for plain in ("distance", "answered", "loss"):
        assert f"\n| {plain} | " in card
