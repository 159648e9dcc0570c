"""TRL's SFTTrainer with `use_lwo`, on a small chat set with packing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from lwo_dist.integrations.transformers import use_lwo
from tests import trainers
from tests.models import save_tiny_model

TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}{{ eos_token }}"
    "{% endfor %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("model")
    save_tiny_model(folder, ["def f(x):\n    return x\n"], vocabulary=300)
    yield folder


def make(model: Path, folder: Path, **more: Any) -> SFTTrainer:
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = TEMPLATE
    rows = [
        [
            {"role": "user", "content": f"add {number}"},
            {"role": "assistant", "content": f"def add(x):\n    return x + {number}\n"},
        ]
        for number in range(48)
    ]
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_length": 64,
        "packing": True,
        "packing_strategy": "wrapped",
        "per_device_train_batch_size": 2,
        "max_steps": 6,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
    }
    return SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=SFTConfig(**(settings | more)),
        train_dataset=Dataset.from_dict({"messages": rows}),
        processing_class=tokenizer,
    )


def test_layers_are_trained_in_turn_and_a_resume_is_bitwise(model: Path, tmp_path: Path) -> None:
    trainer = use_lwo(make(model, tmp_path, save_strategy="steps", save_steps=3), trainers.config())
    before = trainers.snapshot(trainer.model)
    trainer.train()
    after = trainers.snapshot(trainer.model)
    visited = [name for layer in trainer.lwo.layers[:3] for name in layer.parameter_names]
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == set(visited) and moved != set(before)
    losses = trainers.logged(trainer, "loss")
    assert losses[-1] < losses[0]
    assert "mean_token_accuracy" in trainer.state.log_history[0]  # what TRL logs

    again = use_lwo(make(model, tmp_path), trainers.config())
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for name, weight in trainers.snapshot(again.model).items():
        assert torch.equal(weight, after[name]), name


def test_one_layer_that_holds_all_equals_the_ordinary_trainer(model: Path, tmp_path: Path) -> None:
    ordinary = make(model, tmp_path, max_steps=3)
    ordinary.train()
    trainer = use_lwo(make(model, tmp_path, max_steps=3), trainers.config(), method="full")
    trainer.train()
    ours = trainers.snapshot(trainer.model)
    for name, weight in trainers.snapshot(ordinary.model).items():
        torch.testing.assert_close(ours[name], weight, rtol=0, atol=2e-5)


QUIET: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "max_steps": 4,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
}


def make_for_preferences(kind: str, model: Path, folder: Path) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(model)
    pairs = {
        "prompt": [f"add {number}" for number in range(16)],
        "chosen": [f" return x + {number}" for number in range(16)],
        "rejected": [f" return x - {number}" for number in range(16)],
    }
    if kind == "dpo":
        policy, reference = (
            AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32) for _ in range(2)
        )
        return DPOTrainer(
            model=policy,
            ref_model=reference,
            args=DPOConfig(str(folder), max_length=64, **QUIET),
            train_dataset=Dataset.from_dict(pairs),
            processing_class=tokenizer,
        )
    torch.manual_seed(3)  # of the new head
    judge = AutoModelForSequenceClassification.from_pretrained(
        model, dtype=torch.float32, num_labels=1
    )
    return RewardTrainer(
        model=judge,
        args=RewardConfig(str(folder), max_length=64, disable_dropout=True, **QUIET),
        train_dataset=Dataset.from_dict(pairs),
        processing_class=tokenizer,
    )


@pytest.mark.parametrize("kind", ["dpo", "reward"])
def test_preferences_are_learned_as_by_the_ordinary_trainer(
    kind: str, model: Path, tmp_path: Path
) -> None:
    """With `full` the same weights; with `lwo` a layer at a time, and never the reference model."""
    ordinary = make_for_preferences(kind, model, tmp_path)
    ordinary.train()
    whole = use_lwo(make_for_preferences(kind, model, tmp_path), trainers.config(), method="full")
    whole.train()
    ours = trainers.snapshot(whole.model)
    for name, weight in trainers.snapshot(ordinary.model).items():
        torch.testing.assert_close(ours[name], weight, rtol=0, atol=2e-5)

    trainer = use_lwo(make_for_preferences(kind, model, tmp_path), trainers.config())
    before = trainers.snapshot(trainer.model)
    reference = trainers.snapshot(trainer.ref_model) if kind == "dpo" else {}
    trainer.train()
    after = trainers.snapshot(trainer.model)
    visited = {name for layer in trainer.lwo.layers[:2] for name in layer.parameter_names}
    assert {name for name in before if not torch.equal(before[name], after[name])} == visited
    assert trainers.logged(trainer, "lwo/active_layer") == [0, 0, 1, 1]
    for name, weight in reference.items():
        assert torch.equal(trainers.snapshot(trainer.ref_model)[name], weight), name
    losses = trainers.logged(trainer, "loss")
    assert losses[-1] < losses[0]
