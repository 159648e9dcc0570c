"""Models that the caller has sharded: they train as a plain loop does, or are refused by name."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
)

import lwo_dist
from lwo_dist import LWO, LWOConfig, UserError
from lwo_dist.layers import find_layers
from lwo_dist.strategies.fsdp.shards import fsdp_groups
from tests import oracle
from tests.distributed.collectives import CountCollectives
from tests.distributed.raw_loops import (
    RECIPE,
    TOLERANCE,
    assert_equals_plain_loop,
    attach,
    shard,
    tiny_model,
    train_from,
)
from tests.distributed.training import micro_batches, train, train_step, weights
from tests.ranks import run_ranks

# ---- which modules share a group


def by_torchtitan(model: Any) -> None:
    fully_shard(model.model.embed_tokens)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard([model.model.norm, model.lm_head], reshard_after_forward=False)
    fully_shard(model)  # its own group is empty


def by_accelerate(model: Any) -> None:
    for layer in model.model.layers:
        fully_shard(layer)
    tail = [model.model.norm, model.model.embed_tokens, model.lm_head]
    fully_shard(tail, reshard_after_forward=False)
    fully_shard(model)


def with_group(*names: str) -> Callable[[Any], None]:
    def layout(model: Any) -> None:
        fully_shard([model.get_submodule(name) for name in names])
        shard(model)

    return layout


LAYOUTS: dict[str, tuple[bool, Callable[[Any], Any]]] = {
    "torchtitan": (False, by_torchtitan),
    "accelerate, tied": (True, by_accelerate),
    "[embed, head], tied": (True, with_group("model.embed_tokens", "lm_head")),
    "[head, embed], tied": (True, with_group("lm_head", "model.embed_tokens")),
    "[embed, head]": (False, with_group("model.embed_tokens", "lm_head")),
    "the root alone": (True, fully_shard),
    "nothing resharded": (True, lambda model: shard(model, reshard_after_forward=False)),
    "everything resharded": (False, lambda model: shard(model, reshard_after_forward=True)),
    "offload on a CPU": (True, lambda model: shard(model, offload_policy=CPUOffloadPolicy(False))),
}


def counted_step(lwo: LWO, step: int) -> bool:
    """Whether the report's bytes are those that were sent, without the scalar norm."""
    with CountCollectives() as counter:
        tokens, labels = micro_batches(step, 1)[0]
        total = (oracle.global_batch(step)[1][:, 1:] != -100).sum()
        loss = oracle.loss_sum(lwo.model, tokens, labels) / total * dist.get_world_size()
        lwo.backward(loss)
        report = lwo.step()
    norms = [size for kind, size in counter.calls if kind == "all_reduce" and size == 8]
    sent = counter.bytes("all_gather", "reduce_scatter", "all_reduce") - sum(norms)
    return sent == report.bytes_sent


def train_layouts(names: Iterable[str]) -> dict[str, tuple[dict[str, Tensor], bool]]:
    found = {}
    for name in names:
        tied, layout = LAYOUTS[name]
        model = tiny_model(tied=tied)
        layout(model)
        lwo = attach(model)
        counts = [counted_step(lwo, step) for step in range(RECIPE.steps)]
        found[name] = weights(lwo), all(counts)
    return found


def test_any_layout_trains_as_a_plain_loop() -> None:
    for name, (found, counted) in run_ranks(train_layouts, 2, list(LAYOUTS))[0].items():
        assert_equals_plain_loop(found, tied=LAYOUTS[name][0], case=name)
        assert counted, name


def train_accumulating(names: Iterable[str]) -> dict[str, dict[str, Tensor]]:
    found = {}
    for name in names:
        tied, layout = LAYOUTS[name]
        model = tiny_model(tied=tied)
        layout(model)
        found[name] = train(attach(model, gradient_accumulation_steps=2), RECIPE.steps)[1]
    return found


def test_any_layout_accumulates_as_a_plain_loop() -> None:
    names = ["torchtitan", "accelerate, tied", "[embed, head], tied", "the root alone"]
    for name, found in run_ranks(train_accumulating, 2, names)[0].items():
        assert_equals_plain_loop(found, tied=LAYOUTS[name][0], case=name)


def train_resharded_to_pairs() -> dict[str, Tensor]:
    return train(attach(shard(tiny_model(tied=True), reshard_after_forward=2)), RECIPE.steps)[1]


def test_layers_resharded_to_fewer_ranks_train_as_a_plain_loop() -> None:
    assert_equals_plain_loop(run_ranks(train_resharded_to_pairs, 4)[0], tied=True, case="pairs")


