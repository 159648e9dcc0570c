"""The batch of a step: the same for everyone, whoever computes it, and nothing lost or counted
twice.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lwo_dist.config.batch import check_world_sizes, micro_batch_size
from lwo_dist.config.reading import load_config
from lwo_dist.data import batches
from lwo_dist.data.batches import (
    GlobalBatch,
    global_batch,
    global_batch_indices,
    steps_of_epochs,
)
from lwo_dist.errors import UserError
from tests.prepared import PAD, prepared


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 2**40))
def test_epochs_follow_each_other_and_drop_nothing(
    num_examples: int, batch_size: int, seed: int
) -> None:
    steps = 3 * num_examples // batch_size + 2
    stream = np.concatenate(
        [global_batch_indices(num_examples, batch_size, seed, step) for step in range(steps)]
    )
    assert len(stream) == steps * batch_size
    for start in range(0, len(stream) - num_examples + 1, num_examples):
        assert sorted(stream[start : start + num_examples]) == list(range(num_examples))
    again = global_batch_indices(
        num_examples, batch_size, seed, steps - 1
    )  # out of order, by itself
    assert again.tolist() == stream[-batch_size:].tolist()


def test_epochs_and_seeds_differ() -> None:
    orders = [
        global_batch_indices(50, 50, seed, epoch).tolist() for seed in (0, 1) for epoch in (0, 1, 2)
    ]
    assert len({tuple(order) for order in orders}) == 6


def test_the_order_is_the_one_of_ever() -> None:
    # A resumed run relies on it: a new numpy, or a change here, must not move it.
    assert global_batch_indices(10, 4, seed=7, step=0).tolist() == [9, 7, 0, 5]
    assert global_batch_indices(10, 4, seed=7, step=2).tolist() == [1, 6, 3, 1]


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(2, 30), min_size=1, max_size=20),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)),
    seed=st.integers(0, 9),
    step=st.integers(0, 30),
)
def test_the_ranks_parts_make_up_the_global_batch(
    lengths: list[int], shape: tuple[int, int, int], seed: int, step: int
) -> None:
    data = prepared(lengths)
    world_size, accumulation, size = shape
    batch_size = world_size * accumulation * size
    expected = global_batch_indices(len(lengths), batch_size, seed, step).tolist()

    def batch_of(world_size: int, rank: int) -> GlobalBatch:
        return global_batch(
            data,
            seed=seed,
            step=step,
            global_batch_size=batch_size,
            world_size=world_size,
            rank=rank,
            accumulation=accumulation,
        )

    # One process takes each micro-batch whole; the ranks' rows of it, in rank order, must be the
    # same rows.
    whole = batch_of(1, 0)
    parts = [batch_of(world_size, rank) for rank in range(world_size)]
    assert len(whole.micro_batches) == accumulation
    for m, micro_batch in enumerate(whole.micro_batches):
        for name in ("input_ids", "attention_mask", "labels"):
            rows = [part.micro_batches[m][name] for part in parts]
            assert torch.equal(micro_batch[name], torch.cat(rows))
            assert rows[0].shape[0] == size
    first_tokens = torch.cat([batch["input_ids"][:, 0] for batch in whole.micro_batches])
    assert [int(token) // 1000 - 1 for token in first_tokens] == expected
    labels = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in whole.micro_batches)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in whole.micro_batches)
    for part in parts:
        assert part.indices.tolist() == expected
        assert part.label_tokens == labels
        assert part.tokens == tokens


@pytest.mark.parametrize(
    ("epochs", "examples", "batch_size", "steps"),
    [(1, 32, 8, 4), (1, 33, 8, 5), (2.5, 32, 8, 10), (0.1, 30, 1, 3), (0.001, 10, 8, 1)],
)
def test_steps_of_epochs(epochs: float, examples: int, batch_size: int, steps: int) -> None:
    assert steps_of_epochs(epochs, examples, batch_size) == steps


def test_in_the_steps_of_an_epoch_every_example_is_drawn() -> None:
    steps = steps_of_epochs(1, 33, 8)
    drawn = [global_batch_indices(33, 8, 0, step) for step in range(steps)]
    assert {int(i) for indices in drawn for i in indices} == set(range(33))
    assert len({int(i) for indices in drawn[:-1] for i in indices}) == 32


def test_the_indices_of_a_step_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counted(*args: Any) -> Any:
        calls.append(1)
        return global_batch_indices(*args)

    monkeypatch.setattr(batches, "global_batch_indices", counted)
    global_batch(
        prepared([3, 4]), seed=0, step=0, global_batch_size=4, world_size=2, rank=1, accumulation=2
    )
    assert len(calls) == 1


def test_what_is_in_a_row() -> None:
    (batch,) = global_batch(
        prepared([7, 11]), seed=0, step=0, global_batch_size=2, world_size=1, rank=0, accumulation=1
    ).micro_batches
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    row = int(batch["input_ids"][1, 0] == 1000)
    assert batch["input_ids"][row].tolist() == [*range(1000, 1007)] + [PAD] * 9
    assert batch["labels"][row].tolist() == [-100] * 2 + [*range(1002, 1007)] + [-100] * 9
    assert batch["attention_mask"][row].tolist() == [1] * 7 + [0] * 9
    assert batch["labels"][1 - row, :4].tolist() == [-100] * 3 + [2003]


@pytest.mark.parametrize(
    ("longest", "sequence_length", "width"), [(9, 30, 16), (16, 30, 16), (25, 30, 30), (30, 30, 30)]
)
def test_rows_are_padded_within_the_sequence_length(
    longest: int, sequence_length: int, width: int
) -> None:
    data = prepared([longest, 3], sequence_length)
    for rank in (0, 1):
        (batch,) = global_batch(
            data, seed=0, step=0, global_batch_size=2, world_size=2, rank=rank, accumulation=1
        ).micro_batches
        assert batch["input_ids"].shape == (1, width)


def test_a_batch_that_cannot_be_divided() -> None:
    assert micro_batch_size(24, 3, 2) == 4
    with pytest.raises(
        UserError,
        match=r"global_batch_size = 16 must be divisible by 6 = 3 workers x 2 .* example 18",
    ):
        micro_batch_size(16, 3, 2)
    with pytest.raises(UserError):
        global_batch(
            prepared([3]), seed=0, step=0, global_batch_size=3, world_size=2, rank=0, accumulation=1
        )


def test_the_global_batch_divides_at_every_number_of_workers_that_can_come() -> None:
    def check(workers: str, batch: int, accumulation: int = 1) -> None:
        settings = [f"cluster.num_workers={workers}", f"train.global_batch_size={batch}"]
        check_world_sizes(
            load_config(None, [*settings, f"lwo.gradient_accumulation_steps={accumulation}"])
        )

    check("[1,4]", 12)
    check("[1,2]", 4, accumulation=2)
    with pytest.raises(UserError) as error:
        check("[2,5]", 8)
    assert (
        str(error.value)
        == "cluster.num_workers = [2, 5]: train.global_batch_size = 8 cannot be divided evenly"
        " among 3 or 5 workers (with lwo.gradient_accumulation_steps = 1); set it to a multiple"
        " of 60, or other numbers of workers"
    )
    with pytest.raises(UserError, match="among 2 workers .* a multiple of 4"):
        check("[1,2]", 2, accumulation=2)
    with pytest.raises(UserError, match="must be divisible by 3"):
        check("3", 8)
