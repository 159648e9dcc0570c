"""Workers of one machine share its cores."""

from __future__ import annotations

import pytest
import torch

from lwo_dist.cluster.ray_train import _threads_of_each, _worker_environment


@pytest.mark.parametrize(("cores", "workers", "each"), [(8, 1, 8), (8, 3, 2), (2, 4, 1)])
def test_workers_have_the_threads_of_torch_together(
    monkeypatch: pytest.MonkeyPatch, cores: int, workers: int, each: int
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
    assert _threads_of_each(workers) == each


@pytest.mark.parametrize(
    ("own", "given", "threads", "expected"),
    [
        (None, {}, 4, "4"),
        (None, {}, None, None),  # Ray's own choice: as many as the worker asks for CPUs
        ("3", {}, 4, "3"),
        ("3", {}, None, "3"),
        ("3", {"OMP_NUM_THREADS": "2"}, 4, "2"),
    ],
)
def test_who_chooses_the_threads_of_a_worker(
    monkeypatch: pytest.MonkeyPatch,
    own: str | None,
    given: dict[str, str],
    threads: int | None,
    expected: str | None,
) -> None:
    for name in ("OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    if own is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", own)
    found = _worker_environment(given, threads)
    assert found.get("OMP_NUM_THREADS") == expected
    assert ("GLOO_SOCKET_IFNAME" in found) == (threads is not None)
