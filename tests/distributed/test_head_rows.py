"""`lwo.head_rows: batch`: equal to a plain loop however the batch is divided, resumed, refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import lwo_dist
from lwo_dist import LWOConfig
from lwo_dist.driver import prepare
from lwo_dist.errors import UserError
from lwo_dist.layers import Layer, Visit, find_layers
from lwo_dist.methods.lwo import LayerWise
from tests import families, oracle
from tests.distributed import test_run, training, zero
from tests.distributed.test_rooms import WEIGHTS, whole_run
from tests.distributed.test_run import make_config, stop_after
from tests.distributed.test_stateless import make_model
from tests.ranks import RanksError, run_ranks

inputs = test_run.inputs
RECIPE = oracle.Recipe(steps=12, steps_per_layer=2, max_grad_norm=0.5, lr=2e-3)
IN_PARTS = oracle.Recipe(steps=12, steps_per_layer=2, max_grad_norm=0.5, lr=2e-3, accumulation=2)


def plain_loop(*, tied: bool, embeddings: str, rows: str) -> tuple[list[float], dict[str, Tensor]]:
    """The active layer, and the embedding and the head with `always`; rows of absent tokens have a
    gradient of 0.
    """
    model = make_model(tied)
    parameters = dict(model.named_parameters())
    layers = find_layers(model)
    always = [layer for layer in layers if layer.is_outside] if embeddings == "always" else []
    visited = [layer for layer in layers if layer not in always]
    head = model.get_output_embeddings().weight
    losses: list[float] = []
    optimizers: dict[str, torch.optim.Optimizer] = {}
    for step in range(RECIPE.steps):
        if step % RECIPE.steps_per_layer == 0:
            active = visited[step // RECIPE.steps_per_layer % len(visited)]
            fresh = [active] if step else [active, *always]
            optimizers |= {
                layer.name: torch.optim.AdamW(
                    [parameters[name] for name in layer.parameter_names],
                    lr=RECIPE.lr,
                    eps=RECIPE.eps,
                    weight_decay=0.01,
                )
                for layer in fresh
            }
            mine = [parameters[n] for layer in (active, *always) for n in layer.parameter_names]
        tokens, labels = oracle.global_batch(step)
        loss = oracle.loss_sum(model, tokens, labels) / (labels[:, 1:] != -100).sum()
        model.zero_grad()
        loss.backward()
        if rows == "batch":
            absent = sorted(set(range(61)) - set(tokens.flatten().tolist()))
            assert absent and head.grad is not None and head.grad[absent].abs().min() > 0
            head.grad[absent] = 0
        nn.utils.clip_grad_norm_(mine, RECIPE.max_grad_norm)
        for layer in (active, *always):
            optimizers[layer.name].step()
        losses.append(loss.item())
    return losses, {name: p.detach() for name, p in parameters.items()}


def hook_loop(
    strategy: str, tied: bool, embeddings: str, accumulation: int
) -> tuple[list[float], dict[str, Tensor]]:
    recipe = RECIPE if accumulation == 1 else IN_PARTS
    model = make_model(tied)
    if strategy == "hybrid":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        fully_shard(model, mesh=mesh)
    lwo = training.attach(
        strategy,
        recipe,
        tied=tied,
        dtype=torch.float64,
        model=model,
        embeddings=embeddings,
        head_rows="batch",
    )
    return training.train(lwo, recipe.steps)


@pytest.mark.parametrize(
    ("strategy", "world_size", "tied", "embeddings", "accumulation"),
    [
        ("replicate", 1, True, "always", 1),
        ("replicate", 1, False, "visit", 2),
        ("replicate", 2, True, "visit", 1),
        ("replicate", 2, False, "always", 2),
        ("replicate", 3, True, "always", 1),
        ("fsdp", 1, True, "visit", 1),
        ("fsdp", 2, True, "always", 2),
        ("fsdp", 2, False, "visit", 1),
        ("fsdp", 3, False, "always", 1),
        ("hybrid", 4, True, "always", 1),
    ],
)
def test_only_rows_of_tokens_in_the_batch_get_a_gradient(
    strategy: str, world_size: int, tied: bool, embeddings: str, accumulation: int
) -> None:
    expected, expected_weights = plain_loop(tied=tied, embeddings=embeddings, rows="batch")
    ranks = run_ranks(hook_loop, world_size, strategy, tied, embeddings, accumulation)
    for losses, found in ranks:
        assert losses == pytest.approx(expected, abs=1e-10)
        for name, tensor in expected_weights.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-9)
    other, _ = plain_loop(tied=tied, embeddings=embeddings, rows="all")
    assert max(abs(a - b) for a, b in zip(expected, other, strict=True)) > 1e-6


@pytest.mark.parametrize("strategy", ["replicate", "fsdp"])
def test_a_run_resumes_bit_for_bit(
    strategy: str, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    overrides = ["lwo.head_rows=batch", "lwo.embeddings=always", "lwo.state=keep"]
    overrides += [f"strategy={strategy}", "cluster.num_workers=2"]
    overrides += ["train.logging_steps=1", "checkpoint.steps=4"]
    whole = prepare(make_config(inputs, tmp_path / "whole", *overrides))
    unbroken = run_ranks(whole_run, 2, whole)[0]
    broken = prepare(make_config(inputs, tmp_path / "broken", *overrides))
    with pytest.raises(RanksError, match="InterruptedError"):
        run_ranks(stop_after, 2, broken, 4)
    resumed = run_ranks(whole_run, 2, broken)[0]
    assert min(resumed) == 5
    assert resumed == {step: unbroken[step] for step in resumed}
    models = [load_file(tmp_path / of / "r" / "model" / WEIGHTS) for of in ("whole", "broken")]
    for name, tensor in models[0].items():
        assert torch.equal(tensor, models[1][name]), name
    other = [item for item in overrides if not item.startswith("lwo.head_rows")]
    with pytest.raises(RanksError, match=r"made with lwo\.head_rows = batch, and now it is all"):
        run_ranks(whole_run, 2, prepare(make_config(inputs, tmp_path / "broken", *other)))


def test_a_skipped_or_evaluated_batch_leaves_no_tokens_behind() -> None:
    """Rows that only earlier steps or passes without gradient have seen stay as they are."""
    model = oracle.tiny_model(tied=True)
    config = LWOConfig(lr=1e-2, embeddings="always", head_rows="batch", steps_per_layer=3)
    lwo = lwo_dist.attach(model, config)
    weight = model.get_input_embeddings().weight
    first = torch.arange(30)[None]
    loss = lwo.model(input_ids=first, labels=first).loss
    lwo.backward(loss * torch.nan)
    assert lwo.step().skipped == 1.0
    with torch.no_grad():
        lwo.model(input_ids=first)
    before = weight.detach().clone()
    second = torch.arange(30, 50)[None]
    lwo.backward(lwo.model(input_ids=second, labels=second).loss)
    lwo.step()
    changed = (weight.detach() != before).any(1)
    assert changed.nonzero().flatten().tolist() == list(range(30, 50))
    lwo.detach()
    embedding = model.get_input_embeddings()
    assert not embedding._forward_pre_hooks


def test_passes_that_start_at_kept_hidden_states_count_too() -> None:
    model = oracle.tiny_model(tied=False)
    config = LWOConfig(lr=1e-2, head_rows="batch", batches="cycle", steps_per_layer=2)
    lwo = lwo_dist.attach(model, config)
    head = model.get_output_embeddings().weight
    before = head.detach().clone()
    for _ in range(12):  # a cycle: the head comes last
        tokens = torch.arange(20)[None] + 10 * lwo.batch_index
        lwo.backward(lwo.model(input_ids=tokens, labels=tokens).loss)
        lwo.step()
    assert lwo.prefix_reused > 0
    changed = (head.detach() != before).any(1)
    assert changed.nonzero().flatten().tolist() == list(range(30))


@pytest.mark.parametrize("family", ["t5", "bart", "marian"])
def test_an_encoder_decoder_has_the_tokens_of_both_sides(family: str) -> None:
    model = families.make(family, torch.float64)
    lwo = lwo_dist.attach(model, LWOConfig(lr=1e-2, embeddings="always", head_rows="batch"))
    head = model.get_output_embeddings().weight
    before = head.detach().clone()
    labels = torch.tensor([[20, 21, 22, 1, -100]])
    output = lwo.model(input_ids=torch.arange(5, 9)[None], labels=labels)
    lwo.backward(output.loss)
    lwo.step()
    changed = set((head.detach() != before).any(1).nonzero().flatten().tolist())
    start = {model.config.decoder_start_token_id, model.config.pad_token_id}
    assert {5, 6, 7, 8, 20, 21, 22, 1} <= changed <= {5, 6, 7, 8, 20, 21, 22, 1} | start


def test_tokens_of_a_pass_that_is_not_used_are_dropped_with_the_state() -> None:
    model = oracle.tiny_model(tied=True)
    lwo = lwo_dist.attach(model, LWOConfig(embeddings="always", head_rows="batch"))
    state = lwo.state_dict()
    lwo.model(input_ids=torch.arange(40, 50)[None])
    lwo.load_state_dict(state)
    weight = model.get_input_embeddings().weight
    before = weight.detach().clone()
    model.eval()  # switches dropout off, and no more
    tokens = torch.arange(10)[None]
    lwo.backward(lwo.model(input_ids=tokens, labels=tokens).loss)
    lwo.step()
    assert (weight.detach() != before).any(1).nonzero().flatten().tolist() == list(range(10))


def test_a_pass_without_tokens_is_an_error() -> None:
    model = oracle.tiny_model(tied=True)
    lwo = lwo_dist.attach(model, LWOConfig(embeddings="always", head_rows="batch"))
    with pytest.raises(RuntimeError, match="pass input_ids instead of inputs_embeds"):
        lwo.model(inputs_embeds=torch.randn(1, 12, 24))
    hidden = model.model.norm(torch.randn(1, 12, 24))
    lwo.backward(model.lm_head(hidden).square().mean())
    with pytest.raises(RuntimeError, match="pass input_ids instead of inputs_embeds"):
        lwo.step()


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(UserError, match="has no effect, as no step trains the head"):
        lwo_dist.attach(
            oracle.tiny_model(tied=True),
            LWOConfig(head_rows="batch", train_embeddings=False, train_head=False),
        )

    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    class HeadWithoutState(LayerWise):
        def cycle(self, layers: Sequence[Layer], config: LWOConfig) -> list[Visit]:
            return [Visit(layer, stateless=tuple(layers[-1:])) for layer in layers[:-1]] + [
                Visit(layers[-1])
            ]

    config = LWOConfig(head_rows="batch")
    with pytest.raises(UserError, match="head, which holds the head, is trained without"):
        lwo_dist.attach(oracle.tiny_model(tied=False), config, HeadWithoutState())
    compiled = oracle.tiny_model(tied=True)
    compiled.model.compile(backend="eager")
    with pytest.raises(UserError, match="where the embedding is part of a compiled module"):
        lwo_dist.attach(compiled, config, "full")
    adapted = get_peft_model(
        oracle.tiny_model(tied=False), LoraConfig(r=4, target_modules=["q_proj", "lm_head"])
    )
    with pytest.raises(UserError, match="has no effect, as no step trains the head"):
        lwo_dist.attach(adapted, config, "lora")
    with pytest.raises(UserError, match=r"Bare has no get_input_embeddings\(\)"):
        lwo_dist.attach(Bare(), LWOConfig(head_rows="batch"))


def with_an_all_reduce_of_the_callers_own() -> None:
    lwo = training.attach(
        "fsdp", RECIPE, tied=True, dtype=torch.float32, embeddings="always", head_rows="batch"
    )
    root: Any = lwo.module
    root.set_all_reduce_hook(_nothing)
    with pytest.raises(UserError, match="batch cannot be used with set_all_reduce_hook"):
        training.train_step(lwo, 0)
    lwo.detach(drop_gradients=True)
    with pytest.raises(UserError, match="batch cannot be used with set_all_reduce_hook"):
        lwo_dist.attach(root, lwo.config)


def _nothing(_: Tensor) -> None:
    pass


def test_tokens_of_ranks_outside_of_the_mesh_are_not_left_out_silently() -> None:
    run_ranks(with_an_all_reduce_of_the_callers_own, 1)


def in_zero() -> None:
    with pytest.raises(UserError, match="batch cannot be used with strategy: deepspeed"):
        zero.attach_engine(2, RECIPE, tied=True, config={"head_rows": "batch"})
    with pytest.raises(UserError, match="batch cannot be used with strategy: deepspeed"):
        lwo_dist.prepare(oracle.tiny_model(tied=True), LWOConfig(head_rows="batch"))


def test_deepspeed_is_refused() -> None:
    run_ranks(in_zero, 1, deepspeed=True)
