"""Compiled layer by layer, a model needs at most three graphs: for a layer below the active one,
for the active one, and for those above. A switch compiles nothing new after the first cycle.
"""

from __future__ import annotations

import os
from functools import partial
from unittest import mock

import pytest
import torch
from torch._dynamo.utils import counters

import lwo_dist
from lwo_dist.strategies.fsdp.builder import shard_model
from tests import oracle
from tests.distributed.training import train, train_step
from tests.ranks import run_ranks

STEPS_PER_CYCLE = 6 * 2


def attach(strategy: str, backend: str | None) -> lwo_dist.LWO:
    model = oracle.tiny_model(tied=False)
    model.config.use_cache = False  # else each layer has graphs of its own, for its place in it
    if backend is not None:
        for layer in model.model.layers:
            layer.compile(backend=backend)
    if strategy == "fsdp":
        shard_model(model, precision="fp32", device_type="cpu")
    config = lwo_dist.LWOConfig(lr=3e-4, eps=1e-6, steps_per_layer=2, max_grad_norm=0.5)
    return lwo_dist.attach(model, config)


def count_graphs(strategy: str, backend: str) -> dict[str, object]:
    """Graphs after each of three cycles, and whether the result is that of the eager model."""
    torch._dynamo.reset()
    counters.clear()
    lwo = attach(strategy, backend)
    lwo.step = partial(lwo.step, wait=False)
    absent = []
    lwo.model.model.embed_tokens.register_forward_hook(
        lambda *_: absent.extend(p.isnan().any() for p in lwo.model.parameters())
    )
    graphs = []
    losses = []
    for cycle in range(3):
        for step in range(cycle * STEPS_PER_CYCLE, (cycle + 1) * STEPS_PER_CYCLE):
            losses.append(train_step(lwo, step)[0])
        graphs.append(counters["stats"]["unique_graphs"])
    assert absent and not any(absent)  # a compiled layer waits for its weights before the pass
    expected, _ = train(attach(strategy, None), len(losses))
    difference = max(abs(a - b) for a, b in zip(losses, expected, strict=True))
    return {"graphs": graphs, "difference": difference, "breaks": dict(counters["graph_break"])}


@pytest.mark.parametrize("strategy", ["replicate", "fsdp"])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_three_graphs_and_none_after_the_first_cycle(strategy: str, backend: str) -> None:
    with mock.patch.dict(os.environ, {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}):
        for rank in run_ranks(count_graphs, 2, strategy, backend, timeout=300):
            first, *later = rank["graphs"]
            assert 0 < first <= 3, rank["breaks"]
            assert later == [first, first]
            assert rank["difference"] < 1e-5
