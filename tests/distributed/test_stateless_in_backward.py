"""`lwo.stateless_update: backward`: equal to a plain loop, with next to no gradients, refused."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lwo_dist
from lwo_dist.driver import prepare
from lwo_dist.errors import UserError
from lwo_dist.plan.held import Storage, held_bytes
from lwo_dist.strategies.fsdp.builder import shard_model
from tests import oracle
from tests.benchmarks import peaks
from tests.distributed import test_run, training
from tests.distributed.test_rooms import whole_run
from tests.distributed.test_run import make_config, stop_after
from tests.distributed.test_stateless import (
    COMBINATIONS,
    RECIPE,
    attached,
    make_model,
    plain_loop,
)
from tests.ranks import RanksError, run_ranks

inputs = test_run.inputs


def in_backward(tied: bool, stateless: str, embeddings: str, **more: Any) -> lwo_dist.LWO:
    return attached(tied, stateless, embeddings, stateless_update="backward", **more)


def hook_loop(
    tied: bool, stateless: str, embeddings: str, checkpointing: bool
) -> tuple[list[float], dict[str, Tensor]]:
    model: Any = make_model(tied)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    lwo = in_backward(tied, stateless, embeddings, model=model)
    shapes = {name: tuple(p.shape) for name, p in lwo.module.named_parameters()}
    storage = Storage("replicate", 1, updates_in_backward=True)
    losses = []
    for step in range(RECIPE.steps):
        visit = lwo.visit
        loss, report = training.train_step(lwo, step)
        losses.append(loss)
        if not report.switched:
            held = lwo.memory()
            formula = held_bytes(shapes, lwo.layers, visit.stateful, storage, visit.stateless)
            assert held["gradient_bytes"] == 2 * formula.gradient_bytes  # of 8 bytes, not 4
    return losses, training.weights(lwo)


@pytest.mark.parametrize(
    ("tied", "stateless", "embeddings", "checkpointing"),
    [(number % 2 == 0, *both, False) for number, both in enumerate(COMBINATIONS)]
    + [(True, "all", "always", True), (False, "suffix", "visit", True)],
)
def test_it_equals_a_plain_loop(
    tied: bool, stateless: str, embeddings: str, checkpointing: bool
) -> None:
    expected, expected_weights = plain_loop(tied=tied, stateless=stateless, embeddings=embeddings)
    [(losses, found)] = run_ranks(hook_loop, 1, tied, stateless, embeddings, checkpointing)
    assert losses == pytest.approx(expected, abs=1e-10)
    for name, tensor in expected_weights.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-9)


def weights_after(moved: bool) -> dict[str, Tensor]:
    lwo = in_backward(True, "all", "always")
    for step in range(4):
        if moved and lwo.step_in_visit == 1:
            for parameter in lwo.module.parameters():
                parameter.data = parameter.data.clone()
        training.train_step(lwo, step)
    return training.weights(lwo)


def test_a_model_that_moves_within_a_visit_is_trained_on() -> None:
    [moved], [there] = run_ranks(weights_after, 1, True), run_ranks(weights_after, 1, False)
    assert all(torch.equal(moved[name], there[name]) for name in there)


def gradients_seen() -> tuple[int, int]:
    """The largest sum of gradients that are there at once, and of one matrix; in elements."""
    lwo = in_backward(False, "all", "visit", order="descending")  # the head is active
    parameters = [p for p in lwo.module.parameters() if p.requires_grad and p.dim() > 1]
    head = lwo.module.lm_head.weight
    most = 0

    def count(_: Tensor) -> None:
        nonlocal most
        others = [p.grad for p in parameters if p is not head and p.grad is not None]
        most = max(most, sum(gradient.numel() for gradient in others))

    for parameter in parameters:
        parameter.register_hook(count)
    training.train_step(lwo, 0)
    return most, max(p.numel() for p in parameters if p is not head)


def test_gradients_of_two_layers_are_never_there_together() -> None:
    [(most, largest)] = run_ranks(gradients_seen, 1)
    assert most <= largest


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_plan_is_what_is_measured(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks, "_RANKS", 1)
    more = ["lwo.stateless=all", "lwo.embeddings=always", "train.gradient_checkpointing=true"]
    late, early = (
        peaks.compare(
            "replicate",
            ["llama"],
            *more,
            f"lwo.stateless_update={when}",
            methods=("lwo",),
            precision=precision,
        )[0]
        for when in ("step", "backward")
    )
    for row in (late, early):
        assert 0.95 < row["ratio"] < 1.05
    for visit, held in early["held"].items():
        for key in ("parameter_bytes", "gradient_bytes", "optimizer_state_bytes"):
            assert early["memory"][visit][key] == held[key], (visit, key)
    gone = {late["memory"][visit]["gradient_bytes"] for visit in late["memory"]}
    together = {held["orthogonalise_bytes"] for held in late["held"].values()}
    assert early["measured"] < late["measured"] < early["measured"] + max(gone) + max(together)


def test_a_run_may_go_on_with_less_memory(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    """A run that was updated at the step is resumed in backward; the results are the same."""
    overrides = ["strategy=replicate", "cluster.num_workers=1", "lwo.stateless=all"]
    overrides += ["train.logging_steps=1", "checkpoint.steps=4"]
    whole = prepare(make_config(inputs, tmp_path / "whole", *overrides))
    [expected] = run_ranks(whole_run, 1, whole)
    broken = prepare(make_config(inputs, tmp_path / "broken", *overrides))
    with pytest.raises(RanksError, match="InterruptedError"):
        run_ranks(stop_after, 1, broken, 4)
    overrides += ["lwo.stateless_update=backward"]
    [resumed] = run_ranks(
        whole_run, 1, prepare(make_config(inputs, tmp_path / "broken", *overrides))
    )
    assert min(resumed) == 5
    assert resumed == {step: pytest.approx(expected[step], rel=1e-4) for step in resumed}


def skips(where: str) -> tuple[float, list[str]]:
    """Whether the step was skipped, and which layers it changed nevertheless."""
    order = "descending" if where == "lm_head" else "ascending"  # the head is active, or `embed`
    lwo = in_backward(False, "all", "visit", order=order)
    training.train_step(lwo, 0)
    before = training.weights(lwo)
    if where != "loss":
        weight = lwo.module.get_submodule(where).weight
        weight.register_hook(lambda gradient: gradient * torch.inf)
    tokens, labels = training.micro_batches(1, 1)[0]
    loss = oracle.loss_sum(lwo.model, tokens, labels)
    lwo.backward(loss * (torch.inf if where == "loss" else 1.0))
    report = lwo.step()
    after = training.weights(lwo)
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    layers = [layer for layer in lwo.layers if not moved.isdisjoint(layer.parameter_names)]
    assert report.skipped is not None
    return float(report.skipped), [layer.name for layer in layers]


@pytest.mark.parametrize(
    ("where", "changed"),
    [
        ("loss", []),
        ("lm_head", []),  # the active layer
        ("model.layers.2.mlp.down_proj", ["layer_3"]),
        ("model.layers.2.post_attention_layernorm", ["layer_2", "layer_3"]),  # after its MLP
    ],
)
def test_nothing_is_updated_after_what_is_not_finite(where: str, changed: list[str]) -> None:
    assert run_ranks(skips, 1, where) == [(1.0, changed)]


def without_an_mlp(when: str) -> dict[str, Tensor]:
    """A layer's MLP is left out, as an expert is that no token goes to."""
    lwo = attached(True, "all", "visit", stateless_update=when)
    lwo.module.get_submodule("model.layers.2").mlp.forward = torch.zeros_like  # type: ignore
    for step in range(RECIPE.steps_per_layer + 1):
        training.train_step(lwo, step)
    return training.weights(lwo)


