"""A checkpoint is the same for all: every strategy goes on from every other one's, on other numbers
of ranks.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

import lwo_dist
from lwo_dist.checkpoint.format import newest_checkpoint
from lwo_dist.checkpoint.resume import restore
from lwo_dist.checkpoint.store import LayerStore
from lwo_dist.hook import LWO
from lwo_dist.storage import RunFolder
from tests import oracle, stores
from tests.distributed import training, zero
from tests.ranks import run_ranks

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed"
)

STRATEGIES = ("replicate", "fsdp", "zero_1", "zero_2", "zero_3")
WORLDS = (1, 2, 4)
# 6 layers, 12 steps a cycle: at step 9 four layers wait with their moments, and the fifth is in
# mid-visit.
RECIPE = oracle.Recipe(steps_per_layer=2, max_grad_norm=0.5)
SAVED_AT, STEPS = 9, 18

# (strategy, ranks) -> (strategy, ranks): each strategy and each world size on both sides.
SOME_PAIRS = [
    (("replicate", 2), ("zero_3", 4)),
    (("fsdp", 4), ("zero_1", 2)),
    (("zero_1", 1), ("fsdp", 4)),
    (("zero_2", 2), ("zero_2", 2)),
    (("zero_3", 4), ("replicate", 1)),
]
# All 25 pairs of strategies, and all 9 of world sizes.
ALL_PAIRS = [
    ((first, WORLDS[(i + j) % 3]), (then, WORLDS[(i + 2 * j) % 3]))
    for i, first in enumerate(STRATEGIES)
    for j, then in enumerate(STRATEGIES)
]


def attach(strategy: str) -> LWO:
    if strategy.startswith("zero"):
        engine = zero.make_engine(int(strategy[-1]), RECIPE, tied=False)
        return lwo_dist.attach(engine, zero.lwo_config(RECIPE, state="keep"))
    return training.attach(strategy, RECIPE, tied=False, dtype=torch.float32, state="keep")


def save_and_go_on(
    folder: Path, strategies: list[str]
) -> dict[str, tuple[list[float], dict[str, torch.Tensor]]]:
    results = {}
    for strategy in strategies:
        lwo = attach(strategy)
        for step in range(SAVED_AT):
            training.train_step(lwo, step)
        store = LayerStore(RunFolder(str(folder), strategy), stores.model_files)
        stores.save(store, lwo)
        losses = [training.train_step(lwo, step)[0] for step in range(SAVED_AT, STEPS)]
        results[strategy] = losses, training.weights(lwo)
    return results


def resume(folder: Path, pairs: list[tuple]) -> list[tuple[list[float], dict[str, torch.Tensor]]]:
    results = []
    for (first, first_ranks), (then, _) in pairs:
        lwo = attach(then)
        training.train_step(lwo, 0)  # so that there is something to overwrite
        checkpoint = newest_checkpoint(RunFolder(str(folder / str(first_ranks)), first))
        assert checkpoint is not None
        restore(lwo, checkpoint, has_weights=False)
        losses = [training.train_step(lwo, step)[0] for step in range(SAVED_AT, STEPS)]
        results.append((losses, training.weights(lwo)))
    return results


@pytest.mark.parametrize(
    "pairs", [SOME_PAIRS, pytest.param(ALL_PAIRS, marks=pytest.mark.long)], ids=["some", "all"]
)
def test_every_strategy_goes_on_from_every_other_one(pairs: list[tuple], tmp_path: Path) -> None:
    """The long form has every pair of strategies."""
    for side in (0, 1):
        assert {pair[side][0] for pair in pairs} == set(STRATEGIES)
        assert {pair[side][1] for pair in pairs} == set(WORLDS)
    unbroken = {}
    for ranks in WORLDS:
        names = sorted({first for (first, first_ranks), _ in pairs if first_ranks == ranks})
        for name, result in run_ranks(
            save_and_go_on, ranks, tmp_path / str(ranks), names, timeout=400, deepspeed=True
        )[0].items():
            unbroken[name, ranks] = result
    for ranks in WORLDS:
        resumed = [pair for pair in pairs if pair[1][1] == ranks]
        for pair, (losses, weights) in zip(
            resumed,
            run_ranks(resume, ranks, tmp_path, resumed, timeout=400, deepspeed=True)[0],
            strict=True,
        ):
            expected, expected_weights = unbroken[pair[0]]
            assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) < 1e-5, pair
            for name, weight in weights.items():
                assert (weight - expected_weights[name]).abs().max() < 1e-5, f"{pair} {name}"
            if pair[0] == pair[1]:
                assert losses == expected and all(
                    torch.equal(weights[n], expected_weights[n]) for n in weights
                ), pair


def test_all_pairs_are_all_pairs() -> None:
    assert len({(first[0], then[0]) for first, then in ALL_PAIRS}) == len(STRATEGIES) ** 2
    assert len({(first[1], then[1]) for first, then in ALL_PAIRS}) == len(WORLDS) ** 2
