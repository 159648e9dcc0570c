"""Checkpointed and compiled layers train as a plain loop does, or are refused by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    checkpoint_wrapper,
)
from torch.distributed.fsdp import fully_shard

import lwo_dist
from lwo_dist import LWOConfig, UserError
from lwo_dist.names import clean_name
from tests import oracle
from tests.distributed.collectives import CountCollectives
from tests.distributed.raw_loops import (
    assert_equals_plain_loop,
    attach,
    shard,
    tiny_model,
    train_from,
)
from tests.distributed.training import micro_batches, train_step, weights
from tests.ranks import run_ranks

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
