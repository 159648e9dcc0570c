"""The hook in somebody else's loop: what it promises, and what it refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lwo_dist
from lwo_dist import LWOConfig, UserError
from lwo_dist.hook import LWO
from lwo_dist.layers import Layer, Visit
from lwo_dist.methods import Method
from tests import oracle

STEPS_PER_LAYER = 2
HEAD = Layer("a", ("head.bias",))


class Tiny(nn.Module):
    """No Hugging Face model: an embedding, a stack of three layers, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.head = nn.Linear(6, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        for layer in self.layers:
            hidden = hidden + torch.tanh(layer(hidden))
        return self.head(hidden)


def tiny() -> Tiny:
    torch.manual_seed(0)
    return Tiny().double()


def loss_of(model: nn.Module, step: int, rows: slice = slice(None)) -> Tensor:
    tokens = torch.randint(11, (4, 5), generator=torch.Generator().manual_seed(step))[rows]
    logits = model(tokens)[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def attach(model: nn.Module | None = None, **config: Any) -> LWO:
    settings = {"lr": 1e-2, "steps_per_layer": STEPS_PER_LAYER, "max_grad_norm": 0.0} | config
    return lwo_dist.attach(model or tiny(), LWOConfig(**settings))


def train(lwo: LWO, first: int, last: int) -> None:
    for step in range(first, last):
        lwo.backward(loss_of(lwo.model, step))
        lwo.step()


def weights(lwo: LWO) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in lwo.module.named_parameters()}


def plain_loop(
    steps: int, loss_at: Callable[[nn.Module, int], None], rate: Callable[[int], float]
) -> dict[str, Tensor]:
    """Layer by layer in plain torch; `loss_at` does the backward passes of a step."""
    model = tiny()
    names = [layer.name for layer in attach(tiny()).layers]
    groups = {layer.name: layer.parameter_names for layer in attach(tiny()).layers}
    parameters = dict(model.named_parameters())
    for step in range(steps):
        if step % STEPS_PER_LAYER == 0:
            active = groups[names[step // STEPS_PER_LAYER % len(names)]]
            optimizer = torch.optim.AdamW([parameters[n] for n in active], weight_decay=0.0)
        optimizer.param_groups[0]["lr"] = rate(step)
        model.zero_grad()
        loss_at(model, step)
        optimizer.step()
    return {name: p.detach() for name, p in parameters.items()}


def test_five_lines_equal_a_plain_loop() -> None:
    lwo = attach()
    assert [layer.name for layer in lwo.layers] == [
        "embed",
        "layer_0",
        "layer_1",
        "layer_2",
        "head",
    ]
    train(lwo, 0, 13)
    expected = plain_loop(13, lambda m, step: loss_of(m, step).backward(), lambda step: 1e-2)
    torch.testing.assert_close(weights(lwo), expected, rtol=0, atol=1e-13)


def test_the_callers_boundaries_and_rates_count() -> None:
    """Accumulations of 2, 2 and, as at the end of an epoch, 1; the caller divides and schedules."""
    lengths = [2, 2, 1] * 3

    def backward(model: nn.Module, step: int) -> None:
        for part in range(lengths[step]):
            (loss_of(model, step, slice(part, part + 1)) / lengths[step]).backward()

    lwo = attach()
    for step, length in enumerate(lengths):
        for part in range(length):
            loss = loss_of(lwo.model, step, slice(part, part + 1)) / length
            lwo.backward(loss, boundary=part == length - 1)
            report = lwo.step(lr=1e-3 * (step + 1))
            assert report.stepped == (part == length - 1)
        assert report.lr == 1e-3 * (step + 1)
    assert lwo.step_count == len(lengths)
    expected = plain_loop(len(lengths), backward, lambda step: 1e-3 * (step + 1))
    torch.testing.assert_close(weights(lwo), expected, rtol=0, atol=1e-13)


def test_backward_and_step_alternate() -> None:
    lwo = attach()
    with pytest.raises(RuntimeError, match=r"step\(\) without backward"):
        lwo.step()
    lwo.backward(loss_of(lwo.model, 0))
    with pytest.raises(RuntimeError, match=r"called again before step\(\).*accumulate"):
        lwo.backward(loss_of(lwo.model, 0))
    with pytest.raises(RuntimeError, match="inside an accumulation would lose gradients"):
        lwo.state_dict()


class _Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise MemoryError("out of memory")


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_backward_that_failed_may_be_tried_again(accumulation: int) -> None:
    """As a loop does that catches an out-of-memory error and skips the batch."""
    lwo = attach(gradient_accumulation_steps=accumulation)
    for _ in range(accumulation - 1):
        lwo.backward(loss_of(lwo.model, 0))
        lwo.step()
    with pytest.raises(MemoryError):
        lwo.backward(_Fails.apply(loss_of(lwo.model, 0)))
    lwo.backward(loss_of(lwo.model, 0))
    assert lwo.step().stepped
    assert lwo.step_count == 1


def test_before_switch_sees_the_visit_that_is_over() -> None:
    lwo = attach()
    seen = []
    lwo.before_switch = lambda: seen.append((lwo.step_count, lwo.active_layer.name))
    train(lwo, 0, 5)
    assert seen == [(2, "embed"), (4, "layer_0")]
    assert (lwo.active_layer.name, lwo.step_in_visit) == ("layer_1", 1)


def test_a_foreign_loop_pays_for_no_telemetry() -> None:
    """Between steps the hook holds two scalars; in a visit it copies no weights."""
    lwo = attach()
    train(lwo, 0, 1)
    held = [value for value in vars(lwo).values() if isinstance(value, Tensor)]
    held += [v for value in vars(lwo).values() if isinstance(value, list) for v in value]
    assert sum(v.numel() for v in held if isinstance(v, Tensor)) == 2


@pytest.mark.parametrize("order", ["ascending", "descending", "random", "weighted"])
def test_last_changed_is_what_training_changed(order: str) -> None:
    weights_of_layers = {"layer_weights": {"head": 5.0}} if order == "weighted" else {}
    lwo = attach(order=order, **weights_of_layers)
    changed = dict.fromkeys((layer.name for layer in lwo.layers), 0)
    for step in range(24):
        for layer in lwo.layers:
            assert lwo.last_changed(layer) == changed[layer.name]
        train(lwo, step, step + 1)
        changed[lwo.visits[lwo.schedule.active_layer(step)].active.name] = step + 1
    assert lwo.last_changed(lwo.rest) == 0


# ---- layers of one's own


def test_layers_may_be_given() -> None:
    layers = [Layer("low", ("layers.0.weight", "layers.0.bias")), Layer("top", ("head.bias",))]
    lwo = lwo_dist.attach(tiny(), LWOConfig(lr=1e-2, steps_per_layer=1), layers=layers)
    before = weights(lwo)
    train(lwo, 0, 4)
    changed = {name for name, value in weights(lwo).items() if not torch.equal(value, before[name])}
    assert changed == {"layers.0.weight", "layers.0.bias", "head.bias"}
    assert set(lwo.rest.parameter_names) == set(before) - changed


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([], "there are no layers to train; give at least one"),
        ([Layer("a", ())], "layer 'a' has no parameters; leave it out"),
        ([Layer("a", ("head.bias",)), Layer("a", ("head.weight",))], "two layers are named 'a'"),
        ([Layer("a", ("head.gain",))], "'head.gain', which is no parameter of Tiny; use the names"),
        (
            [Layer("a", ("head.bias",)), Layer("b", ("head.bias",))],
            "'head.bias' is in the layers 'a' and 'b'; each parameter belongs to one layer",
        ),
        ([Layer("rest", ("head.bias",))], "a layer is named 'rest'; use letters, digits"),
        ([Layer("a/b", ("head.bias",))], "a layer is named 'a/b'; use letters, digits"),
    ],
)
def test_layers_that_do_not_fit_are_refused(layers: list[Layer], message: str) -> None:
    with pytest.raises(UserError, match=message):
        lwo_dist.attach(tiny(), LWOConfig(), layers=layers)


@pytest.mark.parametrize(
    ("visits", "message"),
    [
        ([], "there are no visits; a method gives at least one"),
        ([Visit(Layer("b", ("head.weight",)))], "names the layer 'b', which the method does not"),
        ([Visit(HEAD, (HEAD,))], r"names a layer twice \(a, a\); name each once"),
    ],
)
def test_visits_that_do_not_fit_are_refused(visits: list[Visit], message: str) -> None:
    class Odd(Method):
        name = "odd"

        def layers(self, model: nn.Module, config: LWOConfig) -> list[Layer]:
            return [HEAD]

        def visits(self, layers: Any) -> list[Visit]:
            return visits

    with pytest.raises(UserError, match=message):
        lwo_dist.attach(tiny(), LWOConfig(lr=1e-3), Odd())


@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed"])
def test_a_strategy_that_the_model_is_not_wrapped_for_is_refused(strategy: str) -> None:
    message = f"strategy='{strategy}' cannot train a Tiny that is wrapped for 'replicate'; leave"
    with pytest.raises(UserError, match=message):
        lwo_dist.attach(tiny(), LWOConfig(), strategy=strategy)


# ---- what it says of itself


def test_repr_says_where_it_stands() -> None:
    lwo = attach()
    train(lwo, 0, 3)
    lines = repr(lwo).splitlines()
    assert lines[0] == (
        "LWO(replicate on 1 rank(s), after 3 steps: layer_0 is active, visit 2, step 2 of 2"
    )
    assert [line.split() for line in lines[1:]] == [
        ["embed", "66", "parameters"],
        ["*", "layer_0", "42", "parameters"],
        ["layer_1", "42", "parameters"],
        ["layer_2", "42", "parameters"],
        ["head", "77", "parameters)"],
    ]


def test_help_documents_every_argument_of_attach() -> None:
    doc = lwo_dist.attach.__doc__ or ""
    for word in ("model:", "config:", "method:", "layers:", "strategy:", "Returns:", "Raises:"):
        assert word in doc
    assert ">>> lwo = lwo_dist.attach(" in doc


# ---- detach


def test_detach_leaves_flags_and_hooks_as_they_were() -> None:
    model = oracle.tiny_model(tied=False, num_layers=2)
    model.model.embed_tokens.weight.requires_grad_(False)
    model.enable_input_require_grads()
    hooks = len(model.model.embed_tokens._forward_hooks)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    lwo = lwo_dist.attach(model, LWOConfig(lr=1e-3, steps_per_layer=1))
    assert len(model.model.embed_tokens._forward_hooks) < hooks
    tokens, labels = oracle.global_batch(0)
    lwo.backward(oracle.loss_sum(model, tokens, labels))
    lwo.step()
    lwo.detach()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(p.grad is None for p in model.parameters())
    assert len(model.model.embed_tokens._forward_hooks) == hooks
    assert repr(lwo) == "LWO(replicate, detached after 1 steps)"
    for call in (lwo.step, lwo.state_dict, lambda: lwo.backward(torch.ones(()))):
        with pytest.raises(RuntimeError, match="was detached from its model; call"):
            call()
    oracle.loss_sum(model, tokens, labels).backward()  # a plain loop trains on
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_attach_again_after_detach_goes_on() -> None:
    lwo = attach()
    train(lwo, 0, 4)
    lwo.detach()
    again = attach(lwo.module)
    train(again, 0, 2)
    unbroken = attach()
    train(unbroken, 0, 4)
    same = tiny()
    same.load_state_dict(unbroken.module.state_dict())
    fresh = attach(same)
    train(fresh, 0, 2)
    torch.testing.assert_close(weights(again), weights(fresh), rtol=0, atol=0)


# ---- state


@pytest.mark.parametrize("state", ["reset", "keep"])
def test_a_run_goes_on_from_its_state(state: str) -> None:
    lwo = attach(state=state)
    train(lwo, 0, 15)
    first = attach(state=state)
    train(first, 0, 13)
    resumed = attach(state=state)
    for layer in [*first.layers, first.rest]:
        resumed.write_layer(first.read_layer(layer))
    resumed.load_state_dict(first.state_dict())
    train(resumed, 13, 15)
    torch.testing.assert_close(weights(resumed), weights(lwo), rtol=0, atol=0)


def _without(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda state: state.pop(key)


def _rename(state: dict[str, Any]) -> None:
    state["moments"]["layers.9.weight"] = state["moments"].pop("layers.0.weight")


def _reshape(state: dict[str, Any]) -> None:
    state["moments"]["layers.0.weight"]["exp_avg"] = torch.zeros(2, 2)


def _lose_second(state: dict[str, Any]) -> None:
    del state["moments"]["layers.0.weight"]["exp_avg_sq"]


def _lose_one(state: dict[str, Any]) -> None:
    del state["moments"]["layers.0.weight"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_without("moments"), "the state has no 'moments'; give what LWO.state_dict"),
        (_without("step"), "the state has no 'step'"),
        (lambda state: state.update(step=7), "trains layer_0 at step 7, this schedule layer_2; "),
        (
            lambda state: state["schedule"].update(steps_per_layer=9),
            "made with steps_per_layer = 9, the model is attached with 2; attach with the same",
        ),
        (
            lambda state: state["schedule"]["layers"].remove("layer_0"),
            r"made with layers = \['embed', 'layer_1'.* attached with \['embed', 'layer_0'",
        ),
        (_rename, "has moments of 'layers.9.weight', which is in none of the trained layers"),
        (
            _reshape,
            r"moments of 'layers.0.weight' have shape \(2, 2\), and the model's is \(6, 6\)",
        ),
        (_lose_second, "the moments of 'layers.0.weight' are exp_avg, step; give step, exp_avg"),
        (_lose_one, "the moments of layer 'layer_0' do not fit: layers.0.weight is missing"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(
    spoil: Callable[[dict[str, Any]], None], message: str
) -> None:
    saved = attach()
    train(saved, 0, 3)
    state = copy.deepcopy(saved.state_dict())
    spoil(state)
    lwo = attach()
    train(lwo, 0, 1)
    before = copy.deepcopy(lwo.state_dict())
    with pytest.raises(UserError, match=message):
        lwo.load_state_dict(state)
    after = lwo.state_dict()
    assert {k: after[k] for k in ("step", "active_layer")} == {"step": 1, "active_layer": "embed"}
    torch.testing.assert_close(after["moments"], before["moments"], rtol=0, atol=0)


def test_weights_that_do_not_fit_are_refused() -> None:
    lwo = attach()
    with pytest.raises(UserError, match=r"the weights name 'x', which this Tiny does not have"):
        lwo.write_layer({"x": torch.zeros(1)})
    with pytest.raises(UserError, match=r"'head.bias' have shape \(3,\), and the model's is \(11,"):
        lwo.write_layer({"head.bias": torch.zeros(3)})


# ---- what the caller has frozen


def changed_by_a_cycle(model: torch.nn.Module, **how: Any) -> tuple[set[str], LWO]:
    """The parameters that a cycle of visits changes, and the hook, detached."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    lwo = lwo_dist.attach(model, LWOConfig(lr=1e-2, steps_per_layer=1), **how)
    for step in range(len(lwo.layers)):
        tokens, labels = oracle.global_batch(step)
        lwo.backward(oracle.loss_sum(model, tokens, labels))
        lwo.step()
    lwo.detach()
    now = dict(model.named_parameters())
    return {name for name, value in before.items() if not torch.equal(value, now[name])}, lwo


@pytest.mark.parametrize("method", ["lwo", "full"])
def test_what_is_frozen_stays_frozen_and_is_said(method: str) -> None:
    model = oracle.tiny_model(tied=False, num_layers=2)
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[1].mlp.up_proj.requires_grad_(False)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    said = f"2 of {len(list(model.parameters()))} parameters are frozen .*model.embed_tokens.weight"
    with pytest.warns(UserWarning, match=said):
        changed, lwo = changed_by_a_cycle(model, method=method)
    assert changed == {name for name, _ in model.named_parameters()} - frozen
    assert "embed" not in [layer.name for layer in lwo.layers]
    assert frozen == {name for name, p in model.named_parameters() if not p.requires_grad}
    # Attached again without detach(), what was merely inactive is trained too.
    with pytest.warns(UserWarning, match=said):
        lwo_dist.attach(model, LWOConfig(lr=1e-2, steps_per_layer=1))
        changed, _ = changed_by_a_cycle(model, method=method)
    assert changed == {name for name, _ in model.named_parameters()} - frozen


def test_of_a_peft_model_the_adapters_are_trained() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        oracle.tiny_model(tied=True, num_layers=2),
        peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
    )
    adapters = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(adapters) == 4
    with pytest.warns(UserWarning, match="are frozen"):
        changed, lwo = changed_by_a_cycle(model)
    assert changed == adapters
    assert [layer.name for layer in lwo.layers] == ["layer_0", "layer_1"]
    assert {name for name, p in model.named_parameters() if p.requires_grad} == adapters


def test_own_layers_do_not_thaw_what_is_frozen() -> None:
    model = oracle.tiny_model(tied=False, num_layers=2)
    model.lm_head.requires_grad_(False)
    names = ("model.norm.weight", "lm_head.weight")
    layers = [lwo_dist.Layer("top", names), lwo_dist.Layer("low", ("model.embed_tokens.weight",))]
    with pytest.warns(UserWarning, match="lm_head.weight"):
        changed, _ = changed_by_a_cycle(model, layers=layers)
    assert changed == {"model.norm.weight", "model.embed_tokens.weight"}
    with pytest.raises(UserError, match="every parameter of the layers to train is frozen"):
        lwo_dist.attach(
            model, LWOConfig(lr=1.0), layers=[lwo_dist.Layer("head", ("lm_head.weight",))]
        )
