"""Evaluation against a plain greedy loop, one line at a time; and the same scores however the work
is shared.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import (
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from lwo_dist.data.batches import global_batch
from lwo_dist.data.examples import EvalExample, pad_id
from lwo_dist.errors import UserError
from lwo_dist.registry import TASKS
from lwo_dist.tasks import metrics
from lwo_dist.tasks.completion import LineCompletion
from lwo_dist.tasks.prepare import prepare_dataset
from lwo_dist.tasks.scores import Scores
from lwo_dist.training import evaluate as module
from lwo_dist.training.evaluate import Evaluation, evaluate
from tests.code_samples import make_config, make_tokenizer, write_tree
from tests.ranks import run_ranks

NEW_TOKENS = 16
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
SMALL |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "vocab_size": 400}
CONFIGS: dict[str, PretrainedConfig] = {
    "qwen2": Qwen2Config(**SMALL, tie_word_embeddings=True),
    "llama": LlamaConfig(**SMALL),
    "mistral": MistralConfig(**SMALL, sliding_window=10),
    "gpt2": GPT2Config(
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        vocab_size=400,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=0,
    ),
}


@lru_cache
def held_out(root: Path) -> tuple[EvalExample, ...]:
    return prepare_dataset(
        make_config(root / "tree", root / "storage"), make_tokenizer(), TASKS.get("completion")
    ).held_out


def new_model(architecture: str, root: Path) -> torch.nn.Module:
    """A model that has learned how lines look and end: float64, so that a near tie is no matter of
    padding.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[architecture], dtype=torch.float64)
    weights = root / f"{architecture}.pt"
    if weights.exists():
        model.load_state_dict(torch.load(weights))
        return model
    data = prepare_dataset(
        make_config(root / "tree", root / "storage"), make_tokenizer(), TASKS.get("completion")
    )
    optimizer = torch.optim.AdamW(model.parameters(), 2e-2)
    model.train()
    for step in range(100):
        (batch,) = global_batch(
            data, seed=0, step=step, global_batch_size=8, world_size=1, rank=0, accumulation=1
        ).micro_batches
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save(model.state_dict(), weights)
    return model


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    write_tree(folder / "tree")
    for architecture in CONFIGS:
        new_model(architecture, folder)
    return folder


def run(
    model: torch.nn.Module, lines: Sequence[EvalExample], batch_size: int = 3, **more: Any
) -> Evaluation:
    return evaluate(
        model,
        make_tokenizer(),
        lines,
        **{"task": TASKS.get("completion"), **more},
        batch_size=batch_size,
        max_new_tokens=NEW_TOKENS,
    )


@torch.no_grad()
def plainly(model: torch.nn.Module, line: EvalExample) -> tuple[float, str]:
    """The line's mean loss and its greedy completion: no batch, no padding, no cache."""
    tokenizer = make_tokenizer()
    texts = [tokenizer.decode([i]) for i in range(len(tokenizer))]
    model.eval()
    whole = torch.tensor([[*line.context, *line.target]])
    logits = model(whole).logits[0, len(line.context) - 1 : -1]
    loss = torch.nn.functional.cross_entropy(logits, whole[0, len(line.context) :]).item()
    begins = {i for i, text in enumerate(texts) if text.startswith(line.begins_with)}
    tokens, text = list(line.context), ""
    for _ in range(NEW_TOKENS):
        ranked = model(torch.tensor([tokens])).logits[0, -1].argsort(descending=True).tolist()
        if len(tokens) == len(line.context):
            ranked = [i for i in ranked if i in begins]
        tokens.append(ranked[0])
        if tokens[-1] == tokenizer.eos_token_id:
            break
        text = tokenizer.decode(tokens[len(line.context) :])[len(line.begins_with) :]
        if "\n" in text:
            break
    return loss, text.partition("\n")[0]


