"""What a layer keeps between its visits comes back bit for bit: moments (`state: keep`), masters of
16-bit weights.
"""

from __future__ import annotations

import importlib.util
import math
import pickle
import warnings
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import lwo_dist
from lwo_dist.hook import LWO
from lwo_dist.layers import Visit, find_layers
from lwo_dist.memory import padded_numel, park_bytes
from lwo_dist.optimizer import make_adamw
from tests import oracle
from tests.distributed import training, zero
from tests.ranks import run_ranks

Weights = dict[str, torch.Tensor]

NUM_LAYERS = 5  # of the tied model
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed"
)
FP32_SUMS = {"communication_data_type": "fp32", "data_types": {"grad_accum_dtype": "fp32"}}


def same(a: Any, b: Any) -> bool:
    """Equal in every bit: tensors, or whatever holds them."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, list):
        return all(same(x, y) for x, y in zip(a, b, strict=True))
    if not isinstance(a, dict):
        return bool(a == b)
    return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)


# ---- moments

KEEP = oracle.Recipe(steps=3 * NUM_LAYERS * 2, steps_per_layer=2, max_grad_norm=0.5)
SCHEDULES = {
    "ramp": {"visit_ramp_steps": 2},
    "visit": {"lr_scheduler_type": "cosine", "lr_schedule_over": "visit"},
    "cycle": {"lr_scheduler_type": "linear", "lr_schedule_over": "cycle", "visit_ramp_steps": 4},
}


def rate(schedule: str, step: int) -> float:
    """What `SCHEDULES` mean, written down anew."""
    place, cycle = step % 2, NUM_LAYERS * 2
    if schedule == "ramp":
        factor = (0.5, 1.0)[place]
    elif schedule == "visit":
        factor = (1.0, 0.5 * (1 + math.cos(math.pi / 2)))[place]
    else:
        factor = (1 - step % cycle / cycle) * (place + 1) / 4
    return KEEP.lr * factor


def train_kept(
    cases: list[tuple[str, str, torch.dtype]],
) -> list[tuple[list[float], Weights, list[bool], int]]:
    results = []
    for strategy, schedule, dtype in cases:
        settings = {"state": "keep", **SCHEDULES[schedule]}
        if strategy.startswith("zero"):
            lwo = zero.attach_engine(int(strategy[-1]), KEEP, tied=True, config=settings)
        else:
            lwo = training.attach(strategy, KEEP, tied=True, dtype=dtype, **settings)
        back = watch_parks(lwo)
        visits = training.follow(lwo)
        losses = []
        for step in range(KEEP.steps):
            layer = lwo.active_layer
            if step % 2 == 0:
                before = lwo.read_layer(layer)
            losses.append(training.train_step(lwo, step, visits)[0])
            over = visits.take()
            assert len(over) == step % 2
            for visit in over:
                after = lwo.read_layer(layer)
                change = sum(float((after[n] - before[n]).double().square().sum()) for n in after)
                assert visit.metrics["visit/change_norm"] == pytest.approx(change**0.5, rel=1e-5)
        results.append((losses, training.weights(lwo), back, lwo.memory()["park_bytes"]))
    return results


def watch_parks(lwo: LWO) -> list[bool]:
    """Of each visit but a layer's first: are its moments those that its last visit left, before and
    after unparking?
    """
    left: dict[str, Any] = {}
    back: list[bool] = []
    deactivate, activate = lwo.strategy.deactivate, lwo.strategy.activate

    def leave(following: Visit | None = None) -> None:
        left[lwo.active_layer.name] = lwo.read_moments(lwo.active_layer)
        deactivate(following)

    def enter(visit: Visit, make_optimizer: Any) -> None:
        layer = visit.active
        parked = lwo.strategy.export_state(layer)
        activate(visit, make_optimizer)
        if layer.name in left:
            moments = lwo.strategy.export_state(layer)
            steps = {float(kinds["step"]) for kinds in moments.values()}
            visits = len(back) // NUM_LAYERS + 1
            back.append(
                same(parked, left[layer.name]) and same(moments, parked) and steps == {2.0 * visits}
            )

    lwo.strategy.deactivate, lwo.strategy.activate = leave, enter  # type: ignore[method-assign]
    return back


def check_kept(cases: list[tuple[str, str, torch.dtype]], *, deepspeed: bool = False) -> None:
    ranks = run_ranks(train_kept, 2, cases, timeout=300, deepspeed=deepspeed)
    for (strategy, schedule, dtype), of_ranks in zip(cases, zip(*ranks, strict=True), strict=True):
        losses, weights, back, _ = of_ranks[0]
        case, bound = f"{strategy} {schedule} {dtype}", 1e-10 if dtype == torch.float64 else 1e-5
        models = {keep: oracle.tiny_model(tied=True, dtype=dtype) for keep in (True, False)}
        for keep, model in models.items():
            layers = [layer.parameter_names for layer in find_layers(model)]
            expected = oracle.train(
                model, layers, KEEP, keep=keep, rate=lambda step, s=schedule: rate(s, step)
            )
            if keep:
                assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) < bound, case
        kept, reset = dict(models[True].named_parameters()), dict(models[False].named_parameters())
        for name, parameter in kept.items():
            assert (parameter.detach() - weights[name]).abs().max() < bound, f"{case}: {name}"
        # The comparison can fail: without the kept moments the weights are elsewhere.
        assert max((reset[n].detach() - weights[n]).abs().max() for n in weights) > 20 * bound, case
        assert len(back) == 2 * NUM_LAYERS + 1 and all(back), case
        # The first layer is active again, the others are parked: two moments an element, over the
        # ranks.
        numel = [kept[name].numel() for names in layers[1:] for name in names]
        if (
            strategy == "replicate"
        ):  # every layer is padded to a multiple of the ranks, every parameter to one of 4
            numel = [
                padded_numel(sum(padded_numel(kept[n].numel(), 4) for n in names), 2)
                for names in layers[1:]
            ]
        assert sum(parked for *_, parked in of_ranks) == 2 * dtype.itemsize * sum(numel), case


def test_kept_moments_equal_the_plain_loop_with_kept_optimizers() -> None:
    check_kept(
        [
            (s, schedule, torch.float64)
            for s, schedule in (("replicate", "cycle"), ("fsdp", "visit"))
        ]
    )


@needs_deepspeed
def test_kept_moments_equal_the_plain_loop_under_deepspeed() -> None:
    check_kept(
        [
            (f"zero_{stage}", name, torch.float32)
            for stage, name in zip((1, 2, 3), SCHEDULES, strict=True)
        ],
        deepspeed=True,
    )


# ---- masters of bf16 weights

BF16 = oracle.Recipe(steps=3 * NUM_LAYERS * 2, steps_per_layer=2, max_grad_norm=1.0, lr=1e-3)


def attach_sharded(storage: torch.dtype, recipe: oracle.Recipe = BF16, **settings: Any) -> LWO:
    """Compute in bf16, sums in fp32, from weights that bf16 can hold; wrapped as its owner would
    wrap it.
    """
    model = oracle.tiny_model(tied=True, dtype=torch.bfloat16).to(storage)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    config = lwo_dist.LWOConfig(
        lr=recipe.lr,
        eps=recipe.eps,
        weight_decay=0.01,
        max_grad_norm=recipe.max_grad_norm,
        steps_per_layer=recipe.steps_per_layer,
        **settings,
    )
    return lwo_dist.attach(model, config)


def train_stored() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for storage in (torch.float32, torch.bfloat16):
        lwo = attach_sharded(storage, state="keep")
        visits = training.follow(lwo)
        losses = [training.train_step(lwo, step, visits)[0] for step in range(BF16.steps)]
        found[str(storage)] = losses
        found[f"changes {storage}"] = [v.metrics["visit/change_norm"] for v in visits.take()]
        found[f"weights {storage}"] = training.weights(lwo)
        found[f"moments {storage}"] = lwo.state_dict()["moments"]
        found[f"dtypes {storage}"] = {
            n: p.dtype for n, p in lwo.model.named_parameters() if p.requires_grad
        }
        if storage == torch.bfloat16:
            stored = {n: p for n, p in lwo.model.named_parameters() if not p.requires_grad}
            assert {p.dtype for p in stored.values()} == {torch.bfloat16}
            found["numel"] = sum(p.to_local().numel() for p in stored.values())
            shards = [fsdp_shard(found[f"weights {storage}"][n]) for n in stored]
            found["halfway"] = sum(
                int((s.view(torch.int32) & 0x1FFFF == 0x8000).sum()) for s in shards
            )
            found["memory"] = lwo.memory()
            # What is written comes back, active or not, through the next visit of each layer.
            noise = torch.Generator().manual_seed(1)
            written = {
                n: w + torch.rand(w.shape, generator=noise)
                for n, w in found[f"weights {storage}"].items()
            }
            lwo.write_layer(written)
            found["written"] = same(written, training.weights(lwo))
            visit_all(lwo)
            found["through a switch"] = same(written, training.weights(lwo))
    return found


def visit_all(lwo: LWO) -> None:
    """Make every layer active and inactive again, without a step."""
    for layer in [*lwo.layers, lwo.active_layer]:
        lwo.strategy.deactivate()
        lwo.strategy.activate(Visit(layer), partial(make_adamw, lwo.config))


def fsdp_shard(tensor: torch.Tensor) -> torch.Tensor:
    parts = tensor.chunk(dist.get_world_size())
    return parts[dist.get_rank()] if dist.get_rank() < len(parts) else tensor[:0]


def test_bf16_storage_with_parks_equals_fp32_storage_bitwise() -> None:
    ranks = run_ranks(train_stored, 2, timeout=300)
    for found in ranks:
        fp32, bf16 = str(torch.float32), str(torch.bfloat16)
        assert found[bf16] == found[fp32]  # the losses
        assert same(found[f"weights {bf16}"], found[f"weights {fp32}"])
        assert same(found[f"moments {bf16}"], found[f"moments {fp32}"]) and found[f"moments {bf16}"]
        assert (
            found[f"changes {bf16}"] == found[f"changes {fp32}"]
            and len(found[f"changes {bf16}"]) == 15
        )
        assert all(
            not torch.equal(w, w.bfloat16().float()) for w in found[f"weights {bf16}"].values()
        )
        assert set(found[f"dtypes {bf16}"].values()) == {torch.float32} and found["written"]
        assert found["through a switch"]
        # After a cycle all layers but the active one are parked: exactly DESIGN's 8P/W, and half of
        # its 4P/W.
        parked = park_bytes(found["numel"], moments=True, masters=True) + 8 * found["halfway"]
        assert found["memory"]["park_bytes"] == parked
    assert sum(found["memory"]["parameter_bytes"] for found in ranks) < 4 * total_numel()


def total_numel() -> int:
    return sum(p.numel() for p in oracle.tiny_model(tied=True).parameters())


def make(kind: str, **settings: Any) -> LWO:
    """`kind`: a strategy, its stage, "bf16"."""
    strategy, *more = kind.split()
    if strategy == "zero":
        precision = {"precision": "bf16", **FP32_SUMS} if "bf16" in more else {}
        return zero.attach_engine(int(more[0]), KEEP, tied=True, config=settings, **precision)
    if "bf16" in more:
        return attach_sharded(torch.bfloat16, KEEP, **settings)
    return training.attach(strategy, KEEP, tied=True, dtype=torch.float32, **settings)


def train_discarding() -> list[dict[str, Any]]:
    results = []
    for kind in ("fsdp", "zero 1", "zero 3"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            lwo = make(f"{kind} bf16", inactive_master="discard")
        reports = [training.train_step(lwo, step)[1] for step in range(3)]
        first, second, third = lwo.layers[:3]
        lwo.write_layer({name: tensor + 2**-20 for name, tensor in lwo.read_layer(third).items()})
        said = [str(w.message) for w in caught if "discard" in str(w.message)]
        results.append(
            {
                "said": said,
                "parks": lwo.memory()["park_bytes"],
                "trained": lwo.read_layer(first),
                "active": lwo.read_layer(second),
                "written": lwo.read_layer(third),
                "switched": [report.switched for report in reports],
            }
        )
    return results


@needs_deepspeed
def test_discard_rounds_the_masters_away_and_says_so_once() -> None:
    ranks = run_ranks(train_discarding, 2, timeout=200, deepspeed=True)
    assert all(found["said"] == [] for found in ranks[1])
    for found in ranks[0]:
        [said] = found["said"]
        assert "steps_per_layer x lr = 6.0e-04 is" in said and "(inactive_master: host)" in said
        # The tied embedding's typical weight is about 0.07, in [2^-4, 2^-3): half an ulp is 2^-12.
        assert "is 2.5 times that at a typical weight (2.4e-04 at 0.0" in said, said
        assert found["switched"] == [False, True, False] and found["parks"] == 0
        for layer, rounded in (("trained", True), ("active", False), ("written", True)):
            same_as_bf16 = [torch.equal(w, w.bfloat16().float()) for w in found[layer].values()]
            assert all(same_as_bf16) == rounded, layer


# ---- resuming with parks, in mid-visit

STOP, END = (
    13,
    24,
)  # the second step of the second visit of the second layer; every layer is visited once more


Saved = tuple[dict, Weights, list[float], Weights]
Resumed = tuple[bool, bool, list[float], Weights]


def stop_and_go_on(kinds: list[str]) -> list[Saved]:
    results = []
    for kind in kinds:
        lwo = make(kind, state="keep")
        for step in range(STOP):
            training.train_step(lwo, step)
        state, weights = lwo.state_dict(), training.weights(lwo)
        losses = [training.train_step(lwo, step)[0] for step in range(STOP, END)]
        results.append((state, weights, losses, training.weights(lwo)))
    return results


def resume(pickled: bytes) -> list[list[Resumed]]:
    """As bytes, because every tensor among a process's arguments would cost it an open file."""
    cases: list[tuple[list[str], dict, Weights]] = pickle.loads(pickled)
    return [[resume_as(kind, state, weights) for kind in kinds] for kinds, state, weights in cases]