# ---- meshes


def hybrid(replicas: int) -> DeviceMesh:
    shape = (replicas, dist.get_world_size() // replicas)
    return init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))


def train_hybrid(replicas: int) -> tuple[dict[str, Tensor], dict[str, Tensor], bool, list]:
    """Weights at the end, without and with a resume in mid-visit; counts; the moments of the
    resume.
    """
    lwo = attach(shard(tiny_model(tied=True), mesh=hybrid(replicas)), state="keep")
    counts = [counted_step(lwo, step) for step in range(7)]
    state = lwo.state_dict()
    saved = weights(lwo)
    train_from(lwo, 7)
    other = attach(shard(tiny_model(tied=True), mesh=hybrid(replicas)), state="keep")
    other.write_layer(saved)
    other.load_state_dict(state)
    train_from(other, 7)
    return weights(lwo), weights(other), all(counts), sorted(state["moments"])


@pytest.mark.parametrize(("replicas", "world_size"), [(2, 4), (2, 2), (1, 2)])
def test_hybrid_sharding_trains_as_a_plain_loop(replicas: int, world_size: int) -> None:
    ranks = run_ranks(train_hybrid, world_size, replicas)
    model = tiny_model(tied=True)
    layers = [layer.parameter_names for layer in find_layers(model)]
    oracle.train(model, layers, RECIPE, keep=True)
    plain = dict(model.named_parameters())
    for found, resumed, counted, moments in ranks:
        assert counted or replicas == 1  # FSDP2 also calls a sum over one replica
        assert set(moments) == {name for layer in layers[:4] for name in layer}
        for name in plain:
            assert (plain[name] - found[name]).abs().max() < TOLERANCE, name
            assert torch.equal(found[name], ranks[0][0][name]), name
            assert torch.equal(found[name], resumed[name]), name


def train_hybrid_in_16_bits() -> dict[str, Tensor]:
    """Weights that are stored in bf16, and their masters parked."""
    model = oracle.tiny_model(tied=True, dtype=torch.bfloat16)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    lwo = attach(shard(model, mesh=hybrid(2), mp_policy=policy))
    return train(lwo, RECIPE.steps)[1]


def train_sharded_in_16_bits() -> dict[str, Tensor]:
    model = oracle.tiny_model(tied=True, dtype=torch.bfloat16)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return train(attach(shard(model, mp_policy=policy)), RECIPE.steps)[1]


def test_hybrid_sharding_of_16_bits_trains_as_over_one_dimension() -> None:
    """The masters differ by the order of the sums alone, in gradients that bf16 has made."""
    hybrids = run_ranks(train_hybrid_in_16_bits, 4)
    sharded = run_ranks(train_sharded_in_16_bits, 4)[0]
    before = dict(oracle.tiny_model(tied=True, dtype=torch.bfloat16).named_parameters())
    moved = apart = 0.0
    for name, tensor in hybrids[0].items():
        assert tensor.dtype == torch.float32
        assert all(torch.equal(tensor, other[name]) for other in hybrids[1:]), name
        moved += (sharded[name] - before[name].detach()).square().sum().item()
        apart += (sharded[name] - tensor).square().sum().item()
    assert apart < 0.05**2 * moved


def skipped_by_replicas() -> list[float]:
    lwo = attach(shard(tiny_model(tied=True), mesh=hybrid(2)))
    skipped = []
    for step in range(3):
        tokens, labels = micro_batches(step, 1)[0]
        loss = oracle.loss_sum(lwo.model, tokens, labels)
        # The gradient stays finite, so the other replica can know it from the norm alone.
        lwo.backward(loss + (float("inf") if (step, dist.get_rank()) == (1, 3) else 0.0))
        skipped.append(float(lwo.step().skipped))
    return skipped


def test_a_non_finite_loss_of_one_replica_is_skipped_by_all() -> None:
    assert run_ranks(skipped_by_replicas, 4) == [[0.0, 1.0, 0.0]] * 4


