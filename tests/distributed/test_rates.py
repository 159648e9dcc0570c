"""An unset learning rate is the same under every strategy."""

from __future__ import annotations

import warnings

import pytest

import lwo_dist
from lwo_dist import LWOConfig
from lwo_dist.registry import METHODS
from lwo_dist.strategies.deepspeed.builder import make_engine
from lwo_dist.strategies.fsdp.builder import shard_model
from tests import oracle
from tests.distributed import zero
from tests.distributed.training import train_step
from tests.ranks import run_ranks

RECIPE = oracle.Recipe()


def rates(strategy: str) -> tuple[float | None, float]:
    """Of the config and of a step."""
    if strategy.startswith("zero"):
        stage = int(strategy[-1])
        model = zero.make_engine(stage, RECIPE, tied=False, from_start=stage == 3)
    else:
        model = oracle.tiny_model(tied=False)
    if strategy == "fsdp":
        shard_model(model, precision="fp32", device_type="cpu")
    lwo = lwo_dist.attach(model, LWOConfig(gradient_accumulation_steps=RECIPE.accumulation))
    _, report = train_step(lwo, 0)
    return lwo.config.lr, report.lr


@pytest.mark.parametrize("strategy", ["replicate", "fsdp", "zero1", "zero3"])
def test_an_unset_rate_is_that_of_the_whole_model(strategy: str) -> None:
    assert run_ranks(rates, 2, strategy) == [(0.025, 0.025)] * 2


def warnings_of_a_run_s_engine(stage: int) -> tuple[list[str], float | None]:
    model, method = oracle.tiny_model(tied=False), METHODS.get("lwo")
    settings = zero.settings(stage, zero_force_ds_cpu_optimizer=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine = make_engine(model, LWOConfig(), settings, method)
        lwo = lwo_dist.attach(engine, LWOConfig(), method)
    return [str(each.message) for each in caught], lwo.config.lr


def test_an_engine_is_made_with_the_rate_that_it_gets() -> None:
    for said, rate in run_ranks(warnings_of_a_run_s_engine, 2, 1):
        assert rate == 0.025
        assert not [line for line in said if "LWOConfig wins" in line]
