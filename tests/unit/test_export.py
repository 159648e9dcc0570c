"""What an export writes, and where, besides weights that are published as they were trained."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GenerationConfig, MixtralConfig, MixtralForCausalLM

from lwo_dist.checkpoint.export import export_model
from lwo_dist.checkpoint.format import newest_checkpoint
from lwo_dist.checkpoint.store import LayerStore
from lwo_dist.cli import main
from lwo_dist.config import LWOConfig
from lwo_dist.hook import attach
from lwo_dist.tasks.completion import LineCompletion
from tests import stores

ROUND1 = Path(__file__).parents[1] / "data" / "round1" / "run"


def test_fused_experts_get_their_names_and_the_generation_settings_stay(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2}
    model = MixtralForCausalLM(MixtralConfig(vocab_size=31, **sizes, **heads))
    settings = GenerationConfig(eos_token_id=[3, 5], pad_token_id=7)

    def model_files(folder: Path) -> None:
        model.config.save_pretrained(folder)
        settings.save_pretrained(folder)

    lwo = attach(model, LWOConfig())
    store = LayerStore(stores.run_folder(tmp_path), model_files)
    store.save(lwo, {})
    store.wait()
    checkpoint = newest_checkpoint(stores.run_folder(tmp_path))
    assert checkpoint is not None
    target = export_model(checkpoint, tmp_path / "model")
    names = load_file(target / "model.safetensors")
    assert any("experts.1." in name for name in names)  # apart, as they are published
    exported = GenerationConfig.from_pretrained(target)
    assert (exported.eos_token_id, exported.pad_token_id) == ([3, 5], 7)
    loaded = AutoModelForCausalLM.from_pretrained(target).state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(loaded[name], tensor, rtol=0, atol=0)


def record_of(losses: dict[int, float], **changes: Any) -> dict[str, Any]:
    """The trainer's entries of a checkpoint, with these evaluations: step -> loss."""
    state = json.loads((ROUND1 / "checkpoints" / "step_000011" / "state.json").read_text())
    scores = LineCompletion().sheet.record()
    values = dict.fromkeys(("exact_match", "edit_similarity", "bleu", "loss", "lines"), 10.0)
    base = {f"eval/{name}": value for name, value in values.items()}
    evaluations = {str(step): base | {"eval/loss": loss} for step, loss in losses.items()}
    return {
        "run": {**state["run"], **scores, "metric": "loss", **changes},
        "results": {**state["results"], "evaluations": evaluations},
    }


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with the checkpoints 2, 4 and 6, of which 4 is the best one, in a working directory of
    its own.
    """
    lwo = stores.attach()
    store = LayerStore(stores.run_folder(tmp_path / "runs"), stores.model_files, keep=9)
    losses = {0: 5.0}
    for loss in (3.0, 2.0, 4.0):
        stores.step(lwo, 2)
        losses[lwo.step_count] = loss
        stores.save(store, lwo, **record_of(losses))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "runs" / "r"


def same_weights(folder: Path, checkpoint: Path) -> bool:
    exported = load_file(folder / "model.safetensors")
    held = AutoModelForCausalLM.from_pretrained(checkpoint).state_dict()
    return all(torch.equal(held[name], tensor) for name, tensor in exported.items())


@pytest.mark.parametrize(
    ("options", "step", "which"),
    [
        ([], 4, "the best by loss"),
        (["--newest"], 6, "the newest"),
        (["--step", "2"], 2, "as given"),
    ],
)
def test_the_best_checkpoint_is_exported_unless_told_otherwise(
    run: Path, options: list[str], step: int, which: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(run), *options]) == 0
    here = Path.cwd() / "r"
    assert capsys.readouterr().out.splitlines() == [f"step {step}, {which}", f"model: {here}"]
    steps = (2, 4, 6)
    found = [n for n in steps if same_weights(here, run / "checkpoints" / f"step_{n:06d}")]
    assert found == [step]


def test_a_damaged_best_checkpoint_is_not_replaced_by_another_one(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = run / "checkpoints" / "step_000004" / "active.safetensors"
    best.write_bytes(best.read_bytes()[:-1])
    assert main(["export", str(run)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "step 4: the checkpoint is damaged (" in line and line.endswith("--step, or --newest")
    assert list(Path.cwd().iterdir()) == []


def test_a_run_without_evaluations_exports_its_newest_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    lwo = stores.attach()
    store = LayerStore(stores.run_folder(tmp_path / "runs"), stores.model_files, keep=9)
    stores.step(lwo)
    stores.save(store, lwo, **record_of({0: 5.0}))
    assert main(["export", "runs/r"]) == 0
    assert "step 1, the newest; none was evaluated" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--adapter"], "method: lwo trains the model's own weights, so there is no adapter"),
        (["--base", "base"], "--base = base has no effect: the checkpoint, of method: lwo, holds"),
        (["--adapter", "--dtype", "bf16"], "have no effect with --adapter, which writes fp32"),
        (["--adapter", "--base", "base"], "have no effect with --adapter, which writes fp32"),
    ],
)
def test_options_that_are_for_adapters_are_refused(
    run: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(run), *options]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line
    assert list(Path.cwd().iterdir()) == []


def test_an_export_replaces_nothing_unasked(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("r").mkdir()  # an empty folder holds nothing to lose
    assert main(["export", str(run)]) == 0
    capsys.readouterr()
    Path("notes").mkdir()
    Path("notes", "mine.txt").write_text("mine")
    Path("file").write_text("mine")
    for options, message in (
        ([], "--to = r exists; give a new folder, or --overwrite to replace the model there"),
        (["--to", "notes"], "--to = notes exists and is not a model; give a new folder"),
        (["--to", "notes", "--overwrite"], "--to = notes exists and is not a model"),
        (["--to", "file", "--overwrite"], "--to = file exists and is not a model"),
    ):
        before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
        assert main(["export", str(run), "--newest", *options]) == 2
        out, err = capsys.readouterr()
        assert out == "" and message in err and len(err.splitlines()) == 1
        assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before
    assert main(["export", str(run), "--newest", "--overwrite"]) == 0
    assert same_weights(Path("r"), run / "checkpoints" / "step_000006")


@pytest.mark.parametrize(("umask", "file_mode"), [(0o077, 0o600), (0o027, 0o640), (0o022, 0o644)])
def test_all_files_of_an_export_have_the_mode_of_the_umask(
    tmp_path: Path, umask: int, file_mode: int
) -> None:
    lwo = stores.attach()
    store = LayerStore(stores.run_folder(tmp_path), stores.model_files)
    stores.save(store, lwo)
    checkpoint = newest_checkpoint(stores.run_folder(tmp_path))
    assert checkpoint is not None
    before = os.umask(umask)
    try:
        target = export_model(checkpoint, tmp_path / "model")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in target.iterdir()}
    assert len(modes) > 2 and set(modes.values()) == {file_mode}, modes