def test_matrices_that_the_loss_does_not_reach_decay() -> None:
    [late] = run_ranks(without_an_mlp, 1, "step")
    [early] = run_ranks(without_an_mlp, 1, "backward")
    start = dict(make_model(True).named_parameters())
    name = "model.layers.2.mlp.down_proj.weight"
    assert not torch.equal(late[name], start[name])
    for name, tensor in late.items():
        torch.testing.assert_close(early[name], tensor, rtol=0, atol=1e-12)


def trains_outside() -> tuple[str, bool, bool]:
    """A backward pass that the hook did not start: what is said, and whether anything moved; and
    whether anything moves once the hook has been dropped without `detach`.
    """
    lwo = in_backward(False, "all", "visit")
    training.train_step(lwo, 0)
    model: Any = lwo.module
    tokens, labels = training.micro_batches(1, 1)[0]

    def moved(do: Any) -> bool:
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        do(oracle.loss_sum(model, tokens, labels))
        return any(not torch.equal(before[name], p) for name, p in model.named_parameters())

    def refused(loss: Tensor) -> None:
        nonlocal said
        with pytest.raises(RuntimeError) as raised:
            loss.backward()
        said = str(raised.value)

    said = ""
    attached_moved = moved(refused)
    training.train_step(lwo, 1)  # the hook itself goes on
    del lwo
    gc.collect()
    dropped_moved = moved(lambda loss: loss.backward())
    assert all(p.grad is not None for p in model.model.layers[1].mlp.parameters())
    return said, attached_moved, dropped_moved


