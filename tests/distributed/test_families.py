"""Every family equals a plain loop over two cycles, with each strategy."""

from __future__ import annotations

import importlib.util
import itertools
import warnings
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import lwo_dist
from lwo_dist import LWOConfig
from lwo_dist.errors import UserError
from lwo_dist.hook import LWO
from lwo_dist.registry import METHODS
from lwo_dist.strategies.deepspeed.builder import load_deepspeed, make_engine
from lwo_dist.strategies.fsdp.builder import shard_model
from tests import families
from tests.distributed import training, zero
from tests.ranks import run_ranks

STEPS_PER_LAYER = 2
CONFIG = LWOConfig(
    lr=1e-3,
    eps=1e-5,
    weight_decay=0.01,
    max_grad_norm=0.5,
    steps_per_layer=STEPS_PER_LAYER,
)
STRATEGIES = {"replicate": 1, "fsdp": 2, "zero3": 2}
"""Strategy -> ranks."""
BOUND = 1e-12
"""Relative, of all that two cycles have moved. Seen: 1e-14."""
# What differs from most: norms registered out of order, experts, positions that all layers take
# from the first one, shared blocks.
SAMPLE = ["bart", "glm4_moe", "t5", "zamba2"]
CASES = [
    pytest.param(
        family,
        strategy,
        marks=() if family in SAMPLE else pytest.mark.long,
        id=f"{family}-{strategy}",
    )
    for family, strategy in itertools.product(sorted(families.FAMILIES), STRATEGIES)
]


def batch(step: int, size: int = 4, length: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(3, families.VOCABULARY, (size, length), generator=generator)


def attach(family: str, strategy: str, *, checkpointing: bool = False) -> LWO:
    model = families.make(family, torch.float32 if strategy == "zero3" else torch.float64)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        for module in model.modules():
            for name in {"p", "dropout"}.intersection(vars(module)):
                setattr(module, name, 0.0)
    if strategy == "fsdp":
        shard_model(model, precision="fp32", device_type="cpu")
    if strategy != "zero3":
        return lwo_dist.attach(model, CONFIG)
    settings = zero.settings(3, gradient_clipping=CONFIG.max_grad_norm)
    settings["train_micro_batch_size_per_gpu"] = 4 // dist.get_world_size()
    engine = make_engine(model, CONFIG, settings, METHODS.get("lwo"))
    engine.module.eval()
    return lwo_dist.attach(engine, CONFIG)


def run(family: str, strategy: str, *, checkpointing: bool = False) -> dict[str, Any]:
    """Two cycles on one rank; what moved although it was not active is in `strays`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what a family freezes itself
        lwo = attach(family, strategy, checkpointing=checkpointing)
    world_size = dist.get_world_size()
    start = before = training.weights(lwo)
    strays = []
    for step in range(2 * len(lwo.layers) * STEPS_PER_LAYER):
        active = lwo.active_layer
        tokens = batch(step)
        loss = families.loss_sum(lwo.model, tokens.chunk(world_size)[dist.get_rank()])
        lwo.backward(loss * world_size / tokens[:, 1:].numel())
        if lwo.step().switched:
            after = training.weights(lwo)
            moved = {name for name in after if not torch.equal(after[name], before[name])}
            strays += sorted(moved.difference(active.parameter_names))
            before = after
    layers = [layer.parameter_names for layer in lwo.layers]
    return {"layers": layers, "start": start, "end": training.weights(lwo), "strays": strays}


def plain(
    family: str, layers: list[tuple[str, ...]], dtype: torch.dtype, chunks: int
) -> dict[str, Tensor]:
    """The same in one process, in plain torch, over the ranks' parts of each batch.

    They stay parts, because a family may compute some of it in fp32, such as its rotary embeddings
    or its router, in a float64 model too: a whole batch is then summed in another order.
    """
    model = families.make(family, dtype)
    parameters = dict(model.named_parameters())
    for step in range(2 * len(layers) * STEPS_PER_LAYER):
        if step % STEPS_PER_LAYER == 0:
            active = layers[step // STEPS_PER_LAYER % len(layers)]
            for name, parameter in parameters.items():
                parameter.requires_grad_(name in active)
            mine = [parameters[name] for name in active]
            optimizer = torch.optim.AdamW(
                mine, lr=CONFIG.lr, eps=CONFIG.eps, weight_decay=CONFIG.weight_decay
            )
        tokens = batch(step)
        for part in tokens.chunk(chunks):
            (families.loss_sum(model, part) / tokens[:, 1:].numel()).backward()
        for parameter in mine:  # an expert that no token went to decays all the same
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        nn.utils.clip_grad_norm_(mine, CONFIG.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in parameters.items()}


@pytest.mark.parametrize(("family", "strategy"), CASES)
def test_equals_the_plain_loop(family: str, strategy: str) -> None:
    if strategy == "zero3" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed")
    ranks = run_ranks(
        run, STRATEGIES[strategy], family, strategy, timeout=200, deepspeed=strategy == "zero3"
    )
    found = ranks[0]
    dtype = torch.float32 if strategy == "zero3" else torch.float64
    expected = plain(family, found["layers"], dtype, STRATEGIES[strategy])
    assert found["strays"] == []
    trained = {name for layer in found["layers"] for name in layer}
    still = {name for name in trained if torch.equal(found["end"][name], found["start"][name])}
    assert still == {name for name in trained if torch.equal(expected[name], found["start"][name])}
    moved = _norm(expected[name] - found["start"][name] for name in expected)
    if strategy == "zero3":  # DeepSpeed computes in fp32: as far off as a plain loop is in fp32
        exact = plain(family, found["layers"], torch.float64, STRATEGIES[strategy])
        noise = _norm(expected[name] - exact[name] for name in expected)
        bound = max(3 * noise, 1e-4 * moved)  # T5 has ReLUs, and one may flip
    else:
        bound = BOUND * moved
    difference = _norm(found["end"][name] - expected[name] for name in expected)
    assert difference < bound, f"relative difference {difference / moved}, above {bound / moved}"
    for name in expected:
        assert torch.equal(found["end"][name], ranks[-1]["end"][name]), name


def test_t5_with_checkpointing_equals_the_plain_loop() -> None:
    """Its decoder's first layer is then part of every backward pass, trained or not."""
    found = run_ranks(partial(run, checkpointing=True), 2, "t5", "fsdp", timeout=200)[0]
    expected = plain("t5", found["layers"], torch.float64, 2)
    assert found["strays"] == []
    moved = _norm(expected[name] - found["start"][name] for name in expected)
    assert _norm(found["end"][name] - expected[name] for name in expected) < BOUND * moved


def loose_experts() -> str:
    """The message of `attach` for an engine that was made without `prepare`."""
    deepspeed = load_deepspeed()
    model = families.make("glm4_moe", torch.float32)
    parameters = list(model.parameters())
    settings = zero.settings(3)
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    engine = deepspeed.build_engine(model, parameters, optimizer, settings)
    with pytest.raises(UserError) as refused:
        lwo_dist.attach(engine, CONFIG)
    return str(refused.value)


def test_an_engine_that_would_fetch_experts_one_by_one_is_refused() -> None:
    pytest.importorskip("deepspeed")
    for message in run_ranks(loose_experts, 2, deepspeed=True):
        assert "fetch parts of model.layers.1.mlp.experts" in message
        assert "lwo_dist.prepare" in message


def _norm(tensors: Any) -> float:
    return sum(tensor.double().square().sum().item() for tensor in tensors) ** 0.5
