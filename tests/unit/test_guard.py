"""What would train a model wrongly without a word: gradients and flags behind the hook's back."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import lwo_dist
from lwo_dist import LWOConfig
from lwo_dist.errors import UserError
from lwo_dist.hook import LWO
from tests import oracle

CONFIG = LWOConfig(lr=1e-2, steps_per_layer=2, weight_decay=0.0, max_grad_norm=0.0)


def train(model: nn.Module, steps: int) -> list[float]:
    """The norms of the gradients."""
    lwo = lwo_dist.attach(model, CONFIG)
    norms = []
    for step in range(steps):
        backward(lwo, step)
        norm = lwo.step().grad_norm
        assert norm is not None
        norms.append(norm.item())
    lwo.detach()
    return norms


def backward(lwo: LWO, step: int = 0, model: nn.Module | None = None) -> None:
    tokens, labels = oracle.global_batch(step)
    lwo.backward(oracle.loss_sum(model or lwo.model, tokens, labels) / labels.numel())


def test_gradients_from_before_attach_are_dropped() -> None:
    expected = train(oracle.tiny_model(tied=True), 6)
    model = oracle.tiny_model(tied=True)
    tokens, labels = oracle.global_batch(7)
    oracle.loss_sum(model, tokens, labels).backward()
    assert train(model, 6) == expected


def test_a_flag_set_after_attach_is_refused() -> None:
    lwo = lwo_dist.attach(oracle.tiny_model(tied=True), CONFIG)
    lwo.model.requires_grad_(True)
    backward(lwo)
    with pytest.raises(RuntimeError, match=r"\.requires_grad was set to True after attach"):
        lwo.step()


def test_a_frozen_parameter_of_the_active_layer_is_refused() -> None:
    lwo = lwo_dist.attach(oracle.tiny_model(tied=True), CONFIG)
    lwo.module.get_parameter(lwo.active_layer.parameter_names[-1]).requires_grad_(False)
    backward(lwo)
    with pytest.raises(RuntimeError, match=r"\.requires_grad was set to False after attach"):
        lwo.step()


def test_zero_grad_before_step_is_refused() -> None:
    lwo = lwo_dist.attach(oracle.tiny_model(tied=True), CONFIG)
    backward(lwo)
    lwo.model.zero_grad()
    with pytest.raises(RuntimeError, match="was dropped or replaced between"):
        lwo.step()


@pytest.mark.parametrize("how", ["clip", "zero"])
def test_gradients_changed_in_place_are_refused(how: str) -> None:
    lwo = lwo_dist.attach(oracle.tiny_model(tied=True), CONFIG)
    backward(lwo)
    if how == "clip":
        nn.utils.clip_grad_norm_(lwo.model.parameters(), 1e-3)
    else:
        lwo.model.zero_grad(set_to_none=False)
    with pytest.raises(RuntimeError, match="was changed in place between"):
        lwo.step()


def test_zero_grad_after_step_changes_nothing() -> None:
    lwo = lwo_dist.attach(oracle.tiny_model(tied=True), CONFIG)
    norms = []
    for step in range(6):
        backward(lwo, step)
        norm = lwo.step().grad_norm
        assert norm is not None
        norms.append(norm.item())
        lwo.model.zero_grad()
    assert norms == train(oracle.tiny_model(tied=True), 6)


def test_a_loss_that_does_not_reach_the_active_layer_is_told() -> None:
    lwo = lwo_dist.attach(oracle.tiny_model(tied=True), CONFIG)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backward(lwo)
        lwo.step()
    backward(lwo, model=oracle.tiny_model(tied=True))
    with pytest.warns(UserWarning, match=f"did not reach {lwo.active_layer.name}"):
        lwo.step()


def test_negative_numbers_and_wrong_kinds_are_refused() -> None:
    lwo = lwo_dist.attach(oracle.tiny_model(tied=True), CONFIG)
    backward(lwo)
    with pytest.raises(UserError, match="neither can be below 0"):
        lwo.step(lr=-1.0)
    with pytest.raises(UserError, match="pass a torch.nn.Module and an LWOConfig"):
        lwo_dist.attach(oracle.tiny_model(tied=True), {"lr": 1e-3})  # type: ignore[arg-type]


def test_a_model_without_values_is_refused() -> None:
    with torch.device("meta"):
        model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])})
    with pytest.raises(UserError, match="on the meta device"):
        lwo_dist.attach(model, CONFIG)
