"""`lwo.suffix_backward` in one process: the allotment, the budget, the refusals."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import BartConfig, BartForConditionalGeneration

import lwo_dist
from lwo_dist.errors import UserError
from lwo_dist.hook import LWO
from lwo_dist.layers import find_layers
from lwo_dist.methods.lwo import LayerWise
from lwo_dist.models.flops import flops_per_sequence
from lwo_dist.sublayers import find_sublayers
from lwo_dist.suffix import allot, droppable
from tests import dropbp, oracle

HIDDEN = 8


class Mixer(nn.Module):
    """Attention without a softmax: products of activations, and matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.out = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        query, key, value = self.into(x).chunk(3, -1)
        return self.out(torch.bmm(torch.bmm(query, key.transpose(1, 2)) / 8, value)), None


class PreNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.mixer = Mixer()
        self.mlp = nn.Sequential(nn.Linear(HIDDEN, 20), nn.GELU(), nn.Linear(20, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.norm(x))[0]
        return x + self.mlp(self.norm(x))


class Scaled(PreNorm):
    def forward(self, x: Tensor) -> Tensor:
        x = 0.5 * x + 0.1 * self.mixer(self.norm(x))[0]
        return 0.5 * x + self.norm(self.mlp(x))


class PostNorm(PreNorm):
    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x + self.mixer(x)[0])
        return self.norm(x + self.mlp(x))


class TwoParts(nn.Module):
    """An MLP in two modules, of which one is not added to the residual."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(HIDDEN, HIDDEN)
        self.fc2 = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.fc1(x).relu())


class Inside(nn.Module):
    """Its part adds the residual itself."""

    def __init__(self) -> None:
        super().__init__()
        self.part = PreNorm()

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.part(x)
        return hidden


class Gate(PreNorm):
    """A sublayer that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, HIDDEN)


class Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(HIDDEN, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        return x + x @ self.weight


class Named(PreNorm):
    """Called with the hidden states under another name."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)


class Stack(nn.Module):
    def __init__(self, layer: type[nn.Module], depth: int = 3, by: str | None = None):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, HIDDEN)
        self.layers = nn.ModuleList(layer() for _ in range(depth))
        self.head = nn.Linear(HIDDEN, 11)
        self.by = by

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x) if self.by is None else layer(**{self.by: x})
        logits: Tensor = self.head(x)
        return logits


TOKENS = torch.arange(10).view(2, 5)


def attach(model: nn.Module, share: float = 0.5, method: str = "lwo", **config: Any) -> LWO:
    config = {"lr": 1e-3, "steps_per_layer": 2, "suffix_backward": share, **config}
    return lwo_dist.attach(model, lwo_dist.LWOConfig(**config), method)


def step(lwo: LWO) -> None:
    lwo.backward(lwo.model(TOKENS).logsumexp(-1).sum())
    lwo.step()


# ---- the rates


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 0.9, 1.0])
def test_the_allotment_is_the_greedy_one_and_meets_the_budget(share: float) -> None:
    numbers = random.Random(1)
    for free in [0, 3] * 5:
        costs = [0.0] * free + [numbers.random() ** 3 for _ in range(12 - free)]
        flops = [numbers.choice([1.0, 3.0]) for _ in range(12)]
        rates = allot(costs, flops, share)
        assert all(0 <= rate <= max(0.9, 1 - share) for rate in rates)
        computed = sum(f * (1 - rate) for f, rate in zip(flops, rates, strict=True))
        assert computed == pytest.approx(share * sum(flops), rel=1e-12)
        if not min(costs) > 0.0:
            continue  # the greedy one raises those that cost nothing in any order
        greedy = dropbp.allot(dict(enumerate(costs)), flops, share)
        assert max(abs(greedy[i] - rate) for i, rate in enumerate(rates)) < 2e-3


def test_without_costs_the_rates_are_uniform() -> None:
    assert allot([0.0, 0.0], [1.0, 2.0], 0.25) == [0.75, 0.75]


# ---- what is dropped


def test_at_a_share_of_1_nothing_is_registered() -> None:
    model = Stack(PostNorm)
    hooks = len(list(_hooks(model)))
    lwo = attach(model)
    own = len(list(_hooks(model)))
    lwo.detach()
    assert len(list(_hooks(model))) == hooks
    without = attach(model, share=1.0)
    assert without._suffix.state() is None
    assert len(list(_hooks(model))) == own - 3 - 2 * 3  # model, first, last; and each sublayer


def _hooks(model: nn.Module) -> Any:
    for module in model.modules():
        yield from module._forward_hooks
        yield from module._forward_pre_hooks


def test_before_the_sensitivities_are_known_the_rates_are_uniform() -> None:
    lwo = attach(Stack(PreNorm), share=0.25, order="descending")
    seen = set()
    while lwo.active_layer.name != "embed":
        seen |= set(lwo._suffix._dropped)
        assert set(lwo._suffix.rates(lwo.visit).values()) <= {0.75}
        step(lwo)
    assert seen
    assert lwo._suffix.state() is None
    step(lwo)
    assert len(set(lwo._suffix.rates(lwo.visit).values())) > 1


def test_what_is_computed_is_counted_and_meets_the_budget() -> None:
    """Each step's FLOPs fall by those of the dropped sublayers; in expectation by 1 - share."""
    lwo = attach(Stack(PreNorm), share=0.4)
    step(lwo)
    measured = lwo._suffix.state()
    assert measured is not None
    flops, different = measured["flops"], set()
    whole: dict[str, int] = {}
    for _ in range(3 * len(lwo.visits)):
        suffix = lwo._suffix.rates(lwo.visit)
        expected = sum(flops[i] * (1 - rate) for i, rate in suffix.items())
        assert expected == pytest.approx(0.4 * sum(flops[i] for i in suffix), rel=1e-12)
        dropped = set(lwo._suffix._dropped)
        with FlopCounterMode(display=False) as counter:
            loss = lwo.model(TOKENS).logsumexp(-1).sum()
            lwo.backward(loss)
        total = counter.get_total_flops() + sum(flops[i] for i in dropped)
        assert whole.setdefault(lwo.active_layer.name, total) == total
        assert dropped <= set(suffix)
        different.add(frozenset(dropped))
        lwo.step()
    assert len(different) > 3


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_the_flops_of_a_step_are_the_expectation(share: float) -> None:
    model = oracle.tiny_model(tied=False)
    visits = LayerWise().visits(find_layers(model))
    of_sublayer = [12 * flops for flops in dropbp._flops(model)]
    sublayers = find_sublayers(model)
    assert [s.name.rpartition(".")[2] for s in sublayers[:2]] == ["self_attn", "mlp"]
    of_sublayer[::2] = [f - 12 * 2 * 12 * 24 for f in of_sublayer[::2]]  # 4 products, not 5
    saved = [
        (1 - share) * sum(of_sublayer[i] for i in droppable(sublayers, v, drops_trained=False))
        for v in visits
    ]
    whole = flops_per_sequence(model, visits, 12, 12)
    found = flops_per_sequence(model, visits, 12, 12, suffix_backward=share)
    assert found == pytest.approx(whole - sum(saved) / len(visits), rel=1e-12)


def test_micro_batches_of_a_step_make_the_same_choice() -> None:
    """And the sum of their gradients is that of the whole batch."""
    lwos = [attach(Stack(PreNorm).double(), gradient_accumulation_steps=n) for n in (1, 2)]
    step(lwos[0])
    state = {**lwos[0].state_dict(), "step": 0, "active_layer": "embed", "moments": {}}
    for lwo in lwos:
        lwo.load_state_dict(state)
        for layer in lwo.layers:
            lwo.write_layer(lwos[0].read_layer(layer))
    for _ in range(10):
        assert lwos[0]._suffix._dropped == lwos[1]._suffix._dropped
        step(lwos[0])
        for tokens in TOKENS:
            lwos[1].backward(2 * lwos[1].model(tokens[None]).logsumexp(-1).sum())
            lwos[1].step()
    for layer in lwos[0].layers:
        other = lwos[1].read_layer(layer)
        for name, tensor in lwos[0].read_layer(layer).items():
            torch.testing.assert_close(tensor, other[name], rtol=0, atol=1e-12)


def test_activation_checkpointing_changes_nothing() -> None:
    weights = []
    for is_on in (False, True):
        model = oracle.tiny_model(tied=False, dtype=torch.float64).train()
        if is_on:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        lwo = attach(model)
        dropped = 0
        for number in range(14):
            dropped += len(lwo._suffix._dropped)
            lwo.backward(oracle.loss_sum(lwo.model, *oracle.global_batch(number)))
            lwo.step()
        assert dropped > 10
        weights.append([p.detach() for p in model.parameters()])
        lwo.detach()
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_dropout_is_the_same_as_without() -> None:
    """The pass that looks at the model leaves the random numbers as they were."""
    model = Stack(PreNorm)
    torch.manual_seed(1)
    expected = torch.rand(())
    lwo = attach(model)
    torch.manual_seed(1)
    lwo.model(TOKENS)
    assert torch.rand(()) == expected


def test_a_method_that_trains_all_keeps_at_least_one_sublayer() -> None:
    """Adapters alone would have no gradient, and the loss no graph."""
    model = Stack(PreNorm, depth=1)
    lwo = attach(model, share=0.01, method="full")
    for _ in range(10):
        step(lwo)
        assert len(lwo._suffix._dropped) == 1


def test_adapters_in_a_dropped_sublayer_have_no_gradient() -> None:
    peft = pytest.importorskip("peft")
    model = oracle.tiny_model(tied=False)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
    lwo = attach(model, method="lora")
    for number in range(8):
        dropped = set(lwo._suffix._dropped)
        assert len(dropped) < 8
        lwo.backward(oracle.loss_sum(lwo.model, *oracle.global_batch(number)))
        names = {id(p): name for name, p in model.named_parameters()}
        for i, sublayer in enumerate(lwo._suffix._sublayers):
            ups = [
                p.grad
                for p in sublayer.module.parameters()
                if p.requires_grad and "lora_B" in names[id(p)]
            ]
            assert all((g is None or not g.any()) == (i in dropped) for g in ups)
        lwo.step()
    assert dropped


# ---- state


def test_a_state_of_another_model_is_refused() -> None:
    lwo = attach(Stack(PreNorm, depth=3))
    step(lwo)
    state = lwo.state_dict()
    other = attach(Stack(PreNorm, depth=3))
    other.load_state_dict(state)
    assert other._suffix.state() == lwo._suffix.state()
    state["suffix"] = {"flops": [1.0], "changes": [[1.0, 1.0]]}
    with pytest.raises(UserError, match="sensitivities of 1 sublayers, and the model has 6"):
        other.load_state_dict(state)


def test_a_loss_that_is_not_finite_measures_nothing() -> None:
    lwo = attach(Stack(PreNorm))
    lwo.backward(lwo.model(TOKENS).sum() * float("nan"))
    lwo.step()
    assert lwo._suffix.state() is None
    step(lwo)
    assert lwo._suffix.state() is not None


# ---- refusals


@pytest.mark.parametrize(
    ("layer", "match"),
    [
        (PostNorm, r"in layers\.0 the residual does not reach the output unchanged"),
        (TwoParts, r"in layers\.0 the output of fc1 is not added to the residual"),
        (Inside, r"in layers\.0 the residual does not pass by the sublayers"),
        (Gate, r"layers\.0\.gate multiplies no matrices in the forward pass"),
    ],
)
def test_layers_without_a_residual_past_their_sublayers_are_refused(
    layer: type[nn.Module], match: str
) -> None:
    model = Stack(layer)
    before = [p.detach().clone() for p in model.parameters()]
    lwo = attach(model)
    loss = lwo.model(TOKENS).sum()
    with pytest.raises(UserError, match=match):
        lwo.backward(loss)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    attach_again = Stack(layer)
    step(attach(attach_again, share=1.0))


def test_a_scaled_residual_and_norms_after_sublayers_are_allowed() -> None:
    lwo = attach(Stack(Scaled))
    for _ in range(4):
        step(lwo)


def test_other_models_are_refused_at_once() -> None:
    with pytest.raises(UserError, match=r"layers\.0 \(Flat\) has no modules with matrices"):
        attach(Stack(Flat))
    config = BartConfig(
        vocab_size=11,
        d_model=8,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=1,
        decoder_attention_heads=1,
    )
    with pytest.raises(UserError, match="BartForConditionalGeneration is an encoder-decoder"):
        attach(BartForConditionalGeneration(config))


def test_what_only_a_forward_pass_tells_is_refused() -> None:
    model = Stack(Named, by="x")
    lwo = attach(model)
    loss = lwo.model(TOKENS).sum()
    with pytest.raises(UserError, match=r"layers\.0 does not get the hidden states first"):
        lwo.backward(loss)

    model = Stack(PreNorm)
    lwo = attach(model)
    loss = model.head(model.layers[0](model.embed(TOKENS))).sum()
    with pytest.raises(UserError, match=r"no forward pass of lwo\.model"):
        lwo.backward(loss)

    model = Stack(PreNorm)
    for layer in model.layers:
        layer.compile(backend="eager")
    lwo = attach(model)
    loss = lwo.model(TOKENS).sum()
    with pytest.raises(UserError, match="layers are compiled"):
        lwo.backward(loss)


def test_settings_out_of_range_are_refused() -> None:
    for share in (0.0, -0.1, 1.1):
        with pytest.raises(ValueError, match="suffix_backward"):
            lwo_dist.LWOConfig(suffix_backward=share)
