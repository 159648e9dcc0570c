"""The loss of a base model on held-out files is that of plain transformers on their texts, for the
tokenizers of six kinds.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from lwo_dist.data.batches import global_batch
from lwo_dist.data.dataset import load_dataset, write_dataset
from lwo_dist.registry import TASKS
from lwo_dist.tasks.prepare import prepare_dataset
from lwo_dist.training.evaluate import evaluate
from tests.code_samples import KINDS, make_config, tokenizer_of_kind, write_tree

TASK = TASKS.get("completion")
LENGTH = 900  # A file is one window.


def base(vocabulary: int) -> LlamaForCausalLM:
    """Of random weights, so large that no token is like another."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        initializer_range=0.4,
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_loss_is_that_of_plain_transformers(kind: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of_kind(kind)
    model = base(len(tokenizer))
    config = make_config(
        write_tree(tmp_path / "tree", files=6), tmp_path, f"train.sequence_length={LENGTH}"
    )
    source = TASK.read(config.data, tmp_path)
    plain = {}
    for file in source.held_out:
        ids = torch.tensor([*tokenizer(file.path.read_text())["input_ids"], tokenizer.eos_token_id])
        plain[file.name] = cross_entropy(model(ids[None, :-1]).logits[0], ids[1:], reduction="none")

    # Lines, as they are scored.
    data = prepare_dataset(config, tokenizer, TASK)
    found = evaluate(model, tokenizer, data.held_out, task=TASK, batch_size=8, max_new_tokens=16)
    assert len(data.held_out) == 20
    for example, loss in zip(data.held_out, found.columns["loss"], strict=True):
        size = len(example.context)
        expected = plain[example.name][size - 1 : size + len(example.target) - 1]
        assert loss == pytest.approx(float(expected.mean()), abs=1e-5)

    # Whole files, as windows of them are learned.
    held_out = replace(source, train=source.held_out)
    write_dataset(tmp_path, TASK.training_examples(held_out, tokenizer, config), [], {}, {})
    windows = load_dataset(tmp_path, "", tokenizer, LENGTH)
    count = len(windows.lengths)
    assert count == len(plain)
    (batch,) = global_batch(
        windows, seed=0, step=0, global_batch_size=count, world_size=1, rank=0, accumulation=1
    ).micro_batches
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    assert float(model(**inputs).loss) == pytest.approx(
        float(torch.cat(list(plain.values())).mean()), abs=1e-5
    )