def resume_as(kind: str, state: dict, weights: Weights) -> Resumed:
    lwo = make(kind, state="keep")
    training.train_step(lwo, 0)  # so that there is something to overwrite
    lwo.write_layer(weights)
    lwo.load_state_dict(state)
    loaded = same([lwo.state_dict(), training.weights(lwo)], [state, weights])
    visit_all(lwo)
    visited = same([lwo.state_dict(), training.weights(lwo)], [state, weights])
    visits = training.follow(lwo)
    losses = [training.train_step(lwo, step, visits)[0] for step in range(STOP, END)]
    first, *others = visits.take()
    assert "visit/change_norm" not in first.metrics  # it began before the resume
    assert all(visit.metrics["visit/change_norm"] > 0 for visit in others)
    return loaded, visited, losses, training.weights(lwo)


@needs_deepspeed
@pytest.mark.parametrize(
    ("ranks", "cases"),
    [
        (2, {"fsdp": ["replicate", "zero 1"], "fsdp bf16": ["fsdp bf16", "zero 1 bf16"]}),
        pytest.param(
            1,
            {
                "zero 2": ["fsdp", "zero 2"],
                "replicate": ["fsdp", "zero 3"],
                "zero 1 bf16": ["fsdp bf16"],
            },
            marks=pytest.mark.long,
        ),
        pytest.param(
            4,
            {"zero 3 bf16": ["fsdp bf16", "zero 2 bf16"], "fsdp": ["zero 3"]},
            marks=pytest.mark.long,
        ),
    ],
)
def test_another_strategy_and_world_size_resume_in_mid_visit(
    ranks: int, cases: dict[str, list[str]]
) -> None:
    saved = run_ranks(stop_and_go_on, 2, list(cases), timeout=300, deepspeed=True)[0]
    to_resume = [(then, *parts[:2]) for then, parts in zip(cases.values(), saved, strict=True)]
    resumed = run_ranks(resume, ranks, pickle.dumps(to_resume), timeout=500, deepspeed=True)[0]
    for (first, then), (state, half, losses, weights), of_kinds in zip(
        cases.items(), saved, resumed, strict=True
    ):
        assert set(state["moments"]) == set(half)  # of every layer
        steps = {float(moments["step"]) for moments in state["moments"].values()}
        assert steps == {2.0, 3.0, 4.0}  # visited once, once and a half, twice
        for kind, (loaded, visited, found, found_weights) in zip(then, of_kinds, strict=True):
            assert loaded and visited, (
                f"{first} -> {kind}: masters or moments are not those that were saved"
            )
            if kind == first and ranks == 2:
                assert found == losses and same(found_weights, weights), kind
            # bf16 rounds differently with every way to cut a batch, the loss of its logits
            # included.
            bound = 0.02 * max(losses) if "bf16" in kind else 1e-5
            assert max(abs(a - b) for a, b in zip(losses, found, strict=True)) < bound, (
                f"{first} -> {kind}"
            )
            if "bf16" not in kind:
                difference = max((weights[n] - found_weights[n]).abs().max() for n in weights)
                assert difference < 1e-5, f"{first} -> {kind}"
