"""`lwo.stateless`, `lwo.embeddings: always`: equal to a plain loop, counted, resumed, refused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import rms_norm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

import lwo_dist
from lwo_dist import distributed
from lwo_dist.driver import prepare
from lwo_dist.errors import UserError
from lwo_dist.layers import Layer, Visit, find_layers
from lwo_dist.methods.lwo import LayerWise
from lwo_dist.plan.held import Storage, held_bytes
from tests import oracle
from tests.benchmarks.peaks import compare
from tests.distributed import test_run, training, zero
from tests.distributed.test_rooms import WEIGHTS, whole_run
from tests.distributed.test_run import make_config, stop_after
from tests.ranks import RanksError, run_ranks

inputs = test_run.inputs
RECIPE = oracle.Recipe(steps=14, steps_per_layer=2, max_grad_norm=0.5, lr=2e-3)
DTYPE = torch.float64


def make_model(tied: bool) -> nn.Module:
    """With norms in float64. The model's own compute in float32, and the iterations make the small
    parts of a gradient up to 19 times larger, their rounding errors too.
    """
    model = oracle.tiny_model(tied=tied, dtype=DTYPE)
    for norm in model.modules():
        if isinstance(norm, Qwen2RMSNorm):
            norm.forward = partial(_norm, norm)
    return model


def _norm(norm: Any, x: Tensor) -> Tensor:
    return rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)


def newton_schulz(gradient: Tensor) -> Tensor:
    """The iteration on one matrix, written out, scaled to entries near 1."""
    x = gradient / gradient.norm() / 1.02
    wide = x.T if x.shape[0] > x.shape[1] else x
    gram = wide @ wide.T
    wide = 7.0441 * wide - 19.4937 * gram @ wide + 14.169 * gram @ gram @ wide
    gram = wide @ wide.T
    wide = 2.7004 * wide - 2.0091 * gram @ wide + 0.4562 * gram @ gram @ wide
    x = wide.T if x.shape[0] > x.shape[1] else wide
    return x * math.sqrt(max(x.shape))


def plain_loop(
    *, tied: bool, stateless: str, embeddings: str, every: int = 1
) -> tuple[list[float], dict[str, Tensor]]:
    """AdamW on the active layer, fresh in each visit, and, if they are always trained, on the
    embedding and the head, which go on; the others move by their gradient alone.
    """
    model = make_model(tied)
    parameters = dict(model.named_parameters())
    layers = find_layers(model)
    outside = [layer for layer in layers if layer.name in ("embed", "head", "embed_head")]
    inside = [layer for layer in layers if layer not in outside]
    always = outside if embeddings == "always" else []
    visited = inside if embeddings == "always" else layers
    moves = {
        "none": lambda layer, active: False,
        "suffix": lambda layer, active: layer.depth > active.depth,
        "all": lambda layer, active: True,
    }[stateless]
    losses = []
    optimizers: dict[str, torch.optim.Optimizer] = {}
    for step in range(RECIPE.steps):
        active = visited[step // RECIPE.steps_per_layer % len(visited)]
        if step % RECIPE.steps_per_layer == 0:
            optimizers = {layer.name: optimizers[layer.name] for layer in always if step}
        for layer in (active, *always):
            if layer.name not in optimizers:
                optimizers[layer.name] = torch.optim.AdamW(
                    [parameters[name] for name in layer.parameter_names],
                    lr=RECIPE.lr,
                    eps=RECIPE.eps,
                    weight_decay=0.01,
                )
        others = [
            parameters[name]
            for layer in inside
            if layer is not active
            and moves(layer, active)
            and (layers.index(layer) - layers.index(active)) % every == 0
            for name in layer.parameter_names
        ]
        tokens, labels = oracle.global_batch(step)
        loss = oracle.loss_sum(model, tokens, labels) / (labels[:, 1:] != -100).sum()
        model.zero_grad()
        loss.backward()
        mine = [parameters[name] for layer in (active, *always) for name in layer.parameter_names]
        nn.utils.clip_grad_norm_(mine, RECIPE.max_grad_norm)
        for optimizer in optimizers.values():
            optimizer.step()
        with torch.no_grad():
            for weight in others:
                if weight.dim() == 2 and weight.grad is not None:
                    way = newton_schulz(weight.grad)
                    weight -= RECIPE.lr * (way + 0.01 * weight)
        losses.append(loss.item())
    return losses, {name: p.detach() for name, p in parameters.items()}


def attached(
    tied: bool,
    stateless: str,
    embeddings: str,
    strategy: str = "replicate",
    *,
    model: nn.Module | None = None,
    **more: Any,
) -> lwo_dist.LWO:
    return training.attach(
        strategy,
        RECIPE,
        tied=tied,
        dtype=DTYPE,
        model=model or make_model(tied),
        stateless=stateless,
        embeddings=embeddings,
        **{"order": "ascending", "state": "reset", "head_rows": "all"} | more,
    )


def hook_loop(
    strategy: str, tied: bool, stateless: str, embeddings: str, every: int = 1
) -> tuple[list[float], dict[str, Tensor]]:
    lwo = attached(tied, stateless, embeddings, strategy, stateless_every=every)
    shapes = {name: tuple(p.shape) for name, p in lwo.module.named_parameters()}
    storage = Storage(strategy, distributed.world_size())
    losses = []
    for step in range(RECIPE.steps):
        visit = lwo.visit
        numel = sum(
            math.prod(shapes[name]) for layer in visit.layers for name in layer.parameter_names
        )
        loss, report = training.train_step(lwo, step)
        losses.append(loss)
        if storage.world_size > 1 and strategy == "replicate":  # padding besides
            assert 2 * 8 * numel <= report.bytes_sent <= 2 * 8 * (numel + 8 * len(shapes))
        if not report.switched:
            held, formula = (
                lwo.memory(),
                held_bytes(shapes, lwo.layers, visit.stateful, storage, visit.stateless),
            )
            for key in ("gradient_bytes", "optimizer_state_bytes"):
                expected = 2 * getattr(formula, key)  # of 8 bytes, not 4
                # FSDP2 gives the ranks at the end fewer rows.
                fewer = strategy == "fsdp" and distributed.rank() > 0
                assert held[key] <= expected if fewer else held[key] == expected, key
        for layer in lwo.layers:
            assert (lwo.last_changed(layer) == step + 1) == (layer in visit.layers)
    return losses, training.weights(lwo)


COMBINATIONS = [("suffix", "visit"), ("all", "always"), ("suffix", "always"), ("all", "visit")]


@pytest.mark.parametrize(
    ("strategy", "world_size", "tied", "stateless", "embeddings"),
    [
        ("replicate", size, tied, *both)
        for size in (1, 2)
        for tied in (True, False)
        for both in COMBINATIONS
    ]
    + [("fsdp", 2, number % 2 == 0, *both) for number, both in enumerate(COMBINATIONS)]
    + [("replicate", 3, False, "all", "always"), ("fsdp", 3, False, "all", "always")]
    + [("fsdp", 1, True, "all", "always")],
)
def test_layers_without_state_equal_a_plain_loop(
    strategy: str, world_size: int, tied: bool, stateless: str, embeddings: str
) -> None:
    expected, expected_weights = plain_loop(tied=tied, stateless=stateless, embeddings=embeddings)
    for losses, found in run_ranks(hook_loop, world_size, strategy, tied, stateless, embeddings):
        assert losses == pytest.approx(expected, abs=1e-10)
        for name, tensor in expected_weights.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("strategy", "world_size", "stateless", "embeddings", "every"),
    [
        ("replicate", 1, "all", "always", 2),
        ("replicate", 2, "all", "visit", 2),
        ("replicate", 2, "suffix", "always", 3),
        ("fsdp", 2, "all", "always", 2),
    ],
)
def test_every_second_layer_without_state_equals_a_plain_loop(
    strategy: str, world_size: int, stateless: str, embeddings: str, every: int
) -> None:
    expected, expected_weights = plain_loop(
        tied=False, stateless=stateless, embeddings=embeddings, every=every
    )
    ranks = run_ranks(hook_loop, world_size, strategy, False, stateless, embeddings, every)
    for losses, found in ranks:
        assert losses == pytest.approx(expected, abs=1e-10)
        for name, tensor in expected_weights.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-9)


def test_which_layers_move_beside_the_active_one() -> None:
    lwo = attached(False, "all", "visit", stateless_every=2)
    moving = {v.active.name: [layer.name for layer in v.stateless] for v in lwo.visits}
    assert moving == {
        "embed": ["layer_1", "layer_3"],
        "layer_0": ["layer_2"],
        "layer_1": ["layer_3"],
        "layer_2": ["layer_0"],
        "layer_3": ["layer_1"],
        "head": ["layer_0", "layer_2"],
    }
    state = lwo.state_dict()
    lwo.detach()
    other = attached(False, "all", "visit", stateless_every=3)
    with pytest.raises(UserError, match="made with stateless_every = 2"):
        other.load_state_dict(state)
    del state["schedule"]["stateless_every"]  # as before the setting was there
    with pytest.raises(UserError, match="made with stateless_every = 1"):
        other.load_state_dict(state)
    other.detach()
    del state["schedule"]["head_rows"]
    rows = attached(False, "all", "visit", head_rows="batch")
    with pytest.raises(UserError, match="made with head_rows = all"):
        rows.load_state_dict(state)


def embeddings_always(tied: bool) -> tuple[list[float], dict[str, Tensor]]:
    return training.train(attached(tied, "none", "always", "fsdp"), RECIPE.steps)


@pytest.mark.parametrize("tied", [True, False])
def test_the_embedding_is_trained_in_every_step_under_fsdp(tied: bool) -> None:
    expected, expected_weights = plain_loop(tied=tied, stateless="none", embeddings="always")
    for losses, found in run_ranks(embeddings_always, 2, tied):
        assert losses == pytest.approx(expected, abs=1e-10)
        for name, tensor in expected_weights.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-9)


def embeddings_always_in_zero(stage: int) -> tuple[list[float], dict[str, Tensor]]:
    lwo = zero.attach_engine(stage, RECIPE, tied=False, config={"embeddings": "always"})
    return training.train(lwo, RECIPE.steps)


@pytest.mark.parametrize("stage", [1, 3])
def test_the_embedding_is_trained_in_every_step_under_zero(stage: int) -> None:
    expected, expected_weights = plain_loop(tied=False, stateless="none", embeddings="always")
    ranks = run_ranks(embeddings_always_in_zero, 2, stage, deepspeed=True)
    for losses, found in ranks:
        assert losses == pytest.approx(expected, abs=1e-4)  # fp32 against float64
        for name, tensor in expected_weights.items():
            torch.testing.assert_close(found[name].double(), tensor, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("world_size", "strategy", "stateless", "embeddings", "other"),
    [
        (2, "replicate", "suffix", "visit", "stateless_update=step"),
        (2, "replicate", "all", "always", "stateless_update=step"),
        (2, "fsdp", "all", "always", "stateless_update=step"),
        (1, "replicate", "all", "always", "stateless_update=backward"),
        (2, "replicate", "all", "always", "stateless_every=2"),
        (2, "fsdp", "all", "always", "state=reset"),
    ],
)
def test_a_run_resumes_bit_for_bit(
    world_size: int,
    strategy: str,
    stateless: str,
    embeddings: str,
    other: str,
    inputs: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    """All layers change between two checkpoints, and most have no state."""
    overrides = [f"lwo.stateless={stateless}", f"lwo.embeddings={embeddings}"]
    overrides += [f"strategy={strategy}", "train.logging_steps=1", "checkpoint.steps=4"]
    overrides += ["lwo.state=keep", "lwo.order=random", f"lwo.{other}"]
    overrides += [f"cluster.num_workers={world_size}"]
    whole = prepare(make_config(inputs, tmp_path / "whole", *overrides))
    unbroken = run_ranks(whole_run, world_size, whole)[0]
    broken = prepare(make_config(inputs, tmp_path / "broken", *overrides))
    with pytest.raises(RanksError, match="InterruptedError"):
        run_ranks(stop_after, world_size, broken, 4)
    resumed = run_ranks(whole_run, world_size, broken)[0]
    assert min(resumed) == 5
    assert resumed == {step: unbroken[step] for step in resumed}
    models = [load_file(tmp_path / of / "r" / "model" / WEIGHTS) for of in ("whole", "broken")]
    for name, tensor in models[0].items():
        assert torch.equal(tensor, models[1][name]), name


def spoiled(strategy: str, rank: int) -> tuple[float, bool]:
    """A gradient of one rank that is not finite in a layer without state only."""
    lwo = attached(True, "suffix", "visit", strategy, order="descending")
    for step in range(2 * RECIPE.steps_per_layer):  # layer_3, then layer_2
        training.train_step(lwo, step)
    assert [layer.name for layer in lwo.visit.stateless] == ["layer_2", "layer_3"]
    before = training.weights(lwo)
    weight = dict(lwo.module.named_parameters())[lwo.visit.stateless[-1].parameter_names[0]]
    if distributed.rank() == rank:
        weight.register_post_accumulate_grad_hook(_spoil)
    _, report = training.train_step(lwo, 0)
    assert report.skipped is not None
    after = training.weights(lwo)
    return float(report.skipped), all(torch.equal(before[name], after[name]) for name in before)


def _spoil(weight: Tensor) -> None:
    assert weight.grad is not None
    weight.grad.mul_(torch.inf)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("strategy", ["replicate", "fsdp"])
def test_a_gradient_that_is_not_finite_anywhere_skips_the_step(strategy: str, rank: int) -> None:
    assert run_ranks(spoiled, 2, strategy, rank) == [(1.0, True)] * 2


class Pairs(LayerWise):
    """A method with layers without state of its own."""

    def visits(self, layers: Sequence[Layer]) -> list[Visit]:
        inside = [layer for layer in layers if not layer.is_outside]
        return [Visit(inside[0], stateless=(inside[1],)), Visit(inside[2])]


def test_a_method_of_ones_own_keeps_its_layers_without_state() -> None:
    layers = find_layers(oracle.tiny_model(tied=False))
    for stateless, expected in (("none", [["layer_1"], []]), ("all", None)):
        visits = Pairs().cycle(layers, lwo_dist.LWOConfig(stateless=stateless, embeddings="visit"))
        found = [[layer.name for layer in visit.stateless] for visit in visits]
        expected = expected or [
            ["layer_1", "layer_2", "layer_3"],
            ["layer_0", "layer_1", "layer_3"],
        ]
        assert found == expected


def test_layers_of_the_callers_own_are_refused() -> None:
    model = oracle.tiny_model(tied=False)
    with pytest.raises(UserError, match="leave out attach"):
        lwo_dist.attach(model, lwo_dist.LWOConfig(stateless="all"), layers=find_layers(model))


def test_layers_that_change_without_a_visit_are_trained() -> None:
    names = {}
    for stateless in ("none", "suffix", "all"):
        config = lwo_dist.LWOConfig(
            stateless=stateless, steps_per_layer=2, order="ascending", embeddings="visit"
        )
        lwo = lwo_dist.attach(oracle.tiny_model(tied=False), config)
        names[stateless] = lwo.never_trained(4)  # embed, layer_0
        lwo.detach()
    assert names["none"] == ["layer_1", "layer_2", "layer_3", "head"]
    assert names["suffix"] == names["all"] == ["head"]


def test_every_n_that_leaves_no_layer_is_refused() -> None:
    with pytest.raises(UserError, match="stateless_every = 4 leaves no layer for .*: all to"):
        attached(False, "all", "always", stateless_every=4)


def refused_in_zero(own_method: bool) -> list[str]:
    """By `prepare`, and by `attach` to an engine that was made for a plain configuration."""
    config = lwo_dist.LWOConfig(stateless="none" if own_method else "all")
    how = Pairs() if own_method else "lwo"
    said = []
    with pytest.raises(UserError) as raised:
        lwo_dist.prepare(oracle.tiny_model(tied=False), config, how)
    said.append(str(raised.value))
    engine = zero.make_engine(1, RECIPE, tied=False)
    with pytest.raises(UserError) as raised:
        lwo_dist.attach(engine, config, how)
    # Nothing was changed: a plain configuration fits.
    lwo_dist.attach(engine, lwo_dist.LWOConfig())
    return [*said, str(raised.value)]


@pytest.mark.parametrize("own_method", [False, True])
def test_a_strategy_without_whole_gradients_refuses(own_method: bool) -> None:
    for message in run_ranks(refused_in_zero, 2, own_method, deepspeed=True)[0]:
        assert "lwo.stateless" in message
        assert "set strategy: fsdp or replicate" in message


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"stateless": "all", "batches": "cycle"}, "batches: fresh"),
        ({"embeddings": "always", "batches": "cycle"}, "batches: fresh"),
        ({"stateless": "suffix", "suffix_backward": 0.5}, "suffix_backward: 1"),
        ({"stateless_every": 2}, "no effect with stateless: none"),
    ],
)
def test_settings_that_exclude_each_other(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        lwo_dist.LWOConfig(**settings)


@pytest.mark.parametrize("settings", [{"stateless": "all"}, {"embeddings": "always"}])
def test_a_method_that_trains_everything_at_once_refuses(settings: dict[str, Any]) -> None:
    model = oracle.tiny_model(tied=True)
    with pytest.raises(UserError, match="method: full"):
        lwo_dist.attach(model, lwo_dist.LWOConfig(**settings), "full")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["strategy=deepspeed", "lwo.stateless=all"],
            "has no effect with strategy: deepspeed; set strategy: replicate or fsdp, or drop it",
        ),
        (["method=full", "lwo.embeddings=always"], "lwo.embeddings = always has no effect with"),
    ],
)
def test_a_run_refuses_before_it_starts(
    overrides: list[str], said: str, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        prepare(make_config(inputs, tmp_path, *overrides))
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("strategy", ["replicate", "fsdp"])
@pytest.mark.parametrize(
    "overrides", [("all", "always", 1), ("suffix", "visit", 1), ("all", "always", 2)]
)
def test_the_plan_is_what_is_measured(overrides: tuple[str, str, int], strategy: str) -> None:
    stateless, embeddings, every = overrides
    more = (f"lwo.stateless={stateless}", f"lwo.embeddings={embeddings}")
    more += (f"lwo.stateless_every={every}",)
    (row,) = compare(strategy, ["llama"], *more, methods=("lwo",))
    assert 0.97 < row["ratio"] < 1.03
    assert row["sent"] == row["plan_sent"]
    for visit, held in row["held"].items():
        for key in ("parameter_bytes", "gradient_bytes", "optimizer_state_bytes"):
            assert row["memory"][visit][key] == held[key], (visit, key)
