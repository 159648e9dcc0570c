"""Packed sequences on real ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lwo_dist import distributed
from lwo_dist.data.batches import global_batch
from lwo_dist.data.packing import pack
from lwo_dist.training.packing import check_packing
from tests import oracle
from tests.distributed.training import attach, weights
from tests.prepared import prepared
from tests.ranks import run_ranks

LENGTHS = [5, 9, 12, 1, 12, 6, 2, 3, 8, 20]


def one_step(strategy: str, packs: list[list[int]] | None) -> dict[str, Tensor]:
    """The weights after one step over all examples; they move by g / (|g| + 1) and the decay."""
    recipe = oracle.Recipe(lr=1.0, eps=1.0)
    lwo = attach(strategy, recipe, tied=True, dtype=torch.float64, method="full")
    lwo.module.config.use_cache = False
    check_packing(lwo, torch.device("cpu"), precision="fp32")
    batch = global_batch(
        prepared(LENGTHS, 20, vocabulary=61, packs=packs),
        seed=0,
        step=0,
        global_batch_size=len(packs or LENGTHS),
        world_size=distributed.world_size(),
        rank=distributed.rank(),
        accumulation=1,
    )
    (inputs,) = batch.micro_batches
    labels = inputs.pop("labels")[:, 1:].flatten()
    logits = lwo.model(**inputs).logits[:, :-1].flatten(0, 1)
    loss = cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    lwo.backward(loss * distributed.world_size() / batch.label_tokens)
    lwo.step()
    return weights(lwo)


@pytest.mark.parametrize("strategy", ["replicate", "fsdp"])
def test_two_ranks_learn_packed_examples_as_if_each_was_alone(strategy: str) -> None:
    packs = pack(np.array(LENGTHS, dtype=np.int32), 20)
    assert len(packs) == 4
    alone, packed = (run_ranks(one_step, 2, strategy, how)[0] for how in (None, packs))
    start = oracle.tiny_model(tied=True, dtype=torch.float64).state_dict()
    assert any((alone[name] - start[name]).abs().max() > 1e-9 for name in alone)
    for name, tensor in alone.items():
        assert (tensor - packed[name]).abs().max() < 1e-12, name
