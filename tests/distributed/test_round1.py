"""A run that lwo_dist 0.1.0 broke off in mid-visit (`tests/data/round1`) goes on with this code.

The run was 20 steps of a tiny model, `replicate`, `state: keep`, 3 steps a layer; it was stopped by
an exception at its checkpoint of step 11. `expected.json` has the losses of the same code without a
stop. Its files were tokenised line by line, and files are now tokenised whole. So it is refused as
a run with other data, unless it gets the examples of then, and its checkpoint their fingerprint.
"""

from __future__ import annotations

import json
import shutil
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from lwo_dist.callback import Callback
from lwo_dist.checkpoint.format import STATE, seal
from lwo_dist.cli import main
from lwo_dist.config import Config
from lwo_dist.config.reading import load_config
from lwo_dist.data.examples import LineTokenizer, TokenizedText
from lwo_dist.driver import prepare
from lwo_dist.errors import UserError
from lwo_dist.models import load_tokenizer
from lwo_dist.registry import TASKS
from lwo_dist.run import run
from lwo_dist.tasks.prepare import prepare_dataset
from tests.code_samples import write_tree
from tests.ranks import run_ranks

DATA = Path(__file__).parents[1] / "data" / "round1"


@pytest.fixture
def config(tmp_path: Path) -> Config:
    shutil.copytree(DATA / "run", tmp_path / "runs" / "round1")
    shutil.copytree(DATA / "tiny", tmp_path / "tiny")
    source = write_tree(tmp_path / "source")
    settings = [
        f"data.source={source}",
        f"storage={tmp_path / 'runs'}",
        f"model.name={tmp_path / 'tiny'}",
        "run_name=round1",
        "train.sequence_length=48",
        "eval.num_lines=10",
        "eval.max_new_tokens=8",
        "data.held_out_fraction=0.3",
        "lwo.steps_per_layer=3",
        "lwo.lr=1e-3",
        "lwo.lr_scheduler_type=constant",  # the default of its time
        "lwo.state=keep",
        "train.steps=20",
        "train.global_batch_size=4",
        "train.logging_steps=1",
        "tracking.enabled=false",
    ]
    return load_config(None, settings)


class Losses(Callback):
    def __init__(self) -> None:
        self.losses: dict[str, float] = {}

    def on_metrics(self, step: int, metrics: Any) -> None:
        self.losses[str(step)] = metrics["train/loss"]


def losses_of(config: Config) -> dict[str, float]:
    listener = Losses()
    run(config, [listener])
    return listener.losses


def refusal(config: Config) -> str:
    try:
        run(config)
    except UserError as error:
        return str(error)
    raise AssertionError("not refused")


def line_by_line(self: LineTokenizer, text: str) -> TokenizedText:
    lines = self._tokenizer(text.splitlines(keepends=True), add_special_tokens=False)["input_ids"]
    edges = list(accumulate(map(len, lines), initial=0))
    return TokenizedText(list(chain(*lines)), [end - 1 for end in edges[1:]], edges)


def give_its_examples(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put them into the cache, in the place of today's."""
    with monkeypatch.context() as patch:
        patch.setattr(LineTokenizer, "__call__", line_by_line)
        tokenizer = load_tokenizer(config.model)
        data = prepare_dataset(config, tokenizer, TASKS.get("completion"))
    path = Path(config.storage) / "round1" / "checkpoints" / "step_000011" / STATE
    state = json.loads(path.read_text())
    del state["digest"]
    state["data"]["fingerprint"] = data.fingerprint
    path.write_bytes(seal(state))


def test_other_examples_are_refused(config: Config) -> None:
    cluster = config.cluster.model_copy(update={"num_workers": 1})
    ready = prepare(config.model_copy(update={"strategy": "replicate", "cluster": cluster}))
    message = run_ranks(refusal, 1, ready)[0]
    assert "run_name = round1: its checkpoint was made with other data" in message
    assert "an older lwo_dist" in message and "\n" not in message


@pytest.mark.parametrize(("strategy", "ranks"), [("replicate", 1), ("fsdp", 2)])
def test_it_goes_on_where_it_was(
    strategy: str, ranks: int, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = json.loads((DATA / "expected.json").read_text())
    cluster = config.cluster.model_copy(update={"num_workers": ranks})
    changed = {"strategy": strategy, "cluster": cluster}
    ready = prepare(config.model_copy(update=changed))
    give_its_examples(ready, monkeypatch)
    assert run_ranks(losses_of, ranks, ready)[0] == pytest.approx(expected, abs=1e-5)
    summary = json.loads((Path(config.storage) / "round1" / "summary.json").read_text())
    assert summary["tokens"] > 1869  # those of the first 11 steps and more
    assert summary["eval"]["before"]["eval/loss"] == pytest.approx(5.755691012820682)


def test_its_checkpoint_is_listed_verified_and_exported(
    config: Config, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(config.storage) / "round1"
    monkeypatch.chdir(folder.parents[1])
    assert main(["checkpoints", "list", str(folder)]) == 0
    assert main(["checkpoints", "verify", str(folder)]) == 0
    assert main(["export", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "step 11" in said and "whole: " in said
    assert "step 11, the newest; this run does not say which one is best" in said
    AutoModelForCausalLM.from_pretrained("round1")
    card = Path("round1", "README.md").read_text()
    assert "| exact_match | 0.000 |\n" in card and "Step 11 was not evaluated" in card
    assert "base_model: tiny\n" in card  # not the path that the record holds
