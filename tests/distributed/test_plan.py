"""The plan against real steps: exact on what `LWO.memory` counts, within 10 % of the peak."""

from __future__ import annotations

from typing import Any

import pytest

from tests.benchmarks import peaks

_AGAIN = ["train.gradient_checkpointing=true"]


def _check(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        case = (row["model"], row["strategy"], row["method"], row["checkpointing"])
        for visit, measured in row["memory"].items():
            held = {key: row["held"][visit][key] for key in measured}
            # Elements halfway between two bf16 numbers, about one in 65,536, are parked besides.
            halfway = measured["park_bytes"] - held.pop("park_bytes")
            assert 0 <= halfway <= 0.001 * measured.pop("park_bytes"), (case, visit)
            assert held == measured, (case, visit)
        if "zero" not in row["strategy"]:
            assert row["plan_sent"] == pytest.approx(row["sent"], rel=1e-3), case
        assert 0.9 <= row["ratio"] <= 1.1, (case, row["plan"], row["measured"])


@pytest.mark.parametrize("strategy", ["replicate", "fsdp", "zero 2"])
def test_every_method_is_planned_as_it_runs(strategy: str) -> None:
    _check(peaks.compare(strategy, ["llama"]))


def test_gradients_that_are_accumulated_are_planned() -> None:
    _check(peaks.compare("fsdp", ["llama"], accumulation=2))


@pytest.mark.long
@pytest.mark.parametrize("more", [[], _AGAIN], ids=["kept", "again"])
@pytest.mark.parametrize("strategy", peaks.STRATEGY_NAMES)
def test_every_model_is_planned_as_it_runs(strategy: str, more: list[str]) -> None:
    # Left out: T5 under FSDP2, whose recomputed norm met a sharded weight while it was measured.
    names = [name for name in peaks.MODELS if (name, strategy, more[:1]) != ("t5", "fsdp", _AGAIN)]
    _check(peaks.compare(strategy, names, *more))


@pytest.mark.long
@pytest.mark.parametrize("strategy", peaks.STRATEGY_NAMES)
def test_bf16_and_parks_are_planned_as_they_run(strategy: str) -> None:
    _check(peaks.compare(strategy, ["llama", "qwen2"], precision="bf16"))
    _check(peaks.compare(strategy, ["llama"], "lwo.state=keep", methods=["lwo"]))
