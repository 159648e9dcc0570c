"""Counted, not timed: what each strategy sends, gathers in backward, and keeps."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import lwo_dist
from lwo_dist.hook import LWO
from lwo_dist.memory import optimizer_state_bytes, padded_numel
from tests import oracle
from tests.distributed.collectives import CountCollectives
from tests.distributed.training import attach, micro_batches, train_step
from tests.ranks import run_ranks

ONE_STEP_VISITS = oracle.Recipe(steps_per_layer=1)


def numel(lwo: LWO, index: int, multiple: int) -> int:
    parameters = dict(lwo.model.named_parameters())
    return sum(
        padded_numel(parameters[name].numel(), multiple)
        for name in lwo.layers[index].parameter_names
    )


# ---- replicate


def count_replicate() -> list[dict]:
    lwo = attach("replicate", ONE_STEP_VISITS, tied=False, dtype=torch.float32)
    rows = []
    for step in range(len(lwo.layers)):
        expected = 2 * 4 * padded_numel(numel(lwo, step, 4), dist.get_world_size())
        with CountCollectives() as counter:
            tokens, labels = micro_batches(step, 1)[0]
            lwo.backward(oracle.loss_sum(lwo.model, tokens, labels))
            report = lwo.step()
        rows.append({"calls": counter.calls, "expected": expected, "reported": report.bytes_sent})
    return rows


@pytest.mark.parametrize("world_size", [2, 4])
def test_replicate_sends_twice_the_layer_and_one_scalar(world_size: int) -> None:
    for row in run_ranks(count_replicate, world_size)[0]:
        kinds = [kind for kind, _ in row["calls"]]
        assert kinds == ["reduce_scatter", "all_reduce", "all_gather"]
        assert row["calls"][0][1] + row["calls"][2][1] == row["expected"] == row["reported"]
        assert row["calls"][1][1] == 4


# ---- fsdp


def count_fsdp(precision: str, checkpointing: bool, method: str = "lwo") -> list[dict]:
    lwo = attach(
        "fsdp", ONE_STEP_VISITS, tied=False, dtype=torch.float32, precision=precision, method=method
    )
    lwo.model.train()
    if checkpointing:
        lwo.model.gradient_checkpointing_enable({"use_reentrant": False})
        lwo.model.disable_input_require_grads()
    rows = []
    for step in range(len(lwo.layers)):
        trained = set(lwo.active_layer.parameter_names)
        sizes = {n: rows_padded(p) for n, p in lwo.model.named_parameters()}
        tokens, labels = micro_batches(step, 1)[0]
        with CountCollectives() as forward:
            loss = oracle.loss_sum(lwo.model, tokens, labels)
        with CountCollectives() as backward:
            lwo.backward(loss)
        with CountCollectives() as update:
            expected = lwo.strategy.bytes_per_step()
            report = lwo.step()
        rows.append(
            {
                "layer": report.layer,
                "forward": forward.calls,
                "backward": backward.calls,
                "update": update.calls,
                "reported": report.bytes_sent,
                "predicted": expected,
                "layer_bytes": 4 * sum(sizes[name] for name in trained),
            }
        )
    return rows


def rows_padded(parameter: Tensor) -> int:
    return (
        parameter.numel()
        // parameter.shape[0]
        * padded_numel(parameter.shape[0], dist.get_world_size())
    )


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_fsdp_gathers_no_prefix_and_reduces_one_layer(precision: str, checkpointing: bool) -> None:
    rows = run_ranks(count_fsdp, 2, precision, checkpointing)[0]
    assert [row["layer"] for row in rows] == [
        "embed",
        "layer_0",
        "layer_1",
        "layer_2",
        "layer_3",
        "head",
    ]
    num_layers = 4
    for depth, row in enumerate(rows):
        assert [kind for kind, _ in row["forward"]] == ["all_gather"] * (num_layers + 1)
        # The layers at and above the active one, and not one more; the last one and the root
        # (embedding, head) stay gathered.
        suffix = max(num_layers - max(depth, 1), 0)
        kinds = [kind for kind, _ in row["backward"]]
        assert kinds.count("all_gather") == suffix, row["layer"]
        assert kinds.count("reduce_scatter") == 1, row["layer"]
        assert len(kinds) == suffix + 1
        [reduced] = [size for kind, size in row["backward"] if kind == "reduce_scatter"]
        assert reduced == row["layer_bytes"]  # fp32, whatever the compute dtype
        assert row["update"] == [("all_reduce", 4)]  # the norm
        counted = sum(size for _, size in row["forward"] + row["backward"])
        assert counted == row["reported"] == row["predicted"], row["layer"]


def test_full_through_the_hook_gathers_and_reduces_everything() -> None:
    [row] = run_ranks(count_fsdp, 2, "fp32", False, "full")[0]
    assert sum(1 for kind, _ in row["backward"] if kind == "all_gather") == 3
    assert sum(1 for kind, _ in row["backward"] if kind == "reduce_scatter") == 5
    assert sum(size for _, size in row["forward"] + row["backward"]) == row["reported"]


def resharded_after_forward() -> list[list[bool]]:
    """By step, and at last after `detach`: which layers are sharded again after a forward pass, of
    a model whose caller keeps them gathered for backward.
    """
    model = oracle.tiny_model(tied=False)
    for layer in model.model.layers:
        fully_shard(layer, reshard_after_forward=False)
    fully_shard(model)
    lwo = lwo_dist.attach(model, lwo_dist.LWOConfig(steps_per_layer=1))
    tokens, labels = micro_batches(0, 1)[0]
    rows = []
    for step in range(len(lwo.layers) + 1):
        if step == len(lwo.layers):
            lwo.detach()
        loss = oracle.loss_sum(model, tokens, labels)
        rows.append([isinstance(layer.mlp.up_proj.weight, DTensor) for layer in model.model.layers])
        if step < len(lwo.layers):
            with CountCollectives() as counter:
                lwo.backward(loss)
            assert counter.number("all_gather") == 0
            lwo.step()
    return rows


def test_fsdp_keeps_nothing_gathered_that_backward_does_not_need() -> None:
    *steps, detached = run_ranks(resharded_after_forward, 2)[0]
    for depth, row in enumerate(steps):
        assert row == [layer + 1 < depth for layer in range(4)]
    assert detached == [False] * 4


# ---- memory


def state_bytes(strategy: str) -> list[tuple[str, int, int, int, bool]]:
    lwo = attach(strategy, ONE_STEP_VISITS, tied=True, dtype=torch.float32)
    rows, world_size = [], dist.get_world_size()
    for step in range(2 * len(lwo.layers)):
        name, index = lwo.active_layer.name, lwo.schedule.active_layer(lwo.step_count)
        # `step` switches, so the state is read inside of it, right after the update.
        seen = {}
        inner = lwo.strategy.step

        def spy(lr: float, max_norm: float, inner=inner, seen=seen, lwo=lwo):
            update = inner(lr, max_norm)
            seen.update(lwo.strategy.memory())
            return update

        lwo.strategy.step = spy
        train_step(lwo, step)
        lwo.strategy.step = inner
        if strategy == "replicate":
            padded = padded_numel(numel(lwo, index, 4), world_size)
        else:
            parameters = dict(lwo.model.named_parameters())
            padded = sum(rows_padded(parameters[n]) for n in lwo.layers[index].parameter_names)
        frozen_grads = [
            n for n, p in lwo.model.named_parameters() if p.grad is not None and not p.requires_grad
        ]
        rows.append(
            (
                name,
                seen["optimizer_state_bytes"],
                optimizer_state_bytes(padded, world_size),
                optimizer_state_bytes(numel(lwo, index, 1), world_size),
                not frozen_grads,
            )
        )
    return rows


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("strategy", ["replicate", "fsdp"])
def test_optimizer_state_is_8_bytes_a_parameter_over_the_ranks(
    strategy: str, world_size: int
) -> None:
    ranks = run_ranks(state_bytes, world_size, strategy)
    for rows in zip(*ranks, strict=True):
        name, _, with_padding, formula, _ = rows[0]
        held = [row[1] for row in rows]
        if strategy == "replicate":
            assert held == [with_padding] * world_size, name
        else:  # FSDP2 pads what it sends, not what it keeps: together exactly the parameters
            assert max(held) <= with_padding, name
            assert (
                sum(held) == formula * world_size
                or abs(sum(held) - formula * world_size) < 8 * world_size
            ), name
        assert formula <= with_padding <= formula + 8 * 4 * 12 * 25, (
            name
        )  # at most a row of each tensor
        assert all(row[4] for row in rows), (
            f"a frozen parameter has a gradient while {name} is trained"
        )


# ---- every step changes the active layer and no other


def changed_names(strategy: str, method: str) -> list[tuple[str, list[str], list[str], list[str]]]:
    recipe = oracle.Recipe(steps_per_layer=3)
    lwo = attach(strategy, recipe, tied=False, dtype=torch.float32, method=method)
    everything = [*lwo.layers, lwo.rest]
    before = {name: t for layer in everything for name, t in lwo.read_layer(layer).items()}
    rows = []
    for step in range(2 * len(lwo.layers) * recipe.steps_per_layer):
        trained = lwo.active_layer
        frozen_with_grad: list[str] = []
        handles = watch_frozen_gradients(lwo.model, frozen_with_grad)
        train_step(lwo, step)
        for handle in handles:
            handle.remove()
        after = {name: t for layer in everything for name, t in lwo.read_layer(layer).items()}
        changed = [name for name in after if not torch.equal(before[name], after[name])]
        rows.append(
            (trained.name, sorted(changed), sorted(trained.parameter_names), frozen_with_grad)
        )
        before = after
    return rows


def watch_frozen_gradients(model: nn.Module, found: list[str]) -> list:
    """Look at every `.grad` when backward has passed a layer: none may hang on a frozen
    parameter.
    """

    def look(module: nn.Module, *_: object) -> None:
        found.extend(
            n for n, p in model.named_parameters() if p.grad is not None and not p.requires_grad
        )

    return [layer.register_full_backward_hook(look) for layer in model.model.layers]


@pytest.mark.parametrize(
    ("strategy", "method"), [("replicate", "lwo"), ("fsdp", "lwo"), ("fsdp", "full")]
)
def test_every_step_changes_exactly_the_active_layer(strategy: str, method: str) -> None:
    rows = run_ranks(changed_names, 2, strategy, method)[0]
    for step, (layer, changed, trained, frozen_with_grad) in enumerate(rows):
        assert changed == trained, f"step {step}, active layer {layer}"
        assert not frozen_with_grad, f"step {step}: {frozen_with_grad}"
