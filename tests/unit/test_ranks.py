"""The tests' own tool: it must not turn a failure into a pass, a hang into a wait, or leave
processes behind.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from tests.ranks import RanksError, run_ranks


def _sum_of_ranks(offset: int) -> tuple[int, str, torch.Tensor]:
    value = torch.tensor([dist.get_rank() + offset])
    dist.all_reduce(value)
    return dist.get_world_size(), os.environ["LWO_TEST_WORD"], value


def _one_rank_raises() -> None:
    if dist.get_rank() == 1:
        raise KeyError("the cause")
    dist.barrier()


def _one_rank_hangs() -> None:
    if dist.get_rank() == 0:
        time.sleep(600)


def _one_rank_dies() -> None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def _has_deepspeed() -> bool:
    return "deepspeed" in sys.modules


def _environment() -> dict[str, str]:
    return dict(os.environ)


def _children() -> set[int]:
    return {p.pid for p in multiprocessing.active_children() if p.pid is not None}


def test_values_come_back_in_rank_order(monkeypatch: pytest.MonkeyPatch) -> None:
    for word in ("first", "second"):
        monkeypatch.setenv("LWO_TEST_WORD", word)
        values = run_ranks(_sum_of_ranks, 2, 10)
        assert [(n, w, int(t)) for n, w, t in values] == [(2, word, 21)] * 2


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (_one_rank_raises, "rank 1:(.|\n)*KeyError: 'the cause'"),
        (_one_rank_dies, "rank 1 died with exit code -9"),
    ],
)
def test_a_failed_rank_is_named(fn: Callable[[], None], message: str) -> None:
    with pytest.raises(RanksError, match=message):
        run_ranks(fn, 2)
    assert not _children()


def test_a_hang_is_cut_and_shown() -> None:
    with pytest.raises(RanksError, match=r"still ran after 3 s(.|\n)*_one_rank_hangs"):
        run_ranks(_one_rank_hangs, 2, timeout=3)
    assert not _children()


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
def test_deepspeed_is_there_for_those_who_ask_for_it_and_for_no_others() -> None:
    assert run_ranks(_has_deepspeed, 1, deepspeed=True) == [True]
    assert run_ranks(_has_deepspeed, 1) == [False]


@pytest.mark.parametrize("deepspeed", [False, True])
def test_a_rank_has_the_caller_s_environment_and_nothing_of_its_server_s(
    deepspeed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if deepspeed and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed")
    monkeypatch.setenv("PYTHONPATH", "/of/the/caller")
    monkeypatch.delenv("PYTORCH_NVML_BASED_CUDA_CHECK", raising=False)
    [environment] = run_ranks(_environment, 1, deepspeed=deepspeed)
    of_a_rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    assert environment == {**os.environ, **of_a_rank}
