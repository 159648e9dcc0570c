"""Encoder-decoders in a run of the product: trained, scored, resumed and exported."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from lwo_dist.config import Config
from lwo_dist.driver import fitting_task, prepare
from lwo_dist.tasks.prepare import prepare_dataset
from lwo_dist.training.evaluate import evaluate
from tests.distributed.test_deepspeed_run import resume_all
from tests.distributed.test_run import exported, make_config
from tests.models import save_tiny_encoder_decoder
from tests.ranks import run_ranks

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed"
)

WORDS = ["alpha", "beta", "gamma", "delta"]
PAIRS = [
    (f"def f_{i}({WORDS[i % 4]}):\n    return {WORDS[i // 4 % 4]}", f"Gives {WORDS[i // 4 % 4]}.")
    for i in range(24)
]
# Each family, strategy and method.
CASES = {
    "t5": ("t5", ["strategy=fsdp", "task=summarisation", "eval.metric=rouge_l"]),
    "bart": ("bart", ["strategy=replicate", "task=generation", "method=full"]),
    "zero": (
        "t5",
        [
            "strategy=deepspeed",
            "zero_stage=3",
            "task=generation",
            "lwo.eps=1e-6",
            "train.gradient_checkpointing=true",
        ],
    ),
    "lora": ("bart", ["strategy=fsdp", "task=repair", "method=lora", "lora.rank=2"]),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder_decoder_run")
    for family in ("t5", "bart"):
        save_tiny_encoder_decoder(folder / family, [f"{a}\n{b}\n" for a, b in PAIRS], family)
    records = [{"source": source, "target": target} for source, target in PAIRS]
    (folder / "all.jsonl").write_text("\n".join(map(json.dumps, records)))
    return folder


def config_of(root: Path, name: str, part: str) -> Config:
    family, overrides = CASES[name]
    settings = (
        "data.format=jsonl",
        "data.held_out_fraction=0.3",
        "train.sequence_length=100",
        "train.steps=6",
        "train.logging_steps=1",
        "checkpoint.steps=5",
        "lwo.lr=1e-2",
        *overrides,
    )
    inputs = (root / family, root / "all.jsonl")
    return prepare(make_config(inputs, root / name / part, *settings))


@pytest.mark.parametrize(
    "names", [["t5", "bart"], pytest.param(["zero", "lora"], marks=pytest.mark.long)]
)
def test_runs_end_in_a_model_that_transformers_loads(names: list[str], root: Path) -> None:
    pairs = [(config_of(root, name, "a"), config_of(root, name, "b")) for name in names]
    results = run_ranks(resume_all, 2, pairs, timeout=300, deepspeed=True)[0]
    for name, (config, _), (summary, losses, resumed, after) in zip(
        names, pairs, results, strict=True
    ):
        assert summary["loss_last"] < summary["loss_first"], name
        best = summary["eval"]["after"]
        assert best["eval/loss"] < summary["eval"]["before"]["eval/loss"], name
        # Resumed in the middle of a visit.
        assert [step for step, _ in losses] == [1, 2, 3, 4, 5, 6], name
        assert after == losses[5:], name
        weights = exported(resumed)
        assert all(torch.equal(t, weights[key]) for key, t in exported(summary).items()), name
        scores = scores_of_export(config, summary["export"])
        assert scores["eval/loss"] == pytest.approx(best["eval/loss"], rel=1e-4), name
        card = (Path(summary["export"]) / "README.md").read_text()
        assert "AutoModelForSeq2SeqLM.from_pretrained" in card and "text2text-generation" in card
        run_folder = Path(config.storage) / "r"
        if summary["method"] == "lwo":
            files = {path.name.partition(".")[0] for path in (run_folder / "layers").iterdir()}
            assert files >= {"embed_head", "encoder_0", "encoder_1", "decoder_0", "decoder_1"}
        if summary["method"] == "lora":
            loads_with_peft(root / "bart", run_folder)


def scores_of_export(config: Config, folder: str) -> dict[str, Any]:
    """In one process, with what transformers loads."""
    task, start = fitting_task(config)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    data = prepare_dataset(config, tokenizer, task, decoder_start=start)
    model, found = AutoModelForSeq2SeqLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not found["missing_keys"] and not found["unexpected_keys"]
    return evaluate(
        model,
        tokenizer,
        data.held_out,
        task=task,
        batch_size=4,
        max_new_tokens=config.eval.max_new_tokens,
        decoder_start=start,
    ).scores


def loads_with_peft(base: Path, run_folder: Path) -> None:
    import peft

    tuned: Any = peft.PeftModel.from_pretrained(
        AutoModelForSeq2SeqLM.from_pretrained(base), str(run_folder / "adapter")
    )
    assert type(tuned).__name__ == "PeftModelForSeq2SeqLM"
    whole = AutoModelForSeq2SeqLM.from_pretrained(run_folder / "model")
    inputs = {"input_ids": torch.arange(12)[None], "decoder_input_ids": torch.arange(8)[None]}
    with torch.no_grad():
        expected = whole(**inputs).logits
        torch.testing.assert_close(tuned(**inputs).logits, expected, rtol=0, atol=1e-5)