def train_pairs() -> tuple[dict[str, Tensor], list[float], list[str]]:
    """Two pairs of ranks, each with a model of its own: pair 1 sees other batches than pair 0."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pair", "shard"))["shard"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lwo = attach(shard(tiny_model(tied=True), mesh=mesh))
    pair, place = divmod(dist.get_rank(), 2)
    norms = []
    for step in range(RECIPE.steps):
        tokens, labels = oracle.global_batch(step + 100 * pair)
        total = (labels[:, 1:] != -100).sum()
        mine = tokens.chunk(2)[place], labels.chunk(2)[place]
        lwo.backward(oracle.loss_sum(lwo.model, *mine) / total * 2)
        norms.append(float(lwo.step().grad_norm))
    return weights(lwo), norms, [str(w.message) for w in caught]


def test_ranks_of_a_smaller_mesh_train_on_their_own() -> None:
    ranks = run_ranks(train_pairs, 4)
    assert_equals_plain_loop(ranks[0][0], tied=True, case="pair 0")
    for i in (0, 2):
        for name, tensor in ranks[i][0].items():
            assert torch.equal(tensor, ranks[i + 1][0][name]), name
        assert ranks[i][1] == ranks[i + 1][1]
        assert any(f"over the ranks [{i}, {i + 1}] of 4" in line for line in ranks[i][2])
        assert not ranks[i + 1][2]
    assert ranks[0][1] != ranks[2][1]


def train_with_a_hook() -> tuple[dict[str, Tensor], list[str], list[float]]:
    """Each rank has a mesh of its own; a hook of the caller's averages what each has reduced."""
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replica", "shard"))["shard"]
    model = shard(tiny_model(tied=True), mesh=mesh)

    def average(gradient: Tensor) -> None:
        dist.all_reduce(gradient)
        gradient.div_(2)

    for module in model.modules():
        if hasattr(module, "set_all_reduce_hook"):
            module.set_all_reduce_hook(average)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lwo = attach(model)
    found = train(lwo, RECIPE.steps)[1]
    skipped = []
    for broken in (False, True):  # the loss of rank 0 has no influence on the gradients
        loss = oracle.loss_sum(lwo.model, *micro_batches(0, 1)[0])
        if broken and dist.get_rank() == 0:
            loss = loss + torch.tensor(torch.inf)
        lwo.backward(loss)
        skipped.append(float(lwo.step().skipped))
    return found, [str(w.message) for w in caught], skipped


def test_a_hook_of_the_callers_between_meshes_is_followed() -> None:
    for found, messages, skipped in run_ranks(train_with_a_hook, 2):
        assert_equals_plain_loop(found, tied=True, case="hook")
        assert messages == []
        assert skipped == [0.0, 0.0]  # alike on both ranks, or they would drift apart


# ---- experts that only some ranks use


class Experts(nn.Module):
    """Adds to each sequence what the expert of its first token makes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        parts = []
        for row, first in zip(x, tokens[:, 0].tolist(), strict=True):
            parts.append(row + self.experts[first % 3](row).tanh())
        return torch.stack(parts)


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(12, 8)
        self.layers = nn.ModuleList(Experts() for _ in range(2))
        self.head = nn.Linear(8, 12)
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, tokens)
        logits: Tensor = self.head(x)
        return logits.logsumexp(-1).square().mean()


# Rank 0 uses the experts 0 and 1, rank 1 the experts 0 and 2.
TOKENS = torch.tensor([[0, 5, 7], [1, 2, 9], [3, 4, 4], [2, 8, 1]])


def train_mixture(distributed: bool) -> dict[str, Tensor]:
    model = Mixture()
    if distributed:
        for layer in model.layers:
            fully_shard(layer)
        fully_shard(model)
    lwo = attach(model)
    for _ in range(10):
        lwo.backward(model(TOKENS.chunk(2)[dist.get_rank()] if distributed else TOKENS))
        lwo.step()
    return weights(lwo)


def test_experts_that_only_some_ranks_use_keep_their_gradients_apart() -> None:
    expected = train_mixture(False)
    for name, tensor in run_ranks(train_mixture, 2, True, timeout=60)[0].items():
        assert (tensor - expected[name]).abs().max() < TOLERANCE, name


# ---- what the caller sets on the sharded model


def set_by_caller(name: str) -> tuple[dict[str, Tensor], int]:
    """Weights, and what FSDP2 has not finished after the last step."""
    model = shard(tiny_model(tied=True))
    lwo = attach(model)
    if name == "no gradient sync":
        model.set_requires_gradient_sync(False)
    elif name == "no reshard after backward":
        model.set_reshard_after_backward(False)
    elif name == "not the last backward":
        model.set_is_last_backward(False)
    else:
        model.set_reshard_after_forward(False)
    found = train(lwo, RECIPE.steps)[1]
    return found, len(model._get_fsdp_state()._comm_ctx.post_forward_order)


@pytest.mark.parametrize(
    "name",
    ["no gradient sync", "no reshard after backward", "not the last backward", "no reshard"],
)
def test_a_setting_of_the_callers_changes_no_result(name: str) -> None:
    found, unfinished = run_ranks(set_by_caller, 2, name)[0]
    assert_equals_plain_loop(found, tied=True, case=name)
    assert unfinished == 0


def settings_after_detach() -> list[set[bool]]:
    model = shard(tiny_model(tied=True))
    model.set_reduce_scatter_unused_params(True)
    model.model.layers[0].set_unshard_in_backward(False)
    groups = fsdp_groups([m for m in model.modules() if isinstance(m, FSDPModule)])
    lwo = attach(model)
    train_step(lwo, 0)
    during = {group.reduce_scatter_unused_params for group in groups}
    lwo.detach()
    after = {group.reduce_scatter_unused_params for group in groups}
    first = fsdp_groups([model.model.layers[0]])
    return [during, after, {group.unshard_in_backward for group in first}]


def test_detach_restores_what_the_caller_has_set() -> None:
    if not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
        pytest.skip("needs torch 2.13")
    assert run_ranks(settings_after_detach, 2) == [[{True, False}, {True}, {False}]] * 2


def train_on_sums() -> tuple[dict[str, Tensor], str]:
    """The gradient is the sum over ranks, of losses that are divided by the batch's tokens."""
    model = shard(tiny_model(tied=True))
    for module in model.modules():
        if hasattr(module, "set_gradient_divide_factor"):
            module.set_gradient_divide_factor(1.0)
    lwo = attach(model)
    for step in range(RECIPE.steps):
        tokens, labels = micro_batches(step, 1)[0]
        total = (oracle.global_batch(step)[1][:, 1:] != -100).sum()
        lwo.backward(oracle.loss_sum(lwo.model, tokens, labels) / total)
        lwo.step()
    found = weights(lwo)
    model.set_gradient_divide_factor(4.0)  # of the root's group only
    with pytest.raises(UserError) as caught:
        train_step(lwo, 0)
    return found, str(caught.value)


