"""Models that the caller has sharded, wrapped or compiled in ways of his own: they train as a plain
loop does, or are refused by name.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    checkpoint_wrapper,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

import lwo_dist
from lwo_dist import LWO, LWOConfig, UserError
from lwo_dist.layers import find_layers
from lwo_dist.names import clean_name
from tests import oracle
from tests.distributed.collectives import CountCollectives
from tests.distributed.training import micro_batches, train, train_step, weights
from tests.ranks import run_ranks

# Every layer once, and the lowest again; each visit has a second step, which uses its moments.
RECIPE = oracle.Recipe(steps=14, steps_per_layer=2, max_grad_norm=0.5)
TOLERANCE = 1e-10


def attach(model: nn.Module, **config: Any) -> LWO:
    settings = {
        "lr": RECIPE.lr,
        "eps": RECIPE.eps,
        "weight_decay": 0.01,
        "max_grad_norm": RECIPE.max_grad_norm,
        "steps_per_layer": RECIPE.steps_per_layer,
    }
    return lwo_dist.attach(model, LWOConfig(**{**settings, **config}))


def tiny_model(*, tied: bool) -> Any:
    return oracle.tiny_model(tied=tied, dtype=torch.float64)


def shard(model: Any, **options: Any) -> Any:
    """A group for each layer, and the rest in the root's, as most people do it."""
    for layer in model.model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def assert_equals_plain_loop(
    found: dict[str, Tensor], *, tied: bool, case: str, recipe: oracle.Recipe = RECIPE
) -> None:
    model = tiny_model(tied=tied)
    layers = [layer.parameter_names for layer in find_layers(model)]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    oracle.train(model, layers, recipe)
    assert found.keys() == before.keys(), case
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[name]), name
        difference = (parameter.detach() - found[name]).abs().max().item()
        assert difference < TOLERANCE, f"{case}: {name} differs by {difference}"


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
    model = shard(tiny_model(tied=True), mesh=hybrid(replicas))
    lwo = attach(model, state="keep")
    counts = [counted_step(lwo, step) for step in range(7)]
    state = lwo.state_dict()
    saved = weights(lwo)
    train_from(lwo, 7)
    other = attach(shard(tiny_model(tied=True), mesh=hybrid(replicas)), state="keep")
    other.write_layer(saved)
    other.load_state_dict(state)
    train_from(other, 7)
    return weights(lwo), weights(other), all(counts), sorted(state["moments"])


def train_from(lwo: LWO, start: int) -> None:
    for step in range(start, RECIPE.steps):
        train_step(lwo, step)


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


# ---- wrappers


def checkpointed(model: Any, implementation: Any = CheckpointImpl.NO_REENTRANT) -> Any:
    layers = model.model.layers
    for i, layer in enumerate(layers):
        layers[i] = checkpoint_wrapper(layer, checkpoint_impl=implementation)
    return model


def compiled(model: Any) -> Any:
    layers = model.model.layers
    for i, layer in enumerate(layers):
        layers[i] = torch.compile(layer, backend="aot_eager")
    return model


def compiled_in_place(model: Any) -> Any:
    for layer in model.model.layers:
        layer.compile(backend="aot_eager")
    return model


def checkpointed_after_sharding(model: Any) -> Any:
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(checkpointed(model))


def compiled_after_sharding(model: Any) -> Any:
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(compiled(model))


WRAPPED: dict[str, Callable[[Any], Any]] = {
    "checkpoint_wrapper": checkpointed,
    "checkpoint_wrapper, fsdp": lambda model: shard(checkpointed(model)),
    "checkpoint_wrapper of sharded layers": checkpointed_after_sharding,
    "compiled": compiled,
    "compiled, fsdp": lambda model: shard(compiled(model)),
    "compiled of sharded layers": compiled_after_sharding,
    "compiled in place": compiled_in_place,
    "compiled in place, fsdp": lambda model: shard(compiled_in_place(model)),
    "both": lambda model: checkpointed(compiled(model)),
}


def train_wrapped(names: Iterable[str]) -> dict[str, dict[str, Tensor]]:
    """Half of the steps by a wrapped model, the rest by a plain one that goes on with its state."""
    found = {}
    for name in names:
        torch._dynamo.reset()
        lwo = attach(WRAPPED[name](tiny_model(tied=False)))
        for step in range(7):
            train_step(lwo, step)
        state = lwo.state_dict()
        raw_names = [raw for raw, _ in lwo.module.named_parameters()]
        saved = {raw: weights(lwo)[clean_name(raw)] for raw in raw_names}
        plain = attach(tiny_model(tied=False))
        plain.write_layer(saved)
        plain.load_state_dict(state)
        train_from(plain, 7)
        # And back, with the clean names of the plain model.
        lwo.write_layer(weights(plain))
        lwo.load_state_dict(plain.state_dict())
        found[name] = weights(lwo)
    return found


@pytest.mark.parametrize("kind", ["checkpoint", "compile"])
def test_wrapped_layers_train_as_a_plain_loop(kind: str) -> None:
    names = [name for name in WRAPPED if name.startswith("checkpoint") == (kind == "checkpoint")]
    for name, found in run_ranks(train_wrapped, 2, names, timeout=300)[0].items():
        assert_equals_plain_loop(found, tied=False, case=name)


