"""A method and a strategy of one's own (`tests/dummies.py`): one class each, and nothing elsewhere.

A visit of the dummy method changes more than one layer, under every strategy as a plain loop does.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import lwo_dist
from lwo_dist.callback import Callback
from lwo_dist.config import Config
from lwo_dist.driver import prepare
from lwo_dist.hook import LWO
from lwo_dist.run import run
from lwo_dist.strategies.deepspeed.builder import make_engine
from lwo_dist.strategies.fsdp.builder import shard_model
from tests import oracle
from tests.distributed import test_run, zero
from tests.distributed.test_run import make_config, stop_after
from tests.distributed.training import train_step, weights
from tests.dummies import Gains, SummedBuilder
from tests.ranks import RanksError, run_ranks

inputs = test_run.inputs
METHOD = Gains()
WEIGHTS = "model.safetensors"
RECIPE = oracle.Recipe(steps=18, steps_per_layer=3, max_grad_norm=0.5)


def prepared(dtype: torch.dtype) -> nn.Module:
    model = oracle.tiny_model(tied=False)
    METHOD.prepare(model, Config())
    return model.to(dtype)


def config(state: str) -> lwo_dist.LWOConfig:
    return zero.lwo_config(RECIPE, state=state)


def plain_loop(dtype: torch.dtype, state: str) -> tuple[list[float], dict[str, Tensor]]:
    """Every layer of a visit has an optimizer of its own, fresh or kept; with `reset`, that of a
    layer goes on if it is beside the active one in this visit and the last.
    """
    model = prepared(dtype)
    parameters = dict(model.named_parameters())
    visits = METHOD.visits(METHOD.layers(model, config(state)))
    optimizers: dict[str, torch.optim.Optimizer] = {}
    losses = []
    for step in range(RECIPE.steps):
        visit = visits[step // RECIPE.steps_per_layer % len(visits)]
        if step % RECIPE.steps_per_layer == 0 and state == "reset":
            last = visits[(step - 1) // RECIPE.steps_per_layer % len(visits)]
            both = {layer.name for layer in visit.also if layer in last.also}
            optimizers = {name: own for name, own in optimizers.items() if name in both}
        for layer in visit.layers:
            if layer.name not in optimizers:
                mine = [parameters[name] for name in layer.parameter_names]
                optimizers[layer.name] = torch.optim.AdamW(
                    mine, lr=RECIPE.lr, eps=RECIPE.eps, weight_decay=0.01
                )
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in visit.parameter_names)
            parameter.grad = None
        tokens, labels = oracle.global_batch(step)
        loss = oracle.loss_sum(model, tokens, labels) / (labels[:, 1:] != -100).sum()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), RECIPE.max_grad_norm)
        for layer in visit.layers:
            optimizers[layer.name].step()
        losses.append(loss.item())
    return losses, {name: p.detach() for name, p in parameters.items()}


def hook_on(strategy: str, dtype: torch.dtype, state: str) -> LWO:
    model: Any = prepared(dtype)
    if strategy == "fsdp":
        shard_model(model, precision="fp32", device_type="cpu")
    if strategy.startswith("deepspeed"):
        settings = zero.settings(int(strategy[-1]), accumulation=1)
        model = make_engine(model, config(state), settings, METHOD)
    builder = SummedBuilder() if strategy == "summed" else None
    return lwo_dist.attach(model, config(state), METHOD, strategy=builder)


def losses_and_weights(
    strategy: str, dtype: torch.dtype, state: str
) -> tuple[list[float], dict[str, Tensor]]:
    lwo = hook_on(strategy, dtype, state)
    losses = [train_step(lwo, step)[0] for step in range(RECIPE.steps)]
    changed = {layer.name: lwo.last_changed(layer) for layer in lwo.layers}
    # 18 steps are a cycle of 4 visits of 3 and half of the next: gain_3 moves at every step.
    assert (changed["layer_1"], changed["layer_3"], changed["gain_3"]) == (18, 12, 18)
    assert changed["gain_0"] == 15
    return losses, weights(lwo)


@pytest.mark.parametrize("state", ["reset", "keep"])
@pytest.mark.parametrize("strategy", ["replicate", "fsdp", "summed"])
def test_visits_of_several_layers_equal_a_plain_loop(strategy: str, state: str) -> None:
    expected, expected_weights = plain_loop(torch.float64, state)
    for losses, found in run_ranks(losses_and_weights, 2, strategy, torch.float64, state):
        assert losses == pytest.approx(expected, abs=1e-11)
        for name, tensor in expected_weights.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-10)


@pytest.mark.parametrize("state", ["reset", "keep"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_visits_of_several_layers_under_zero(stage: int, state: str) -> None:
    expected, expected_weights = plain_loop(torch.float32, state)
    found = run_ranks(
        losses_and_weights, 2, f"deepspeed{stage}", torch.float32, state, deepspeed=True
    )
    for losses, weights_found in found:
        assert losses == pytest.approx(expected, abs=1e-5)
        for name, tensor in expected_weights.items():
            torch.testing.assert_close(weights_found[name], tensor, rtol=0, atol=1e-5)


class _Losses(Callback):
    def __init__(self) -> None:
        self.losses: dict[int, float] = {}

    def on_metrics(self, step: int, metrics: Any) -> None:
        self.losses[step] = metrics["train/loss"]


def whole_run(config: Any) -> dict[int, float]:
    listener = _Losses()
    run(config, [listener])
    return listener.losses


@pytest.mark.parametrize("strategy", ["replicate", "fsdp", "tests.dummies:SummedBuilder"])
def test_a_whole_run_with_a_method_and_a_strategy_of_ones_own(
    strategy: str, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    """Model, data, checkpoints in mid-visit, resume and export: the config names both classes."""
    settings = ["method=tests.dummies:Gains", f"strategy={strategy}", "train.logging_steps=1"]
    settings += ["checkpoint.steps=4", "lwo.state=keep"]
    whole = prepare(make_config(inputs, tmp_path / "whole", *settings))
    unbroken = run_ranks(whole_run, 2, whole)[0]
    broken = prepare(make_config(inputs, tmp_path / "broken", *settings))
    with pytest.raises(RanksError, match="InterruptedError"):
        run_ranks(stop_after, 2, broken, 4)  # in mid-visit
    resumed = run_ranks(whole_run, 2, broken)[0]
    assert min(resumed) == 5
    assert resumed == {step: unbroken[step] for step in resumed}
    summary = json.loads((tmp_path / "whole" / "r" / "summary.json").read_text())
    assert summary["strategy"] == strategy
    # The export has no gain, and loads as a plain model.
    assert not any(name.endswith("gain") for name in load_file(f"{summary['export']}/{WEIGHTS}"))
    AutoModelForCausalLM.from_pretrained(summary["export"])