@pytest.mark.parametrize("own_cache", [False, True])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_equals_a_plain_loop(
    root: Path, architecture: str, own_cache: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, pad = new_model(architecture, root), pad_id(make_tokenizer())
    # The token to pad with may occur in a text, too.
    lines = [
        replace(line, context=[pad, *line.context][i % 2 :])
        for i, line in enumerate(held_out(root))
    ]
    expected = [plainly(model, line) for line in lines]
    assert len({text for _, text in expected}) > 3
    # Some lines are to be right: exact match would otherwise be 0 whatever it compares.
    lines = [
        replace(line, text=f"\t{text}") if i % 3 else line
        for i, (line, (_, text)) in enumerate(zip(lines, expected, strict=True))
    ]
    if own_cache:  # a model whose cache is not one of transformers'
        monkeypatch.setattr(module, "Cache", type("NoCache", (), {}))
    result = run(model, lines)
    assert result.predictions == tuple(text for _, text in expected)
    assert result.columns["loss"] == pytest.approx([loss for loss, _ in expected], rel=1e-5)
    references = [line.text for line in lines]
    assert (
        result.columns["exact_match"].tolist()
        == metrics.exact_matches(result.predictions, references).tolist()
    )
    assert 60 <= result.scores["eval/exact_match"] < 100
    assert (
        result.columns["edit_similarity"].tolist()
        == metrics.edit_similarities(result.predictions, references).tolist()
    )
    tokens = np.array([len(line.target) for line in lines])
    assert result.tokens.tolist() == tokens.tolist()
    sizes = np.array([len(make_tokenizer().decode(line.target).encode()) for line in lines])
    assert result.bytes.tolist() == sizes.tolist()
    loss_per_byte = float((result.columns["loss"] * tokens).sum() / sizes.sum())
    assert result.columns["loss_per_byte"] * sizes == pytest.approx(result.columns["loss"] * tokens)
    assert result.scores == pytest.approx(
        {
            "eval/loss": float((result.columns["loss"] * tokens).sum() / tokens.sum()),
            "eval/exact_match": metrics.exact_match(result.predictions, references),
            "eval/edit_similarity": metrics.edit_similarity(result.predictions, references),
            "eval/bleu": metrics.bleu(result.predictions, references),
            "eval/loss_per_byte": loss_per_byte,
            "eval/lines": 20.0,
        }
    )
    assert all(type(score) is float for score in result.scores.values())
    # In the order of the task: that of every table.
    assert list(result.scores) == [
        "eval/exact_match",
        "eval/edit_similarity",
        "eval/bleu",
        "eval/loss",
        "eval/loss_per_byte",
        "eval/lines",
    ]


def test_lines_come_back_in_their_order(root: Path) -> None:
    model, lines = new_model("qwen2", root), held_out(root)
    forth, back = run(model, lines), run(model, lines[::-1])
    assert len({len(line.context) for line in lines}) > 5
    assert back.predictions == forth.predictions[::-1]
    assert back.columns["loss"] == pytest.approx(forth.columns["loss"][::-1], rel=1e-9)


def test_samples(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SAMPLES", 8)
    lines = held_out(root)
    result = run(new_model("qwen2", root), lines)
    assert len(result.samples) == 8
    at = {(line.name, line.line): i for i, line in enumerate(lines)}
    for sample in result.samples:
        i = at[sample.name, sample.line]
        assert sample.index == i
        assert (sample.reference, sample.prediction) == (lines[i].text, result.predictions[i])
        before = (root / "tree" / sample.name).read_text().split("\n")[: sample.line - 1]
        assert "\n".join(before).endswith(sample.context) and len(sample.context.split("\n")) <= 3
    assert len(run(new_model("qwen2", root), lines[:2]).samples) == 2


def test_the_model_is_given_back_as_it_was(root: Path) -> None:
    model, lines = new_model("qwen2", root), held_out(root)[:4]
    expected = run(model, lines)
    model.train()
    model.model.layers[1].eval()
    modes = [child.training for child in model.modules()]
    hostile = GenerationConfig(
        do_sample=True, temperature=9.0, repetition_penalty=5.0, max_length=3, num_beams=2
    )
    model.generation_config = hostile
    random_state = torch.get_rng_state()
    assert run(model, lines).predictions == expected.predictions
    assert [child.training for child in model.modules()] == modes
    assert model.generation_config is hostile
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(IndexError):
        run(model, [EvalExample([10_000], [1], "", "", 1), lines[0]])
    assert [child.training for child in model.modules()] == modes
    assert model.generation_config is hostile


class Forgetful(LineCompletion):
    """Gives less than its scores promise."""

    def __init__(self, lacking: str):
        self.lacking = lacking

    def score(self, *args: Any) -> Scores:
        whole = super().score(*args)
        totals = {name: value for name, value in whole.totals.items() if name != self.lacking}
        columns = dict(whole.columns)
        if self.lacking == "column":
            columns["loss"] = columns["loss"][:-1]
        return Scores(totals, columns)


@pytest.mark.parametrize(
    ("lacking", "message"),
    [
        ("bleu", "gives no total 'bleu'"),
        ("column", r"'loss' in shape \(1,\); give a value for each"),
    ],
)
def test_a_task_that_breaks_its_promise_is_told(root: Path, lacking: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(new_model("qwen2", root), held_out(root)[:2], task=Forgetful(lacking))


def test_nothing_is_said(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.addHandler(caplog.handler)
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run(new_model("qwen2", root), held_out(root))
    finally:
        logger.removeHandler(caplog.handler)
        logger.setLevel(level)
    assert caplog.records == []


# Of 3 lines a batch: a last round for one of two ranks only, a last round for both, one batch in
# all.
COUNTS = (14, 18, 2)


def _on_ranks(root: Path, architecture: str, sharded: bool) -> list[Evaluation]:
    model = new_model(architecture, root)
    if sharded:
        for layer in model.model.layers if architecture == "qwen2" else model.transformer.h:
            fully_shard(layer)
        fully_shard(model)
    shared = {"rank": dist.get_rank(), "world_size": dist.get_world_size(), "synced": sharded}
    return [run(model, held_out(root)[:count], **shared) for count in COUNTS]


@pytest.mark.parametrize(
    ("architecture", "sharded"), [("qwen2", False), ("qwen2", True), ("gpt2", True)]
)
def test_the_same_scores_however_shared(root: Path, architecture: str, sharded: bool) -> None:
    model = new_model(architecture, root)
    expected = [run(model, held_out(root)[:count]) for count in COUNTS]
    for results in run_ranks(_on_ranks, 2, root, architecture, sharded, timeout=60):
        for result, alone in zip(results, expected, strict=True):
            assert result.scores == alone.scores
            assert result.predictions == alone.predictions
            assert result.samples == alone.samples
            assert result.tokens.tolist() == alone.tokens.tolist()
            names = {"loss", "loss_per_byte", "exact_match", "edit_similarity"}
            assert set(result.columns) == names
            for name, column in result.columns.items():
                assert column.tolist() == alone.columns[name].tolist()
