"""`lwo.stateless` under fsdp: which rank orthogonalises what, what is sent, meshes and experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import lwo_dist
from lwo_dist import distributed, orthogonal
from lwo_dist.driver import prepare
from lwo_dist.errors import UserError
from lwo_dist.orthogonal import orthogonalise
from lwo_dist.strategies.fsdp import matrices
from lwo_dist.strategies.fsdp.builder import shard_model
from tests import families, oracle
from tests.distributed import test_run, training
from tests.distributed.collectives import CountCollectives
from tests.distributed.test_run import make_config
from tests.distributed.test_stateless import RECIPE, attached, make_model, plain_loop
from tests.ranks import run_ranks

inputs = test_run.inputs
SHAPES = [(7, 5), (2, 6), (12, 3), (3, 4, 6)]
"""Of rows that no number of ranks divides, of fewer rows than ranks, and of experts."""
NUMBER = 5
"""Matrices of each shape."""


def whole_matrices(shape: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(shape) + shape[0])
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(NUMBER)]


def rows_of(whole: Tensor) -> Tensor:
    """This rank's, as FSDP2 splits them."""
    chunks = whole.chunk(dist.get_world_size())
    return chunks[dist.get_rank()] if dist.get_rank() < len(chunks) else whole[:0]


def exchanged(counter: CountCollectives) -> int:
    """Bytes that this rank has sent and received: each all-to-all counts one of them."""
    return sum(size for kind, size in counter.calls if kind == "all_to_all")


def orthogonalised_shards(at_once: int) -> list[tuple[bool, int, int]]:
    """For each shape: whether the shards are right, the bytes sent and the bytes counted."""
    orthogonal._AT_ONCE = at_once
    rows = []
    for shape in SHAPES:
        whole = whole_matrices(shape)
        with CountCollectives() as counter:
            found = matrices.orthogonalise_shards(
                [rows_of(matrix) for matrix in whole], shape, dist.group.WORLD
            )
            stacked = [rows for stack in found for rows in stack]
        wanted = [rows_of(orthogonalise(matrix)) for matrix in whole]
        right = [
            torch.allclose(rows[: len(want)], want, rtol=0, atol=1e-12)
            for rows, want in zip(stacked, wanted, strict=True)
        ]
        counted = 8 * matrices.exchanged_numel([shape] * NUMBER, dist.get_world_size())
        rows.append((all(right), exchanged(counter), counted))
    return rows


@pytest.mark.parametrize(("world_size", "at_once"), [(1, 10), (2, 10**6), (2, 80), (3, 1)])
def test_ranks_share_the_matrices_and_send_each_row_twice(world_size: int, at_once: int) -> None:
    ranks = run_ranks(orthogonalised_shards, world_size, at_once)
    for number, shape in enumerate(SHAPES):
        of_ranks = [rows[number] for rows in ranks]
        assert all(right for right, _, _ in of_ranks)
        # A rank that orthogonalises more matrices than another receives more.
        assert sum(sent for _, sent, _ in of_ranks) == sum(counted for _, _, counted in of_ranks)
        # Whole experts are where they are needed.
        assert (of_ranks[0][2] > 0) == (world_size > 1 and len(shape) == 2)


def train_hybrid() -> tuple[list[float], dict[str, Tensor], int]:
    """Two replicas of two shards; how much more bytes were sent than reported."""
    model: Any = make_model(False)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    lwo = attached(False, "all", "visit", model=model)
    losses, more = [], 0
    for step in range(RECIPE.steps):
        with CountCollectives() as counter:
            loss, report = training.train_step(lwo, step)
        scalars = [size for kind, size in counter.calls if kind == "all_reduce" and size == 8]
        kinds = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all")
        more += counter.bytes(*kinds) - sum(scalars) - report.bytes_sent
        losses.append(loss)
    return losses, training.weights(lwo), more


def test_hybrid_sharding_equals_a_plain_loop() -> None:
    expected, expected_weights = plain_loop(tied=False, stateless="all", embeddings="visit")
    ranks = run_ranks(train_hybrid, 4)
    assert sum(more for _, _, more in ranks) == 0
    for losses, found, _ in ranks:
        assert losses == pytest.approx(expected, abs=1e-10)
        for name, tensor in expected_weights.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-9)
            assert torch.equal(found[name], ranks[0][1][name]), name


def train_experts(strategy: str) -> dict[str, Tensor]:
    model = families.make("qwen3_moe", torch.float64)
    if strategy == "fsdp":
        shard_model(model, precision="fp32", device_type="cpu")
    config = lwo_dist.LWOConfig(lr=1e-3, eps=1e-5, stateless="all", steps_per_layer=1)
    lwo = lwo_dist.attach(model, config)
    size = distributed.world_size()
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(3, families.VOCABULARY, (6, 12), generator=generator)
        loss = families.loss_sum(lwo.model, tokens.chunk(size)[distributed.rank()])
        lwo.backward(loss * size / tokens[:, 1:].numel())
        lwo.step()
    return training.weights(lwo)


@pytest.mark.parametrize("world_size", [2, 3])
def test_experts_are_trained_as_with_whole_weights(world_size: int) -> None:
    """Of 4 experts, 3 ranks have 2, 2 and none."""
    [expected] = run_ranks(train_experts, 1, "replicate")
    start = dict(families.make("qwen3_moe", torch.float64).named_parameters())
    for found in run_ranks(train_experts, world_size, "fsdp"):
        for name, tensor in expected.items():
            if name in start:
                moved = (tensor - start[name].detach()).norm()
                # Parts of a gradient that are rounding errors of float32 grow by the iteration.
                assert (found[name] - tensor).norm() <= 1e-3 * moved, name


def refused_in_16_bits() -> str:
    model: Any = oracle.tiny_model(tied=False, dtype=torch.bfloat16)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    with pytest.raises(UserError) as raised:
        lwo_dist.attach(model, lwo_dist.LWOConfig(stateless="all"))
    lwo_dist.attach(model, lwo_dist.LWOConfig())  # nothing was changed
    return str(raised.value)


def test_weights_in_16_bits_are_refused() -> None:
    assert "stored in 16 bits; load the model" in run_ranks(refused_in_16_bits, 1)[0]


def test_a_run_with_weights_in_16_bits_is_refused(inputs: Any, tmp_path: Any) -> None:
    overrides = ["fsdp.storage=bf16", "train.precision=bf16", "lwo.stateless=suffix"]
    with pytest.raises(UserError, match=r"cannot be used with fsdp\.storage: bf16"):
        prepare(make_config(inputs, tmp_path, "strategy=fsdp", *overrides))
    assert not (tmp_path / "r").exists()
