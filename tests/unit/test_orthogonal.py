"""`lwo_dist.orthogonal`: what it computes, in how many kernels, operations and bytes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lwo_dist.orthogonal import (
    ITERATIONS,
    bytes_at_once,
    orthogonalise,
    orthogonalise_bytes,
    orthogonalise_flops,
    update_without_state,
)
from lwo_dist.plan.live import LiveBytes

DTYPE = torch.float64


def choose(monkeypatch: pytest.MonkeyPatch, bf16: bool) -> None:
    """On any CPU."""
    monkeypatch.setattr("lwo_dist.orthogonal._multiplies_bf16", lambda device_type: bf16)


class CountKernels(TorchDispatchMode):
    """By name; a view is none."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.kernels[func._schema.name.split("::")[1]] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("shape", [(6, 6), (5, 20), (20, 5), (3, 4, 12)])
def test_singular_values_come_near_one(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(shape, dtype=DTYPE)
    u, s, v = torch.linalg.svd(matrices, full_matrices=False)
    s = s / s.norm(dim=-1, keepdim=True)
    s[..., -1] = 0.0409
    matrices = u @ torch.diag_embed(s) @ v
    left, values, right = torch.linalg.svd(orthogonalise(1e-200 * matrices), full_matrices=False)
    assert values.min() > 0.713
    assert values.max() < 1.287
    assert orthogonalise(matrices).is_contiguous()
    # The directions are those of the gradient.
    torch.testing.assert_close(left @ right, u @ v)
    assert not orthogonalise(torch.zeros(shape)).any()
    assert orthogonalise(torch.full(shape, 1e-30)).isfinite().all()


def test_a_matrix_of_rank_one_does_not_grow_in_bf16() -> None:
    """Its only singular value is 1, where the first polynomial is steep."""
    torch.manual_seed(0)
    for _ in range(50):
        matrix = torch.randn(30, 1) @ torch.randn(1, 20)
        assert torch.linalg.svdvals(orthogonalise(matrix.bfloat16()).float()).max() < 1.29
    single = torch.zeros(30, 20)
    single[3, 4] = 1.7
    assert orthogonalise(single.bfloat16()).max() < 1.29


def test_where_bf16_is_faster_float32_is_computed_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(3, 20, 50)
    choose(monkeypatch, bf16=False)
    exact = orthogonalise(matrices)
    torch.testing.assert_close(exact, orthogonalise(matrices.double()).float())
    choose(monkeypatch, bf16=True)
    found = orthogonalise(matrices)
    assert found.dtype == torch.float32
    assert torch.equal(found, found.bfloat16().float())
    assert 1e-4 < (found - exact).norm() / exact.norm() < 2e-2


def test_many_matrices_take_as_many_kernels_as_one() -> None:
    def kernels(number: int) -> Counter[str]:
        weights = [torch.randn(6, 4) for _ in range(number)]
        with CountKernels() as counter:
            update_without_state(weights, weights, 1e-3, 0.1, torch.zeros(()))
        return counter.kernels

    one = kernels(1)
    assert kernels(50) == one
    assert (
        one["bmm"] == ITERATIONS and one["baddbmm"] == 2 * ITERATIONS and one["_foreach_add_"] == 2
    )


def test_more_than_fit_at_once_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = [torch.randn(6, 4, dtype=DTYPE) for _ in range(7)]

    def updated() -> list[Tensor]:
        weights = [torch.ones_like(gradient) for gradient in gradients]
        update_without_state(weights, gradients, 1e-3, 0.1, torch.zeros(()))
        return weights

    together = updated()
    for at_once in (1, 3 * 24):
        monkeypatch.setattr("lwo_dist.orthogonal._AT_ONCE", at_once)
        for now, then in zip(updated(), together, strict=True):
            torch.testing.assert_close(now, then, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(4, 16, 2048), (4, 96, 96), (60, 40), (2, 3, 90, 30)])
def test_it_needs_the_memory_that_the_plan_says(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(monkeypatch, bf16=False)
    with LiveBytes() as live:
        stack = torch.randn(shape)
        live.peak = live.now
        orthogonalise(stack)
        assert live.now < 1.1 * stack.nbytes
        assert 0.95 < live.peak / orthogonalise_bytes(shape) < 1.05


@pytest.mark.parametrize("at_once", [2**24, 3 * 96 * 96])
def test_so_does_an_update_in_several_rounds(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lwo_dist.orthogonal._AT_ONCE", at_once)
    choose(monkeypatch, bf16=False)
    with LiveBytes() as live:
        weights = [torch.randn(96, 96) for _ in range(9)]
        before = live.peak = live.now
        update_without_state(weights, weights, 1e-3, 0.1, torch.zeros(()))
        needed = bytes_at_once([weight.shape for weight in weights])
        assert 0.95 < (live.peak - before) / needed < 1.05


def test_operations_are_those_that_torch_counts() -> None:
    shapes = [(24, 24), (12, 24), (50, 24), (24,), (3, 8, 6)]
    gradients = [torch.randn(shape) for shape in shapes]
    weights = [torch.randn(shape) for shape in shapes]
    vector = weights[3].clone()
    with FlopCounterMode(display=False) as counter:
        update_without_state(weights, gradients, 1e-3, 0.0, torch.zeros(()))
    assert counter.get_total_flops() == orthogonalise_flops(shapes)
    assert torch.equal(weights[3], vector)
