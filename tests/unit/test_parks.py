"""A bf16 weight and what is parked of its master give the master back, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from lwo_dist.config import LWOConfig
from lwo_dist.errors import UserError
from lwo_dist.hook import attach
from lwo_dist.strategies.parks import HostParks, join, split
from tests import oracle


def bits(*patterns: int) -> torch.Tensor:
    """fp32 numbers of these 32-bit patterns."""
    signed = [pattern - 2**32 if pattern >= 2**31 else pattern for pattern in patterns]
    return torch.tensor(signed, dtype=torch.int32).view(torch.float32)


def back(master: torch.Tensor) -> torch.Tensor:
    return join(master.to(torch.bfloat16), *split(master))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


SPECIAL = {
    "zeros": bits(0x00000000, 0x80000000),
    "denormals": bits(
        0x00000001,
        0x80000001,
        0x00007FFF,
        0x00008000,
        0x00008001,
        0x007FFFFF,
        0x807FFFFF,
        0x00018000,
    ),
    "infinities": bits(0x7F800000, 0xFF800000),
    "rounded up to infinity": bits(0x7F7FFFFF, 0xFF7FFFFF, 0x7F7F8000),
    "half-way above an even weight, rounded down": bits(
        0x3F808000, 0xBF808000, 0x00008000, 0x41248000
    ),
    "half-way below an even weight, rounded up": bits(
        0x3F818000, 0xBF818000, 0x00018000, 0x41258000
    ),
    "beside half-way": bits(0x3F807FFF, 0x3F808001, 0x3F817FFF, 0x3F818001),
    "carry into the exponent": bits(0x3FFFFFFF, 0x3FFF8000, 0xBFFFFFFF),
}


@pytest.mark.parametrize("master", SPECIAL.values(), ids=SPECIAL.keys())
def test_the_hard_masters_come_back(master: torch.Tensor) -> None:
    assert same_bits(back(master), master)


def test_every_low_half_comes_back_over_even_and_odd_weights() -> None:
    low = torch.arange(2**16, dtype=torch.int32)
    for high in (
        0x0000,
        0x0001,
        0x3F80,
        0x3F81,
        0x7F7F,
        -0x4080,
        -0x407F,
        -0x8000,
    ):  # signed upper halves
        master = (low + high * 2**16).view(torch.float32)
        assert same_bits(back(master), master), hex(high)


def test_random_bit_patterns_come_back() -> None:
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(-(2**31), 2**31, (2**21,), generator=generator, dtype=torch.int64).to(
        torch.int32
    )
    master = patterns.view(torch.float32).view(2**10, 2**11)
    number = ~master.isnan()
    found = back(master)
    assert found.shape == master.shape and same_bits(found[number], master[number])
    assert found[~number].isnan().all() and (~number).any()


@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 7), (3, 5)])
def test_any_shape_comes_back_and_takes_two_bytes_an_element(shape: tuple[int, ...]) -> None:
    master = torch.rand(shape)
    low, halfway = split(master)
    assert same_bits(back(master), master) and back(master).shape == shape
    assert low.nbytes == 2 * master.numel() and halfway.numel() == 0


def test_a_part_of_a_larger_tensor_comes_back() -> None:
    whole = torch.rand(6, 8)
    for part in (whole[1:4], whole[:, 2:5], whole.t(), whole.view(-1)[3:40]):
        assert same_bits(back(part), part.contiguous())


def test_parks_are_copies_that_are_given_back_once() -> None:
    parks, tensor = HostParks(), torch.rand(10)
    before = tensor.clone()
    parks.put("embed", {"a": tensor, "step": torch.tensor(3.0)})
    parks.put("embed", {"b": tensor[:2]})
    parks.put("head", {})
    tensor.zero_()
    assert torch.equal(parks.get("embed")["a"], before) and parks.get("head") == {}
    assert parks.nbytes == 4 * 12  # not the step
    parks.prefetch("embed", torch.device("cpu"))
    taken = parks.take("embed", torch.device("cpu"))
    assert (
        torch.equal(taken["a"], before)
        and torch.equal(taken["b"], before[:2])
        and taken["step"] == 3
    )
    assert parks.take("embed", torch.device("cpu")) == {} and parks.nbytes == 0
    parks.put("embed", {"a": before})
    parks.drop("embed")
    assert parks.get("embed") == {}


def test_discard_is_refused_where_nothing_is_rounded() -> None:
    with pytest.raises(
        UserError, match="discard has no effect where weights are stored in fp32; drop it"
    ):
        attach(oracle.tiny_model(tied=True), LWOConfig(inactive_master="discard"))


def test_moments_of_a_layer_that_is_not_active_are_kept_only_if_asked_for() -> None:
    for state, kept in (("reset", False), ("keep", True)):
        lwo = attach(oracle.tiny_model(tied=True), LWOConfig(state=state, steps_per_layer=1))  # type: ignore[arg-type]
        tokens, labels = oracle.global_batch(0)
        first, second = lwo.layers[:2]
        lwo.backward(oracle.loss_sum(lwo.model, tokens, labels))
        assert lwo.step().switched and lwo.active_layer == second
        assert bool(lwo.read_moments(first)) == kept and lwo.read_moments(second) == {}
        moments = {
            name: {
                "exp_avg": torch.rand(p.shape),
                "exp_avg_sq": torch.rand(p.shape),
                "step": torch.tensor(7.0),
            }
            for layer in (first, second)
            for name, p in lwo.read_layer(layer).items()
        }
        for layer, has in ((first, kept), (second, True)):
            mine = {name: moments[name] for name in layer.parameter_names}
            lwo.write_moments(layer, mine)
            found = lwo.read_moments(layer)
            assert bool(found) == has
            assert all(torch.equal(found[n][k], mine[n][k]) for n in found for k in mine[n])
            lwo.write_moments(layer, {})
            assert lwo.read_moments(layer) == {}


@pytest.mark.parametrize("order", ["ascending", "random"])
def test_moments_that_the_next_visit_needs_are_not_parked(order: str) -> None:
    settings = LWOConfig(state="keep", steps_per_layer=1, embeddings="always", order=order)  # type: ignore[arg-type]
    lwo = attach(oracle.tiny_model(tied=True), settings)
    parked: list[str] = []
    put = lwo.strategy._parked_moments.put

    def watched(layer: str, tensors: Mapping[str, torch.Tensor]) -> None:
        parked.append(layer)
        put(layer, tensors)

    lwo.strategy._parked_moments.put = watched  # type: ignore[method-assign]
    (embedding,) = lwo.visit.also
    places = set()
    trained: list[str] = []
    for step in range(2 * len(lwo.visits) + 1):
        trained.append(lwo.active_layer.name)
        tokens, labels = oracle.global_batch(step)
        lwo.backward(oracle.loss_sum(lwo.model, tokens, labels))
        lwo.step()
        places.add(lwo.strategy._shards_of_optimizer(embedding)["exp_avg"].data_ptr())
        assert {float(m["step"]) for m in lwo.read_moments(embedding).values()} == {step + 1.0}
    following = [*trained[1:], lwo.active_layer.name]
    # A layer that comes twice in a row stays, too.
    assert parked == [a for a, b in zip(trained, following, strict=True) if a != b]
    assert len(places) == 1
    lwo.strategy.deactivate()
    assert embedding.name in parked


@pytest.mark.parametrize("steps_per_layer", [1, 3])
def test_the_coming_layer_is_brought_ahead_before_the_last_step_of_a_visit(
    steps_per_layer: int,
) -> None:
    settings = LWOConfig(state="keep", steps_per_layer=steps_per_layer, order="descending")
    lwo = attach(oracle.tiny_model(tied=True), settings)
    asked: list[tuple[int, str]] = []
    lwo.strategy.prefetch = lambda visit: asked.append((lwo.step_count, visit.active.name))  # type: ignore[method-assign]
    entered = {}
    for step in range(2 * len(lwo.layers) * steps_per_layer):
        tokens, labels = oracle.global_batch(step)
        lwo.backward(oracle.loss_sum(lwo.model, tokens, labels))
        lwo.step()
        if lwo.step_count % steps_per_layer == 0:
            entered[lwo.step_count] = lwo.active_layer.name
    first = 1 if steps_per_layer == 1 else steps_per_layer - 1
    assert [step for step, _ in asked] == list(range(first, lwo.step_count + 1, steps_per_layer))
    assert all(entered.get(step + 1, name) == name for step, name in asked)