def test_a_backward_pass_outside_of_the_hook_updates_nothing() -> None:
    [(said, attached_moved, dropped_moved)] = run_ranks(trains_outside, 1)
    assert "outside of lwo.backward()" in said
    assert not attached_moved
    assert not dropped_moved


def fails_in_backward() -> str:
    """An error in the middle of a backward pass, such as for lack of memory."""
    lwo = in_backward(False, "all", "visit")
    tokens, labels = training.micro_batches(0, 1)[0]
    weight = lwo.module.model.layers[1].mlp.down_proj.weight

    def fail(_: Tensor) -> None:
        raise MemoryError("no memory")

    handle = weight.register_hook(fail)
    with pytest.raises(MemoryError):
        lwo.backward(oracle.loss_sum(lwo.model, tokens, labels))
    handle.remove()
    with pytest.raises(RuntimeError) as raised:
        lwo.backward(oracle.loss_sum(lwo.model, tokens, labels))
    return str(raised.value)


def test_a_backward_pass_that_failed_is_not_repeated() -> None:
    assert "cannot be repeated; load a checkpoint" in run_ranks(fails_in_backward, 1)[0]


def refused_in_a_loop() -> list[str]:
    said = []

    def refuse(do: Any) -> None:
        with pytest.raises(UserError) as raised:
            do()
        said.append(str(raised.value))

    lwo = in_backward(False, "all", "visit")
    tokens, labels = training.micro_batches(0, 1)[0]
    before = training.weights(lwo)
    loss = oracle.loss_sum(lwo.model, tokens, labels)
    refuse(lambda: lwo.backward(loss, boundary=False))
    after = training.weights(lwo)
    assert all(torch.equal(before[name], after[name]) for name in before)
    lwo.backward(loss)
    refuse(lambda: lwo.step(lr=1e-3))
    lwo.detach(drop_gradients=True)

    def attach(wrap: bool = False, **settings: Any) -> None:
        model: nn.Module = oracle.tiny_model(tied=False)
        if wrap:
            shard_model(model, precision="fp32", device_type="cpu")
        lwo_dist.attach(model, lwo_dist.LWOConfig(stateless_update="backward", **settings))

    refuse(attach)
    refuse(lambda: attach(wrap=True, stateless="all"))
    return said


def test_a_loop_that_cannot_have_it_is_refused() -> None:
    [said] = run_ranks(refused_in_a_loop, 1)
    accumulates, rate, alone, fsdp = said
    assert "cannot accumulate" in accumulates
    assert "already updated layers with the rate of LWOConfig" in rate
    assert "has no effect with stateless: none" in alone
    assert "cannot be used with strategy: fsdp" in fsdp


def refused_on_two_ranks() -> str:
    with pytest.raises(UserError) as raised:
        in_backward(False, "all", "visit")
    return str(raised.value)


def test_several_processes_are_refused() -> None:
    for said in run_ranks(refused_on_two_ranks, 2):
        assert "works with one process only, and this run may have 2" in said


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["strategy=replicate", "cluster.num_workers=2"], "works with one process only"),
        (["strategy=fsdp", "cluster.num_workers=1"], "has no effect with strategy: fsdp"),
    ],
)
def test_a_run_is_refused_before_it_starts(
    overrides: list[str], said: str, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    overrides = [*overrides, "lwo.stateless=all", "lwo.stateless_update=backward"]
    with pytest.raises(UserError, match=said):
        prepare(make_config(inputs, tmp_path, *overrides))
    assert not (tmp_path / "r").exists()


def test_it_cannot_accumulate() -> None:
    with pytest.raises(ValueError, match="gradient_accumulation_steps = 2; set it to"):
        lwo_dist.LWOConfig(stateless_update="backward", gradient_accumulation_steps=2)
