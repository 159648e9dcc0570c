"""`batches: cycle`: kept hidden states give the same bits as computing them, or are refused."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lwo_dist
from lwo_dist.config import LWOConfig
from lwo_dist.errors import UserError
from lwo_dist.hook import LWO
from lwo_dist.layers import Layer, Visit, find_layers, find_stacks
from lwo_dist.methods.base import Method
from lwo_dist.prefix import starting_layers
from lwo_dist.schedule import LayerSchedule
from tests import oracle
from tests.families import make

VISIT = 2  # steps
LAYERS = 6  # embed, four layers, head


def attach(model: nn.Module | None = None, layers: list[Layer] | None = None, **config: Any) -> LWO:
    model = model or oracle.tiny_model(tied=False)
    settings = {"lr": 1e-3, "eps": 1e-6, "steps_per_layer": VISIT, "batches": "cycle"}
    return lwo_dist.attach(model.train(), LWOConfig(**(settings | config)), layers=layers)


def one_step(lwo: LWO, batch: int | None = None) -> None:
    tokens, labels = oracle.global_batch(lwo.batch_index if batch is None else batch)
    lwo.backward(oracle.loss_sum(lwo.model, tokens, labels) / 50)
    lwo.step()


def weights(lwo: LWO) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in lwo.module.named_parameters()}


def store_nothing(lwo: LWO) -> LWO:
    """Every forward pass is then computed."""
    assert lwo._prefix is not None
    lwo._prefix._store.put = lambda *_: None  # type: ignore[method-assign]
    return lwo


class Runs:
    """Counts how often each layer of the stack is really run."""

    def __init__(self, model: nn.Module):
        self.layers = list(find_stacks(model)[0].modules)
        self.counts = [0] * len(self.layers)
        for index, layer in enumerate(self.layers):
            layer.register_forward_hook(self._count(index))

    def _count(self, index: int) -> Any:
        def count(*_: Any) -> None:
            self.counts[index] += 1

        return count

    def take(self) -> list[int]:
        counts, self.counts = self.counts, [0] * len(self.layers)
        return counts


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_pass_runs_one_layer_of_the_prefix_and_no_more() -> None:
    lwo = attach()
    runs = Runs(lwo.module)
    one_step(lwo)
    runs.take()  # with the trials before the first step
    one_step(lwo)
    per_visit = [runs.take()]
    for _ in range(LAYERS - 1):
        one_step(lwo)
        one_step(lwo)
        per_visit.append([count // VISIT for count in runs.take()])
    assert per_visit == [
        [1, 1, 1, 1],  # embed
        [1, 1, 1, 1],  # layer_0
        [1, 1, 1, 1],  # layer_1: its input is kept
        [0, 1, 1, 1],  # layer_2
        [0, 0, 1, 1],
        [0, 0, 0, 1],  # head
    ]
    assert lwo.prefix_reused == 3 * VISIT


@pytest.mark.parametrize("tied", [False, True])
def test_equals_the_plain_loop_and_the_same_without_the_store(tied: bool) -> None:
    model = oracle.tiny_model(tied=tied, dtype=torch.float64)
    schedule = LayerSchedule(len(find_layers(model)), VISIT, repeats_batches=True)
    steps = 2 * schedule.steps_per_cycle
    found = []
    for prepare in (lambda lwo: lwo, store_nothing):
        lwo = prepare(attach(oracle.tiny_model(tied=tied, dtype=torch.float64)))
        for _ in range(steps):
            one_step(lwo)
        assert lwo.prefix_reused == (0 if found else 2 * VISIT * (2 if tied else 3))
        found.append(weights(lwo))
    assert equal(*found)

    layers = [layer.parameter_names for layer in find_layers(model)]
    parameters = dict(model.named_parameters())
    for step in range(steps):
        if step % VISIT == 0:
            active = layers[step // VISIT % len(layers)]
            for name, parameter in parameters.items():
                parameter.requires_grad_(name in active)
                parameter.grad = None
            mine = [parameters[name] for name in active]
            optimizer = torch.optim.AdamW(mine, lr=1e-3, eps=1e-6, weight_decay=0.0)
        cycle = step // (VISIT * len(layers))
        tokens, labels = oracle.global_batch(cycle * VISIT + step % VISIT)
        (oracle.loss_sum(model, tokens, labels) / 50).backward()
        nn.utils.clip_grad_norm_(mine, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in parameters.items():
        assert (parameter - found[0][name]).abs().max() < 1e-12, name


def test_neighbours_that_are_trained_together() -> None:
    found = []
    for prepare in (lambda lwo: lwo, store_nothing):
        lwo = prepare(attach(oracle.tiny_model(tied=False, num_layers=5), layers_per_group=2))
        for _ in range(5 * VISIT):
            one_step(lwo)
        found.append(weights(lwo))
    assert equal(*found)
    module = lwo.module
    # embed, layers 0-1, 2-3, 4, head; a visit runs the group of the visit before.
    assert starting_layers(module, lwo.visits) == [0, 0, 0, 2, 4]


def test_operations_of_visits_that_go_back_down() -> None:
    """A border above what a visit changes is not used; the one below may be."""
    model = oracle.tiny_model(tied=False)
    embed, a, b, c, d, head = map(Visit, find_layers(model))
    assert starting_layers(model, [embed, a, b, c, d, head]) == [0, 0, 0, 1, 2, 3]
    assert starting_layers(model, [b, c, a, d]) == [0, 1, 0, 0]
    assert starting_layers(model, [Visit(layer.active, (embed.active,)) for layer in (b, c)]) == [
        0,
        0,
    ]


class UpAndDown(Method):
    """Visits in an order in which a kept border becomes stale."""

    name = "up_and_down"

    def layers(self, model: nn.Module, config: LWOConfig) -> list[Any]:
        return find_layers(model)

    def visits(self, layers: Any) -> list[Visit]:
        return [Visit(layers[i]) for i in (3, 4, 2, 5, 1, 4)]


def test_a_border_above_a_changed_layer_is_never_used() -> None:
    found = []
    for prepare in (lambda lwo: lwo, store_nothing):
        config = LWOConfig(lr=1e-2, steps_per_layer=VISIT, batches="cycle")
        model = oracle.tiny_model(tied=False).train()
        lwo = prepare(lwo_dist.attach(model, config, UpAndDown()))
        for _ in range(6 * VISIT):
            one_step(lwo)
        found.append(weights(lwo))
    assert equal(*found)


def test_evaluation_in_a_visit_neither_reads_nor_writes() -> None:
    def evaluate(lwo: LWO) -> None:
        tokens, labels = oracle.global_batch(lwo.batch_index)
        runs = Runs(lwo.module)
        with torch.no_grad():
            oracle.loss_sum(lwo.model, tokens, labels)
        lwo.model.eval()
        oracle.loss_sum(lwo.model, tokens, labels)
        lwo.model.train()
        assert runs.take() == [2, 2, 2, 2]

    plain, disturbed = attach(), attach()
    for _ in range(LAYERS * VISIT):
        one_step(plain)
        held = len(disturbed._prefix._store)  # type: ignore[union-attr]
        evaluate(disturbed)
        assert len(disturbed._prefix._store) == held  # type: ignore[union-attr]
        one_step(disturbed)
    assert equal(weights(plain), weights(disturbed))
    assert disturbed.prefix_reused == plain.prefix_reused == 3 * VISIT


def test_another_batch_is_computed_and_the_user_is_told() -> None:
    lwo = attach()
    with pytest.warns(UserWarning, match="no batch of the last visit was one of the visit before"):
        for step in range(5 * VISIT):
            one_step(lwo, batch=step)
    assert lwo.prefix_reused == 0


@pytest.mark.parametrize("change", ["mask", "token", "permuted"])
def test_nearly_the_same_batch_is_not_the_same(change: str) -> None:
    tokens, _ = oracle.global_batch(0)
    mask = torch.ones_like(tokens)
    other, other_mask = tokens.clone(), mask.clone()
    if change == "mask":
        other_mask[3, -1] = 0
    elif change == "token":
        other[3, 5] = (other[3, 5] + 1) % 61
    else:
        other = tokens.flip(0)

    def step(tokens: Tensor, mask: Tensor) -> None:
        logits = lwo.model(input_ids=tokens, attention_mask=mask).logits
        lwo.backward(logits.logsumexp(-1).mean())
        lwo.step()

    lwo = attach(steps_per_layer=1)
    for _ in range(3):  # embed, layer_0, layer_1
        step(tokens, mask)
    step(other, other_mask)
    assert lwo.prefix_reused == 0
    lwo = attach(steps_per_layer=1)
    for _ in range(4):
        step(tokens, mask)
    assert lwo.prefix_reused == 1


def test_weights_that_are_written_make_all_borders_stale() -> None:
    found = []
    for prepare in (lambda lwo: lwo, store_nothing):
        lwo = prepare(attach())
        for _ in range(4 * VISIT):
            one_step(lwo)
        name = "model.layers.0.mlp.down_proj.weight"
        lwo.write_layer({name: weights(lwo)[name] * 1.5})
        for _ in range(2 * VISIT):
            one_step(lwo)
        found.append(weights(lwo))
    assert equal(*found)


def test_checkpointing_autocast_and_accumulation_change_no_bit() -> None:
    def run(*, store: bool) -> dict[str, Tensor]:
        lwo = attach(gradient_accumulation_steps=2)
        lwo.model.gradient_checkpointing_enable({"use_reentrant": False})
        if not store:
            store_nothing(lwo)
        micro = 0
        for step in range(2 * LAYERS * VISIT):
            parts = 2 if step % VISIT == 0 else 1  # a short last accumulation
            for part in range(parts):
                tokens, labels = oracle.global_batch(10 * lwo.batch_index + part)
                with torch.autocast("cpu", torch.bfloat16):
                    loss = oracle.loss_sum(lwo.model, tokens, labels) / 50
                lwo.backward(loss, boundary=part == parts - 1)
                lwo.step()
                micro += 1
        assert lwo.prefix_reused == (2 * 3 * 3 if store else 0)
        return weights(lwo)

    assert equal(run(store=True), run(store=False))


def test_autocast_is_part_of_what_a_batch_is() -> None:
    lwo = attach(steps_per_layer=1)
    for step in range(4):
        with torch.autocast("cpu", torch.bfloat16, enabled=step == 3):
            one_step(lwo)
    assert lwo.prefix_reused == 0


def test_resume_in_a_visit_is_exact() -> None:
    whole = attach()
    for _ in range(2 * LAYERS * VISIT):
        one_step(whole)
    first = attach()
    for _ in range(3 * VISIT + 1):  # the input of layer_2 is stored for one of two batches
        one_step(first)
    state, saved = first.state_dict(), weights(first)
    second = attach()
    second.load_state_dict(state)
    second.write_layer(saved)
    for _ in range(2 * LAYERS * VISIT - (3 * VISIT + 1)):
        one_step(second)
    assert equal(weights(whole), weights(second))
    assert second.prefix_reused == (VISIT + 1) + 3 * VISIT


def test_a_failed_pass_leaves_the_layers_as_they_were() -> None:
    lwo = attach()
    for _ in range(4 * VISIT):
        one_step(lwo)
    reference = weights(lwo)
    layers = find_stacks(lwo.module)[0].modules
    tokens, _ = oracle.global_batch(lwo.batch_index)

    def fail(*_: Any) -> None:
        raise MemoryError("in the middle")

    handle = layers[3].register_forward_hook(fail)
    with pytest.raises(MemoryError):
        lwo.model(input_ids=tokens)
    handle.remove()
    assert all(layer._compiled_call_impl is None for layer in layers)
    assert equal(weights(lwo), reference)
    runs = Runs(lwo.module)
    with torch.no_grad():
        lwo.model(input_ids=tokens)
    assert runs.take() == [1, 1, 1, 1]
    one_step(lwo)


def test_detach_and_a_forgotten_hook_leave_nothing_behind() -> None:
    for how in ("detach", "forget"):
        model = oracle.tiny_model(tied=False).train()
        hooks = len(model._forward_hooks)
        lwo = attach(model)
        one_step(lwo)
        if how == "detach":
            lwo.detach()
        del lwo
        assert len(model._forward_hooks) == hooks, how


# ---- what cannot be done is refused before anything trains


def test_dropout_is_refused_by_name() -> None:
    model = make("gpt2", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    model.transformer.drop.p = 0.1
    with pytest.raises(UserError, match=r"^transformer\.drop\.p = 0\.1 is random in training"):
        attach(model)
    model = oracle.tiny_model(tied=False)
    model.model.layers[2].self_attn.attention_dropout = 0.2
    with pytest.raises(UserError, match=r"layers\.2\.self_attn\.attention_dropout = 0\.2 is rand"):
        attach(model)
    model = oracle.tiny_model(tied=False)
    lwo = attach(model)
    for _ in range(VISIT - 1):
        one_step(lwo)
    model.model.layers[1].self_attn.attention_dropout = 0.2
    with pytest.raises(UserError, match="attention_dropout = 0.2"):
        one_step(lwo)


class Strange(nn.Module):
    """A layer that does not only pass hidden states to the next one."""

    def __init__(self, layer: nn.Module, how: str, model: nn.Module):
        super().__init__()
        self.layer = layer
        self.how = how
        object.__setattr__(self, "model", model)

    def forward(self, hidden: Tensor, **kwargs: Any) -> Any:
        output: Tensor = self.layer(hidden, **kwargs)
        if self.how == "random" and self is self.model.model.layers[1]:
            return output + 1e-3 * torch.randn_like(output)
        if self.how == "aside":  # the last layer reads what the first has left
            layers = self.model.model.layers
            if self is layers[0]:
                self.model.kept = output.mean()
            return output + self.model.kept if self is layers[3] else output
        return {"hidden": output} if self.how == "more" else output


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("random", "as they draw random numbers"),
        ("aside", r"without them it fails \(unsupported operand"),
        ("more", "layer 0, a Strange, returns a dict, not its hidden states"),
        ("twice", "layer 0, a Strange, is run twice"),
    ],
)
def test_other_layers_are_refused_at_the_first_pass(how: str, message: str) -> None:
    model = oracle.tiny_model(tied=False)
    layers = model.model.layers
    for index in range(4):
        layers[index] = Strange(layers[index], how, model)
    model.register_forward_pre_hook(lambda model, _: setattr(model, "kept", None))
    if how == "twice":
        first = layers[0]
        layers[1].register_forward_pre_hook(
            lambda _, args, kwargs: ((first(*args, **kwargs),), kwargs), with_kwargs=True
        )
    lwo = attach(model)
    before = weights(lwo)
    with pytest.raises(UserError, match=message):
        one_step(lwo)
    assert lwo.step_count == 0
    assert equal(before, weights(lwo))


def test_encoder_decoders_and_methods_without_switches_are_refused() -> None:
    with pytest.raises(UserError, match=r"it has 2 stacks, encoder\.block and decoder\.block"):
        attach(make("t5"))
    config = LWOConfig(batches="cycle")
    with pytest.raises(UserError, match="no effect with method: full, which never switches"):
        lwo_dist.attach(oracle.tiny_model(tied=False), config, "full")


# ---- the store


def test_the_bounds_hold_and_what_does_not_fit_is_computed(
    tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("LWO_SCRATCH_DIR", str(tmp_path))
    border = 8 * 12 * 24 * 4  # bytes: sequences, tokens, hidden size, fp32
    bounds = {"steps_per_layer": 4, "prefix_host_gb": border / 1e9, "prefix_disk_gb": border / 1e9}
    found = []
    for prepare in (lambda lwo: lwo, store_nothing):
        lwo = prepare(attach(**bounds))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for _ in range(LAYERS * 4):
                one_step(lwo)
                store = lwo._prefix._store
                assert store.host_bytes <= border
                assert store.disk_bytes <= border
                assert list(tmp_path.iterdir()) == []  # no file has a name
        found.append(weights(lwo))
        if prepare is not store_nothing:
            assert lwo.prefix_reused == 3 * 2  # half of the four batches, in three visits
            [warning] = [str(w.message) for w in said if "prefix_host_gb" in str(w.message)]
            assert "only 2 micro-batches of a visit are stored" in warning
    assert equal(*found)


# ---- families


NO_DROPOUT = {
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mixtral", "bloom", "falcon"])
def test_families(family: str) -> None:
    found = []
    for prepare in (lambda lwo: lwo, store_nothing):
        model = make(family, **NO_DROPOUT.get(family, {}))
        lwo = prepare(attach(model, steps_per_layer=1))
        for _ in range(len(lwo.visits)):
            one_step(lwo)
        assert lwo.prefix_reused == (0 if found else len(lwo.visits) - 3)
        found.append(weights(lwo))
    assert equal(*found)


def test_a_weight_used_below_that_counts_as_the_heads_is_trained_exactly() -> None:
    """Of gemma3n the head's visit trains what makes the layers' own inputs."""
    moved = "model.per_layer_model_projection.weight"
    found = []
    for prepare in (lambda lwo: lwo, store_nothing):
        model = make("gemma3n_text", num_kv_shared_layers=0, tie_word_embeddings=False)
        embed, *blocks, head = find_layers(model)
        others = tuple(name for name in embed.parameter_names if name != moved)
        layers = [
            replace(embed, parameter_names=others),
            *blocks,
            replace(head, parameter_names=(*head.parameter_names, moved)),
        ]
        lwo = prepare(attach(model, layers, steps_per_layer=1))
        for _ in range(len(lwo.visits) - 1):
            one_step(lwo)
        before = weights(lwo)
        assert lwo.active_layer.name == "head"
        one_step(lwo)
        assert lwo.prefix_reused == (0 if found else 2)  # in the visits of layer_2 and layer_3
        found.append(weights(lwo))
    assert equal(*found)
    assert not torch.equal(found[0][moved], before[moved])