def test_layers_may_be_named_as_the_wrapped_model_names_them() -> None:
    model = checkpointed(tiny_model(tied=False))
    names = [name for name, _ in model.named_parameters() if ".layers.2." in name]
    assert all("_checkpoint_wrapped_module" in name for name in names)
    lwo = lwo_dist.attach(model, LWOConfig(), layers=[lwo_dist.Layer("third", tuple(names))])
    assert lwo.layers[0].parameter_names == tuple(map(clean_name, names))
    assert not any("_checkpoint_wrapped_module" in name for name in lwo.rest.parameter_names)
    assert lwo.read_layer(lwo.rest).keys() == set(lwo.rest.parameter_names)


def test_a_model_compiled_as_a_whole_is_refused() -> None:
    def in_place(part: str) -> Any:
        model = tiny_model(tied=True)
        model.get_submodule(part).compile(backend="aot_eager")
        return model

    whole = torch.compile(tiny_model(tied=True), backend="aot_eager")
    for model in (whole, in_place(""), in_place("model")):
        with pytest.raises(UserError, match=r"for layer in model\.model\.layers: layer\.compile"):
            lwo_dist.attach(model, LWOConfig())
    lwo_dist.attach(in_place(""), LWOConfig(), "full")  # which never switches


# ---- activation checkpointing that is switched on after `attach`


def enabled_late(sharded: bool, how: str) -> tuple[dict[str, Tensor], bool, int, bool]:
    """Weights; with the head active, whether backward goes below it and how much it gathers;
    whether `detach` restores.
    """
    model = tiny_model(tied=False)
    if sharded:
        shard(model, reshard_after_forward=True)
    lwo = attach(model)
    train_step(lwo, 0)
    model.train()
    if how == "checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        model.enable_input_require_grads()
    for step in range(1, 10):
        train_step(lwo, step)
    assert lwo.active_layer.name == "head"
    tokens, labels = micro_batches(10, 1)[0]
    total = (oracle.global_batch(10)[1][:, 1:] != -100).sum()
    below: list[bool] = []
    hook = model.model.layers[-1].register_forward_hook(
        lambda module, inputs, output: below.append(output.requires_grad)
    )
    loss = oracle.loss_sum(lwo.model, tokens, labels) / total * dist.get_world_size()
    hook.remove()
    with CountCollectives() as counter:
        lwo.backward(loss)
    lwo.step()
    train_from(lwo, 11)
    found = weights(lwo)
    lwo.detach()
    hooks = model.model.embed_tokens._forward_hooks.values()
    restored = any("require_grad" in hook.__name__ for hook in hooks)
    return found, below[0], counter.number("all_gather"), restored


@pytest.mark.parametrize("how", ["checkpointing", "input gradients"])
@pytest.mark.parametrize("sharded", [False, True])
def test_checkpointing_may_be_enabled_after_attach(sharded: bool, how: str) -> None:
    found, below, gathers, restored = run_ranks(enabled_late, 2, sharded, how)[0]
    assert_equals_plain_loop(found, tied=False, case=how)
    assert not below
    assert gathers == sharded  # the root, which has the head
    assert restored


def late_refusal(sharded: bool, how: str) -> str:
    model = tiny_model(tied=True)
    if sharded:
        shard(model)
    lwo = attach(model)
    train_step(lwo, 0)
    model.train()
    if how == "transformers":
        model.gradient_checkpointing_enable({"use_reentrant": True})
    else:
        checkpointed(model, CheckpointImpl.REENTRANT)
    with pytest.raises(UserError) as caught:
        train_step(lwo, 1)
    return str(caught.value)


@pytest.mark.parametrize("how", ["transformers", "wrapper"])
@pytest.mark.parametrize("sharded", [False, True])
def test_checkpointing_that_becomes_reentrant_is_refused_at_the_next_step(
    sharded: bool, how: str
) -> None:
    for message in run_ranks(late_refusal, 2, sharded, how):
        assert "layers.0 is reentrant" in message or how == "transformers"
        assert "is reentrant, which loses the active layer's gradients" in message


def test_a_reentrant_wrapper_is_refused() -> None:
    model = checkpointed(tiny_model(tied=True), CheckpointImpl.REENTRANT)
    with pytest.raises(UserError, match=r"layers\.0 is reentrant.*CheckpointImpl\.NO_REENTRANT"):
        lwo_dist.attach(model, LWOConfig())


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


def replaced(how: str) -> str:
    lwo = attach(shard(tiny_model(tied=True)))
    train_step(lwo, 0)
    if how == "moved":
        lwo.module._apply(torch.clone)  # as `to(device)` does
    else:
        lwo.module.load_state_dict(
            {name: tensor.clone() for name, tensor in lwo.module.state_dict().items()}, assign=True
        )
    with pytest.raises(UserError) as caught:
        train_step(lwo, 1)
    return str(caught.value)


@pytest.mark.parametrize("how", ["moved", "assigned"])
def test_parameters_replaced_after_attach_are_refused_at_the_next_step(how: str) -> None:
    for message in run_ranks(replaced, 2, how):
        assert "model.embed_tokens.weight was replaced or moved after attach" in message


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
        assert "initial weights differ between rank 0 and rank 1" in found["seeds"]
        assert "torch.compile was called on the model as a whole" in found["whole"]
        assert all("\n" not in line for line in found.values())
