"""The description of a run on its page in MLflow."""

from __future__ import annotations

from pathlib import Path

from lwo_dist.config import Config, DataConfig, ModelConfig, TrainConfig
from lwo_dist.registry import TASKS
from lwo_dist.run_info import RunInfo
from lwo_dist.tracking.description import RUN_ID, describe_result, describe_start

from .test_run_info import make_info

SHEET = TASKS.get("completion").sheet


def info_for(folder: Path) -> RunInfo:
    config = Config(
        model=ModelConfig(name="/cache/models--org--Base-1B/snapshots/0a1b"),
        data=DataConfig(source="https://github.com/a/shop"),
        train=TrainConfig(steps=1200, global_batch_size=16),
    )
    return make_info(
        config, run_dir=folder, held_out_examples=200, task_record=SHEET.record(), device="H100"
    )


def summary() -> dict:
    before = {score.key: 10.0 for score in SHEET.scores} | {SHEET.count_key: 200.0}
    after = before | {"eval/edit_similarity": 52.3, "eval/loss": 2.5}
    gains = {
        "loss": {"mean": 0.25, "low": 0.2, "high": 0.3},
        "edit_similarity": {"mean": 5.5, "low": 4.0, "high": 7.0},
    }
    scores = {"before": before, "after": after, "best_step": 600, "gain_95": gains}
    return {
        "eval": {**scores, **SHEET.record()},
        "training_seconds": 3725.0,
        "tokens_per_second": 12345.6,
    }


def test_the_start_says_what_is_tuned_on_what_and_how(tmp_path: Path) -> None:
    assert describe_start(info_for(tmp_path)) == (
        "Tunes **org/Base-1B** on **shop** (task `completion`) with method `lwo` and strategy"
        " `fsdp` on 2 x H100: 70 of its 100 parameters in 2 layers, 1,200 steps of 16 sequences,"
        " scored on 200 held-out lines."
    )


def test_the_result_begins_with_the_scores_and_their_intervals(tmp_path: Path) -> None:
    text = describe_result(info_for(tmp_path), summary(), "http://mlflow", "r-1")
    first, _, *lines = text.splitlines()
    assert first == "**org/Base-1B** before and after step 600, on 200 held-out lines of **shop**:"
    scores = lines[: lines.index("")]
    assert len(scores) == len(SHEET.scores)
    assert (
        "- edit similarity: 10.00 to **52.30** %, gain +5.50 (95 % interval +4.00 to +7.00)"
    ) in scores
    # MLflow hides what comes after the first lines.
    assert [line.partition(":")[0] for line in scores[:2]] == ["- exact match", "- loss"]
    assert "- BLEU: 10.00 to **10.00**" in scores  # no interval, no unit
    assert "scored on 200 held-out lines. Trained in 1h02m, at 12,346 tokens/s." in text
    assert f'load_model("runs:/{RUN_ID}/r-1")' in text
    assert 'set_tracking_uri("http://mlflow")' in text


def test_the_model_card_follows_without_its_header(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "README.md").write_text("---\nlicense: mit\n---\n\n# Card\n\ntext\n")
    text = describe_result(info_for(tmp_path), summary(), "http://mlflow", None)
    assert text.endswith("\n\n---\n\n# Card\n\ntext") and "license" not in text
    assert "load_model" not in text  # none is logged


def test_a_run_without_scores_has_a_description(tmp_path: Path) -> None:
    info = info_for(tmp_path)
    assert describe_result(info, {}, "http://mlflow", None) == describe_start(info)


def test_no_secret_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "README.md").write_text(f"ghp_{'a1' * 18}")
    info = info_for(tmp_path)
    data = DataConfig.model_construct(source="https://me:hunter2@host/ghp_" + "a1" * 18)
    model = ModelConfig(name=f"org/ghp_{'a1' * 18}")
    changed = info.config.model_copy(update={"data": data, "model": model})
    info = make_info(changed, run_dir=tmp_path)
    text = describe_start(info) + describe_result(info, {}, "http://mlflow", None)
    assert "hunter2" not in text and "ghp_a" not in text
