"""`replicate` keeps a layer's gradient in one flat buffer."""

from __future__ import annotations

import pytest
import torch

import lwo_dist
from lwo_dist.strategies import replicate
from tests import oracle


def train(steps: int) -> tuple[dict[str, torch.Tensor], list[dict[str, int]]]:
    """The weights, and after each step's backward the storage of each gradient."""
    model = oracle.tiny_model(tied=False)
    config = lwo_dist.LWOConfig(lr=1e-3, steps_per_layer=1, gradient_accumulation_steps=2)
    lwo = lwo_dist.attach(model, config)
    storages = []
    for step in range(steps):
        for part in (0, 1):
            tokens, labels = oracle.global_batch(2 * step + part)
            lwo.backward(oracle.loss_sum(model, tokens, labels))
            storages.append(
                {
                    name: p.grad.untyped_storage().data_ptr()
                    for name, p in model.named_parameters()
                    if p.grad is not None
                }
            )
            lwo.step()
        assert all(p.grad is None for p in model.parameters())
    return dict(model.named_parameters()), storages


def test_a_large_gradient_is_not_held_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, own = train(6)
    monkeypatch.setattr(replicate, "_LARGE", 1000)
    found, moved = train(6)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    sizes = {name: parameter.numel() for name, parameter in expected.items()}
    for before, after in zip(own, moved, strict=True):
        large = [name for name in after if sizes[name] >= 1000]
        small = [name for name in after if sizes[name] < 1000]
        assert large and len({after[name] for name in large}) == 1
        assert len({after[name] for name in small}) == len(small)
        assert len(set(before.values())) == len(before)
