"""Examples packed to a row: which, what the row holds, and that each is learned as if alone."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from lwo_dist.data.batches import GlobalBatch, global_batch
from lwo_dist.data.dataset import PreparedData, load_dataset, write_dataset
from lwo_dist.data.examples import TrainExample
from lwo_dist.data.packing import pack
from lwo_dist.errors import UserError
from lwo_dist.registry import TASKS
from lwo_dist.tasks.prepare import prepare_dataset
from lwo_dist.training.packing import check_packing
from tests import oracle
from tests.code_samples import make_config, make_tokenizer, write_tree
from tests.prepared import PAD, prepared

LENGTHS = [5, 9, 12, 1, 12, 6, 2, 3]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=40), st.integers(1, 30))
def test_every_example_is_in_one_row_that_has_room(lengths: list[int], room: int) -> None:
    rows = pack(np.array(lengths, dtype=np.int32), room)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    used = [sum(lengths[i] for i in row) for row in rows]
    assert all(total <= room or len(row) == 1 for total, row in zip(used, rows, strict=True))
    # No two rows would fit into one.
    assert all(a + b > room for n, a in enumerate(used) for b in used[:n])


def test_the_longest_come_first_where_they_fit_best() -> None:
    lengths = np.array([3, 7, 5, 4, 2, 3, 6], dtype=np.int32)
    assert pack(lengths, 10) == [[1, 0], [6, 3], [2, 5, 4]]
    assert pack(np.array([12, 1], dtype=np.int32), 10) == [[0], [1]]


def batch_of(data: PreparedData, size: int) -> GlobalBatch:
    return global_batch(
        data, seed=0, step=0, global_batch_size=size, world_size=1, rank=0, accumulation=1
    )


def test_what_is_in_a_packed_row() -> None:
    batch = batch_of(prepared([3, 4, 1, 1], 10, packs=[[1, 0, 2, 3]]), 1)
    (row,) = batch.micro_batches
    assert row.keys() == {"input_ids", "labels", "position_ids"}
    assert row["input_ids"].tolist() == [
        [2000, 2001, 2002, 2003, 1000, 1001, 1002, 3000, 4000, PAD]
    ]
    assert row["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 0, 0, 0]]
    # The first token of each has no label: nothing predicts it.
    labels = [-100, 2001, 2002, 2003, -100, 1001, 1002, -100, -100, -100]
    assert row["labels"].tolist() == [labels]
    assert (batch.tokens, batch.label_tokens) == (9, 5)


def gradients(model: nn.Module, batch: GlobalBatch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    for micro_batch in batch.micro_batches:
        inputs = {name: tensor for name, tensor in micro_batch.items() if name != "labels"}
        logits = model(**inputs).logits[:, :-1].flatten(0, 1)
        labels = micro_batch["labels"][:, 1:].flatten()
        loss = cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
        (loss / batch.label_tokens).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_a_packed_step_has_the_gradient_of_its_examples() -> None:
    model = oracle.tiny_model(tied=True, dtype=torch.float64)
    model.config.use_cache = False
    packs = pack(np.array(LENGTHS, dtype=np.int32), 20)
    assert len(packs) == 3
    alone = batch_of(prepared(LENGTHS, 20, vocabulary=61), len(LENGTHS))
    packed = batch_of(prepared(LENGTHS, 20, vocabulary=61, packs=packs), len(packs))
    assert (packed.tokens, packed.label_tokens) == (alone.tokens, alone.label_tokens)
    expected, found = gradients(model, alone), gradients(model, packed)
    for name, gradient in expected.items():
        assert gradient.abs().max() > 1e-6
        assert (gradient - found[name]).abs().max() < 1e-12, name
    # Otherwise this tests nothing: without the borders the gradient is another.
    for micro_batch in packed.micro_batches:
        del micro_batch["position_ids"]
    leaked = gradients(model, packed)
    name = "model.embed_tokens.weight"
    assert (leaked[name] - found[name]).abs().max() > 1e-6


def test_packs_are_written_once_and_counted(tmp_path: Path) -> None:
    examples = [TrainExample(list(range(2, 2 + n)), 1) for n in [3, 7, 5, 4, 2, 3, 6]]
    write_dataset(tmp_path, [*examples, TrainExample([5], 0)], [], {}, {}, packed_length=10)
    data = load_dataset(tmp_path, "", make_tokenizer(), 10)
    assert data.packs is not None
    assert [row["examples"] for row in data.packs] == [[1, 0], [6, 3], [2, 5, 4]]
    assert data.lengths.tolist() == [10, 10, 10]
    assert data.label_tokens.tolist() == [8, 8, 7]
    assert data.counts["packed_rows"] == 3 and data.counts["windows"] == 7
    assert data.counts["padding_tokens"] == 0
    assert data.counts["padding_tokens_unpacked"] == 70 - 30


def test_packing_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "tree")
    configs = [make_config(root, tmp_path, f"train.packing={on}") for on in ("false", "true")]
    task, tokenizer = TASKS.get("completion"), make_tokenizer()
    loose, packed, again = (prepare_dataset(configs[i], tokenizer, task) for i in (0, 1, 1))
    assert loose.packs is None and "packed_rows" not in loose.counts
    assert packed.fingerprint == again.fingerprint != loose.fingerprint
    assert packed.packs is not None and len(packed.lengths) == len(packed.packs)
    assert packed.lengths.sum() == loose.lengths.sum()


SMALL: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32}


def check(model: Any, precision: str = "fp32") -> None:
    model.config.use_cache = False
    check_packing(SimpleNamespace(module=model), torch.device("cpu"), precision=precision)  # type: ignore[arg-type]


def test_a_model_that_keeps_examples_apart_is_accepted() -> None:
    torch.manual_seed(0)
    model = MixtralForCausalLM(
        MixtralConfig(**SMALL, **HEADS, num_local_experts=4, sliding_window=3)
    ).train()
    check(model)
    check(model.bfloat16(), "bf16")
    assert model.training


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (MambaForCausalLM, MambaConfig(**SMALL, state_size=4)),
        (BloomForCausalLM, BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=2)),
    ],
)
def test_a_model_that_does_not_is_refused_by_name(
    kind: type[PreTrainedModel], config: Any, precision: str
) -> None:
    torch.manual_seed(0)
    model = kind(config)
    with pytest.raises(
        UserError, match=f"^train.packing: {kind.__name__} does not keep.*packing: false"
    ):
        check(model if precision == "fp32" else model.bfloat16(), precision)


def test_a_model_whose_convolutions_reach_across_is_refused() -> None:
    torch.manual_seed(0)
    layers = ["conv", "full_attention"]
    with pytest.raises(UserError, match="Lfm2ForCausalLM does not keep"):
        check(Lfm2ForCausalLM(Lfm2Config(**SMALL, **HEADS, layer_types=layers)))


class NoPositions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = oracle.tiny_model(tied=False)
        self.config = self.inner.config

    def get_input_embeddings(self) -> Any:
        return self.inner.model.embed_tokens

    def forward(self, input_ids: torch.Tensor) -> Any:
        return self.inner(input_ids=input_ids)


class IgnoresPositions(NoPositions):
    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> Any:
        return self.inner(input_ids=input_ids)


def test_a_model_without_position_ids_is_refused() -> None:
    with pytest.raises(UserError, match="NoPositions takes no position_ids; set train.packing"):
        check(NoPositions())
    with pytest.raises(UserError, match="IgnoresPositions does not keep"):
        check(IgnoresPositions())
