"""Checkpoints of whole runs: when they come, who hears of them, what is refused, what an export
holds.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lwo_dist.checkpoint import export
from lwo_dist.cli import main
from lwo_dist.config import Config
from lwo_dist.data import batches
from lwo_dist.driver import prepare
from lwo_dist.run import run
from lwo_dist.training import trainer
from tests.distributed import test_run
from tests.distributed.test_run import STEPS, make_config, stop_after
from tests.models import save_tiny_model
from tests.ranks import RanksError, run_ranks

inputs = test_run.inputs


def run_and_listen(config: Config) -> list[int]:
    """Steps of the checkpoints that this rank heard of."""
    heard: list[int] = []

    def on_commit(step: int, folder: Path) -> None:
        assert (folder / "state.json").is_file()
        heard.append(step)

    run(config, on_commit=on_commit)
    return heard


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        (("checkpoint.minutes=0",), [3, 6, 9, 12, 14]),  # each visit's end, and the run's
        ((), [14]),  # visits are over faster than every 5 minutes
        (("checkpoint.steps=4", "checkpoint.keep=3"), [4, 8, 12, 14]),
    ],
)
def test_a_checkpoint_comes_with_each_visit_and_every_rank_hears_of_it(
    settings: tuple[str, ...], steps: list[int], inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    config = prepare(make_config(inputs, tmp_path, *settings))
    assert run_ranks(run_and_listen, 2, config) == [steps, steps]
    kept = sorted(
        int(path.name.removeprefix("step_")) for path in (tmp_path / "r" / "checkpoints").iterdir()
    )
    assert kept == steps[-config.checkpoint.keep :]
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert summary["checkpoint_blocked_seconds"] > 0


def record_batches(config: Config, stop: int) -> list[tuple[int, list[int]]]:
    """(step, this rank's examples) of each step that was computed."""
    seen: list[tuple[int, list[int]]] = []
    original: Callable[..., Any] = batches._batch
    trainer_batch = trainer.global_batch

    def global_batch(*args: Any, **kwargs: Any) -> Any:
        rows: list[int] = []
        batches._batch = lambda data, rows_of_ranks, rank: (
            rows.extend(rows_of_ranks[rank].tolist()) or original(data, rows_of_ranks, rank)
        )
        found = trainer_batch(*args, **kwargs)
        batches._batch = original
        seen.append((kwargs["step"], rows))
        return found

    trainer.global_batch = global_batch
    try:
        stop_after(config, stop)
    except InterruptedError:  # as a kill: the steps behind the last checkpoint are lost
        pass
    finally:
        trainer.global_batch = trainer_batch
    return seen


def test_the_data_goes_on_with_no_example_twice_and_none_left_out(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    settings = ("checkpoint.steps=5", "eval.num_lines=4")
    config = prepare(make_config(inputs, tmp_path, *settings))
    # On one rank, so that the interruption of rank 0 leaves nobody waiting.
    [first] = run_ranks(record_batches, 1, config, 10)
    second = run_ranks(record_batches, 2, prepare(make_config(inputs, tmp_path, *settings)), -1)
    start = second[0][0][0]
    assert start in (5, 10) and [step for step, _ in second[0]] == list(range(start, STEPS))
    windows = json.loads(next((tmp_path / "cache").rglob("about.json")).read_text())["windows"]
    used = [rows for step, rows in first if step < start]
    used += [a[1] + b[1] for a, b in zip(*second, strict=True)]
    for step, rows in enumerate(used):
        assert rows == batches.global_batch_indices(windows, 8, 0, step).tolist()
    epoch = np.concatenate(used)[:windows]
    assert len(set(epoch.tolist())) == len(epoch)


def test_a_checkpoint_of_another_model_or_schedule_is_refused(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    run_ranks(
        run_and_listen,
        1,
        prepare(make_config(inputs, tmp_path, "cluster.num_workers=1", "train.steps=4")),
    )
    other = tmp_path / "other"
    save_tiny_model(other, [path.read_text() for path in inputs[1].iterdir()], tied=False)
    for override, message in (
        (
            f"model.name={other}",
            r"its checkpoint is of the model .*model, and model.name is .*other; choose another",
        ),
        ("lwo.steps_per_layer=2", "resume with the same order, seed, steps_per_layer"),
    ):
        config = prepare(
            make_config(inputs, tmp_path, "cluster.num_workers=1", "lwo.order=ascending", override)
        )
        with pytest.raises(RanksError, match=message):
            run_ranks(run_and_listen, 1, config)


def test_export_and_checkpoints_on_the_command_line(
    inputs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = prepare(
        make_config(
            inputs, tmp_path, "checkpoint.steps=5", "checkpoint.keep=9", "data.use_git=false"
        )
    )
    run_ranks(run_and_listen, 2, config)
    folder = str(tmp_path / "r")
    capsys.readouterr()
    assert main(["checkpoints", "list", folder]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 5", "step 10", "step 14"]
    assert "held-out loss" in lines[-1] and "held-out loss" not in lines[0]
    assert main(["checkpoints", "verify", folder]) == 0
    assert capsys.readouterr().out.count("whole: ") == 3

    target = tmp_path / "mine"
    assert main(["export", folder, "--to", str(target), "--step", "10", "--dtype", "bf16"]) == 0
    model = AutoModelForCausalLM.from_pretrained(target, dtype="auto")
    assert (
        model.dtype == torch.bfloat16 and AutoTokenizer.from_pretrained(target).pad_token == "<pad>"
    )
    masters = AutoModelForCausalLM.from_pretrained(
        tmp_path / "r" / "checkpoints" / "step_000010"
    ).state_dict()
    assert all(
        torch.equal(masters[name].bfloat16(), tensor) for name, tensor in model.state_dict().items()
    )
    card = (target / "README.md").read_text()
    for text in (
        "license: apache-2.0",
        "base_model: model\n",
        "`model`, tuned on `source` with lwo_dist (layer-wise optimisation",
        "- Steps: 10 of 8 sequences",
        "rounded to bf16",
        "11 train files",
        "Step 10 was not evaluated",
    ):
        assert text in card, text
    assert str(tmp_path) not in card

    newest = tmp_path / "r" / "checkpoints" / "step_000014" / "active.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    assert main(["checkpoints", "verify", folder]) == 2
    captured = capsys.readouterr()
    assert "step 14  damaged: checkpoints/step_000014/active.safetensors" in captured.out
    assert "1 checkpoint(s) of" in captured.err
    assert main(["checkpoints", "prune", folder, "--keep", "1"]) == 0
    assert [p.name for p in (tmp_path / "r" / "checkpoints").iterdir()] == ["step_000010"]
    assert main(["checkpoints", "verify", folder]) == 0


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["export", "{}/nowhere"], "has no checkpoints; give the folder of a run"),
        (["checkpoints", "prune", "{}/r", "--keep", "0"], "--keep = 0 must be at least 1"),
        (["export", "{}/r", "--step", "3"], "--step = 3: .* has the checkpoints 4"),
        (["export", "{}/r", "--to", "{}/full"], "exists and is not a model; give a new folder"),
    ],
)
def test_bad_commands(
    command: list[str], message: str, small_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (small_run / "full" / "notes").mkdir(parents=True, exist_ok=True)
    assert main([part.format(small_run) for part in command]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert re.search(message, line), line


@pytest.fixture(scope="module")
def small_run(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    config = prepare(make_config(inputs, folder, "cluster.num_workers=1", "train.steps=4"))
    run_ranks(run_and_listen, 1, config)
    return folder


def test_the_model_card_says_what_the_model_is(small_run: Path, tmp_path: Path) -> None:
    text = (small_run / "r" / "model" / "README.md").read_text()
    assert main(["export", str(small_run / "r"), "--to", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "README.md").read_text() == text
    data = ModelCard(text).data
    assert data.to_dict() == {
        "base_model": "model",
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["code", "lwo_dist", "lwo"],
    }
    scores = json.loads((small_run / "r" / "summary.json").read_text())["eval"]
    before, after = (scores[when]["eval/loss"] for when in ("before", "after"))
    gain = scores["gain_95"]["loss"]
    interval = f"{gain['mean']:+.3f} ({gain['low']:+.3f} to {gain['high']:+.3f})"
    row = f"| loss, nats per token | {before:.3f} | {after:.3f} | {interval} |"
    assert row in text.splitlines()
    assert "| lines exactly right | 0 | 0 | 0 gained, 0 lost |" in text.splitlines()
    for heading in ("Usage", "Scores", "Training", "Intended use and limits", "Licence"):
        assert f"\n## {heading}\n" in text
    for private in (str(small_run), "/tmp", "total_"):
        assert private not in text


def test_the_usage_in_the_model_card_runs_as_pasted(small_run: Path) -> None:
    folder = small_run / "r" / "model"
    [code] = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("def add(a, b):\n")


def test_a_step_that_is_not_the_best_one_gets_no_interval(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    settings = ("cluster.num_workers=1", "train.steps=4", "eval.steps=2", "checkpoint.keep=9")
    run_ranks(run_and_listen, 1, prepare(make_config(inputs, tmp_path, *settings)))
    best = json.loads((tmp_path / "r" / "summary.json").read_text())["eval"]["best_step"]
    for step in (2, 4):
        target = tmp_path / str(step)
        assert main(["export", str(tmp_path / "r"), "--step", str(step), "--to", str(target)]) == 0
        card = (target / "README.md").read_text()
        assert f"- Steps: {step} of" in card and "was not evaluated" not in card
        assert ("(+" in card or "(-" in card) is (step == best)


def test_a_large_export_is_cut_into_files(
    small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "_SHARD_BYTES", 40_000)
    assert main(["export", str(small_run / "r"), "--to", str(tmp_path / "cut")]) == 0
    files = sorted(path.name for path in (tmp_path / "cut").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "cut").state_dict()
    whole = load_file(small_run / "r" / "model" / "model.safetensors")
    assert all(torch.equal(whole[name], model[name]) for name in whole)