def test_gradients_are_divided_as_the_caller_says_but_by_one_factor() -> None:
    found, message = run_ranks(train_on_sums, 2)[0]
    assert_equals_plain_loop(found, tied=True, case="sums")
    assert "divided by 4.0, 1.0" in message or "divided by 1.0, 4.0" in message
    assert "not recursive" in message


def refusals() -> dict[str, str]:
    def message(model: Any) -> str:
        with pytest.raises(UserError) as caught:
            attach(model)
        return str(caught.value)

    found = {}
    model = tiny_model(tied=True)
    fully_shard(model.model.embed_tokens)
    found["untied"] = message(fully_shard(model))

    model = shard(tiny_model(tied=True))
    model.set_gradient_divide_factor(1.0)
    found["uneven"] = message(model)

    model = tiny_model(tied=True)
    pair = init_device_mesh("cpu", (2, 1), mesh_dim_names=("a", "b"))
    fully_shard(model.model.layers[0], mesh=pair["b"])
    found["meshes"] = message(fully_shard(model))

    model = tiny_model(tied=True)
    found["ignored"] = message(fully_shard(model, ignored_params={model.model.norm.weight}))
    model = shard(tiny_model(tied=False))
    names = tuple(name for name, _ in model.named_parameters() if ".layers.1." in name)
    with pytest.raises(UserError) as caught:
        layers = [lwo_dist.Layer("second", names, depth=3)]
        lwo_dist.attach(model, LWOConfig(), layers=layers)
    found["depth"] = str(caught.value)

    model = oracle.tiny_model(tied=True, seed=dist.get_rank())
    found["seeds"] = message(shard(model, mesh=pair))
    found["whole"] = message(torch.compile(shard(tiny_model(tied=True)), backend="aot_eager"))
    return found


def test_what_cannot_be_sharded_is_refused_with_reason_and_remedy() -> None:
    for found in run_ranks(refusals, 2):
        assert "were one tied parameter, which fully_shard has split in two" in found["untied"]
        assert "divided by" in found["uneven"] and "not recursive" in found["uneven"]
        assert "pass the same mesh to every fully_shard" in found["meshes"]
        assert "model.norm.weight lies outside of every fully_shard'ed module" in found["ignored"]
        assert "layer 'second' has depth 3, but its model.layers.1." in found["depth"]
        assert "is used at depth 2" in found["depth"]
        assert "initial weights differ between rank 0 and rank 1" in found["seeds"]
        assert "torch.compile was called on the model as a whole" in found["whole"]
        assert all("\n" not in line for line in found.values())
