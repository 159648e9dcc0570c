"""Under every strategy the loss without whole logits trains as that of whole logits, with the same
collectives, where the ranks have different numbers of labels, or one has none.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import pad

import lwo_dist
from lwo_dist.config import Config, LoRAConfig
from lwo_dist.hook import LWO
from lwo_dist.losses import IGNORED_LABEL, summed_loss
from lwo_dist.methods.lora import LoRA
from lwo_dist.strategies.deepspeed.builder import make_engine
from lwo_dist.strategies.fsdp.builder import shard_model
from tests import oracle
from tests.distributed import zero
from tests.distributed.collectives import CountCollectives
from tests.distributed.training import train, train_step
from tests.ranks import run_ranks

# Two visits of the lowest layer and of the highest; an accumulation in each step.
RECIPE = oracle.Recipe(steps=14, steps_per_layer=2, max_grad_norm=0.5, accumulation=2)
CONFIG = zero.lwo_config(RECIPE)
DTYPE = torch.float64


def plain(tied: bool) -> Any:
    return oracle.tiny_model(tied=tied, dtype=DTYPE)


def sharded(tied: bool) -> Any:
    model = plain(tied)
    shard_model(model, precision="fp32", device_type="cpu")
    return model


def by_torchtitan(tied: bool) -> Any:
    """Norm and head in a group of their own, which is gathered again in backward."""
    model = plain(tied)
    for layer in model.model.layers:
        fully_shard(layer)
    if not tied:
        fully_shard([model.model.norm, model.lm_head])
    return fully_shard(model)


def adapted(tied: bool) -> Any:
    """Adapters on the head, too."""
    model = oracle.tiny_model(tied=False)
    torch.manual_seed(5)
    settings = LoRAConfig(rank=4, target_modules=("lm_head", "q_proj"))
    LoRA().prepare(model, Config(lora=settings))
    return model


def of_adapters(tied: bool) -> LWO:
    model = adapted(tied).to(DTYPE)
    shard_model(model, precision="fp32", device_type="cpu")
    return lwo_dist.attach(model, CONFIG, LoRA())


def of_engine(stage: int, method: Any, make: Callable[[bool], nn.Module]) -> Any:
    def attached(tied: bool) -> LWO:
        settings = zero.settings(stage, accumulation=2, gradient_clipping=0.5)
        engine = make_engine(make(tied), CONFIG, settings, method)
        return lwo_dist.attach(engine, CONFIG, method)

    return attached


def attached(make: Callable[[bool], nn.Module]) -> Callable[[bool], LWO]:
    return lambda tied: lwo_dist.attach(make(tied), CONFIG)


def cases(deepspeed: bool) -> dict[str, Callable[[bool], LWO]]:
    if not deepspeed:
        return {
            "replicate": attached(plain),
            "fsdp": attached(sharded),
            "torchtitan": attached(by_torchtitan),
            "adapters": of_adapters,
        }
    from lwo_dist.registry import METHODS

    found = {
        f"zero {stage}": of_engine(
            stage, METHODS.get("lwo"), lambda tied: oracle.tiny_model(tied=tied)
        )
        for stage in (1, 2, 3)
    }
    return found | {"adapters, zero 3": of_engine(3, LoRA(), adapted)}


whole_loss, whole_batch = oracle.loss_sum, oracle.global_batch


def chunked_loss(model: nn.Module, tokens: Tensor, labels: Tensor) -> Tensor:
    following = pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)
    return summed_loss(model, {"input_ids": tokens}, following, chunk_size=3)


def uneven_batch(step: int) -> tuple[Tensor, Tensor]:
    """Rank 0 of two has no label in every third step."""
    tokens, labels = whole_batch(step)
    if step % 3 == 0:
        labels[:4] = IGNORED_LABEL
    return tokens, labels


def both_ways(deepspeed: bool, tied: bool) -> dict[str, tuple[float, list[Any], list[Any]]]:
    """Case -> how far apart the weights are, and the collectives of a step with each loss."""
    results = {}
    for case, attach in cases(deepspeed).items():
        weights, calls = [], []
        for loss_of in (whole_loss, chunked_loss):
            with (
                patch.object(oracle, "loss_sum", loss_of),
                patch.object(oracle, "global_batch", uneven_batch),
            ):
                lwo = attach(tied)
                losses, found = train(lwo, RECIPE.steps)
                weights.append(found | {"loss": torch.tensor(losses)})
                with CountCollectives() as counted:
                    train_step(lwo, RECIPE.steps)
                calls.append(counted.calls)
                lwo.detach()
        expected, found = weights
        apart = max(float((found[name] - expected[name]).abs().max()) for name in expected)
        results[case] = (apart, *calls)
    return results


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("deepspeed", [False, True])
def test_every_strategy_trains_as_with_whole_logits(deepspeed: bool, tied: bool) -> None:
    if deepspeed and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed")
    bound = 1e-5 if deepspeed else 1e-10
    for results in run_ranks(both_ways, 2, deepspeed, tied, timeout=300, deepspeed=deepspeed):
        for case, (apart, whole, chunked) in results.items():
            assert apart < bound, f"{case}: {apart}"
            assert whole == chunked, case
            assert whole or "replicate" in case
