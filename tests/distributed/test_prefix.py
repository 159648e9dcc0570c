"""`batches: cycle` on several ranks: the same bits with kept hidden states as without, and fewer
gathers, counted.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lwo_dist.config import Config
from lwo_dist.config.reading import load_config
from lwo_dist.driver import prepare
from lwo_dist.errors import UserError
from lwo_dist.hook import LWO
from lwo_dist.layers import find_layers, find_stacks
from lwo_dist.run import run
from lwo_dist.schedule import LayerSchedule
from lwo_dist.training.trainer import Trainer
from tests import oracle
from tests.distributed import training, zero
from tests.distributed.collectives import CountCollectives
from tests.distributed.test_deepspeed_run import resume_all
from tests.distributed.test_run import exported, inputs, make_config, run_and_record
from tests.prepared import prepared
from tests.ranks import run_ranks

__all__ = ["inputs"]  # the fixture

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed"
)
VISITS = 6  # embed, four layers, head
VISIT = 2  # steps
STEPS = 2 * VISITS * VISIT
CYCLE = {"batches": "cycle"}
NOTHING_KEPT = {
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_param_persistence_threshold": 0,
    "stage3_prefetch_bucket_size": 0,
}


def recipe(visit: int = VISIT, **more: Any) -> oracle.Recipe:
    return oracle.Recipe(steps=STEPS, steps_per_layer=visit, **more)


def attach(strategy: str, **more: Any) -> LWO:
    """`strategy`: replicate, fsdp, zero2 or zero3."""
    of = recipe(visit=more.pop("visit", VISIT), accumulation=more.pop("accumulation", 1))
    checkpointing = more.pop("checkpointing", False)
    if strategy.startswith("zero"):
        stage = int(strategy[-1])
        precision = more.pop("precision", "fp32")
        return zero.attach_engine(
            stage,
            of,
            tied=False,
            config=CYCLE | more,
            precision=precision,
            checkpointing=checkpointing,
            zero=NOTHING_KEPT if stage == 3 else {},
        )
    dtype = more.pop("dtype", torch.float32)
    lwo = training.attach(strategy, of, tied=False, dtype=dtype, **CYCLE, **more)
    if strategy == "replicate" and more.get("precision") == "bf16":
        lwo.module.forward = torch.autocast("cpu", torch.bfloat16)(lwo.module.forward)
    if checkpointing:
        lwo.module.gradient_checkpointing_enable({"use_reentrant": False})
    return lwo


def store_nothing(lwo: LWO) -> None:
    assert lwo._prefix is not None
    lwo._prefix._store.put = lambda *_: None  # type: ignore[method-assign]


def train(lwo: LWO, steps: int | None = None) -> None:
    """For two cycles, or so many steps."""
    for _ in range(2 * lwo.schedule.steps_per_cycle if steps is None else steps):
        training.train_step(lwo, lwo.batch_index)


def differences(cases: list[tuple[str, dict[str, Any]]]) -> list[tuple[bool, int]]:
    """For each case whether kept hidden states give the same bits, and how many were used."""
    found = []
    for strategy, settings in cases:
        with_store = attach(strategy, **settings)
        train(with_store)
        reused = with_store.prefix_reused
        kept = training.weights(with_store)
        del with_store
        computed = attach(strategy, **settings)
        store_nothing(computed)
        train(computed)
        assert computed.prefix_reused == 0
        plain = training.weights(computed)
        found.append((all(torch.equal(kept[name], plain[name]) for name in plain), reused))
    return found


def check(world_size: int, cases: list[tuple[str, dict[str, Any]]], **more: Any) -> None:
    for of_rank in run_ranks(differences, world_size, cases, timeout=300, **more):
        for case, (is_equal, reused) in zip(cases, of_rank, strict=True):
            assert is_equal, case
            # The visits of two layers and the head, in two cycles.
            batches = case[1].get("visit", VISIT) * case[1].get("accumulation", 1)
            assert reused == 2 * 3 * batches, case


FULL = {"checkpointing": True, "precision": "bf16", "accumulation": 2}


@pytest.mark.parametrize("strategy", ["replicate", "fsdp"])
def test_kept_hidden_states_change_no_bit(strategy: str) -> None:
    check(2, [(strategy, {}), (strategy, FULL)])


@needs_deepspeed
def test_kept_hidden_states_change_no_bit_under_zero() -> None:
    short = FULL | {"visit": 1}
    check(2, [("zero2", short), ("zero3", short)], deepspeed=True)


def against_the_oracle(strategy: str) -> dict[str, torch.Tensor]:
    lwo = attach(strategy, dtype=torch.float64, accumulation=2)
    train(lwo)
    assert lwo.prefix_reused == 2 * 3 * VISIT * 2
    return training.weights(lwo)


@pytest.mark.parametrize("strategy", ["replicate", "fsdp"])
def test_equals_the_plain_loop_on_repeated_batches(strategy: str) -> None:
    found = run_ranks(against_the_oracle, 2, strategy)[0]
    model = oracle.tiny_model(tied=False, dtype=torch.float64)
    layers = [layer.parameter_names for layer in find_layers(model)]
    schedule = LayerSchedule(VISITS, VISIT, repeats_batches=True)
    oracle.train(model, layers, recipe(), batch=schedule.batch)
    for name, parameter in model.named_parameters():
        assert (parameter - found[name]).abs().max() < 1e-10, name


# ---- whole runs


def test_a_run_resumes_bitwise_and_refuses_other_batches(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    settings = ("lwo.batches=cycle", "lwo.steps_per_layer=2", "lwo.order=ascending")
    resumed_at = "checkpoint.steps=5"  # in mid-visit of the third layer of four
    pair = tuple(
        prepare(make_config(inputs, tmp_path / part, *settings, resumed_at)) for part in ("a", "b")
    )
    expected, losses, found, resumed = run_ranks(resume_all, 2, [pair], timeout=200)[0][0]
    assert resumed[0][0] == 6
    assert resumed[1:] == losses[3:]
    nothing_kept = ("lwo.prefix_host_gb=0", "lwo.prefix_disk_gb=0")
    config = prepare(make_config(inputs, tmp_path / "c", *settings, *nothing_kept))
    computed, _ = run_ranks(run_and_record, 2, config)[0]
    assert computed is not None
    weights = exported(expected)
    for other in (exported(found), exported(computed)):
        assert all(torch.equal(tensor, other[name]) for name, tensor in weights.items())

    fresh = prepare(make_config(inputs, tmp_path / "a", "lwo.steps_per_layer=2", "train.steps=20"))
    [said] = run_ranks(refused, 1, fresh)
    assert "lwo.batches (or lwo.steps_per_layer) changed from cycle, 2 a layer to fresh" in said


def refused(config: Config) -> str:
    try:
        run(config)
    except UserError as error:
        return str(error)
    return "trained"


def test_layers_of_a_cycle_share_batches_and_the_next_cycle_has_others() -> None:
    lwo = SimpleNamespace(
        schedule=LayerSchedule(3, 2, repeats_batches=True),
        config=SimpleNamespace(gradient_accumulation_steps=1),
    )
    config = load_config(None, ["train.global_batch_size=4"])
    trainer = SimpleNamespace(lwo=lwo, config=config, data=prepared([8] * 64, sequence_length=8))
    batches = [tuple(Trainer._batch_of(trainer, step).indices) for step in range(13)]  # type: ignore[arg-type]
    first, second = batches[:2], batches[6:8]
    assert batches[:6] == first * 3
    assert batches[6:12] == second * 3
    assert len({*first, *second, batches[12]}) == 5
    assert [lwo.schedule.num_batches(steps) for steps in (1, 2, 5, 6, 7, 12)] == [1, 2, 2, 2, 3, 4]


# ---- counted


def gathers(strategy: str) -> list[dict[str, Any]]:
    """Of each step after the first: the layer, what its passes sent, and what was reported."""
    lwo = attach(strategy, accumulation=2)
    rows = []
    for _ in range(STEPS // 2):
        with CountCollectives() as counter:
            report = training.train_step(lwo, lwo.batch_index)[1]
        counter.calls.pop()  # of the loss, by the test
        rows.append({"layer": report.layer, "calls": counter.calls, "reported": report.bytes_sent})
    layer = find_stacks(lwo.module)[0].modules[0]
    numel = sum(getattr(p, "ds_numel", p.numel()) for p in layer.parameters())
    return [{**row, "layer_bytes": 4 * numel} for row in rows[1:]]


def test_fsdp_gathers_one_layer_of_the_prefix() -> None:
    rows = run_ranks(gathers, 2, "fsdp")[0]
    for row in rows:
        names = ["embed", "layer_0", "layer_1", "layer_2", "layer_3", "head"]
        depth = names.index(row["layer"])
        start = max(0, depth - 2) if depth >= 3 else 0  # layers that are passed over
        backward = max(0, 4 - max(depth, 1))  # the last layer stays gathered
        kinds = [kind for kind, _ in row["calls"]]
        # Two micro-batches: forward gathers the root and the layers that it runs.
        assert kinds.count("all_gather") == 2 * (1 + 4 - start + backward), row["layer"]
        sent = sum(n for kind, n in row["calls"] if kind in ("all_gather", "reduce_scatter"))
        assert sent == row["reported"], row["layer"]
        # One norm, and for each micro-batch what the ranks agree on.
        assert [size for kind, size in row["calls"] if kind == "all_reduce"] == [48, 48, 4]


@needs_deepspeed
def test_stage_3_fetches_one_layer_of_the_prefix() -> None:
    rows = run_ranks(gathers, 2, "zero3", deepspeed=True)[0]
    sent = {
        row["layer"]: sum(n for kind, n in row["calls"] if kind == "all_gather") for row in rows
    }
    layer = 2 * rows[0]["layer_bytes"]  # of two micro-batches, without what pads it
    # A layer further up: one less to fetch again in backward, and in forward one more is passed
    # over from layer_2 on.
    steps = [sent["layer_0"] - sent["layer_1"], sent["layer_1"] - sent["layer_2"]]
    steps += [sent["layer_2"] - sent["layer_3"]]
    first, second, third = (round(step / layer, 1) for step in steps)
    assert (first, second) == (1.0, 2.0)
    assert third >= 2.0
    assert all(row["reported"] > 0 for row in rows)


# ---- ranks that differ


def only_rank_0_has_room(strategy: str) -> tuple[int, bool]:
    lwo = attach(strategy)
    if dist.get_rank() == 1:
        store_nothing(lwo)
    train(lwo)
    other = attach(strategy)
    store_nothing(other)
    train(other)
    kept, plain = training.weights(lwo), training.weights(other)
    return lwo.prefix_reused, all(torch.equal(kept[name], plain[name]) for name in plain)


def test_ranks_that_gather_from_each_other_start_at_the_same_layer() -> None:
    assert run_ranks(only_rank_0_has_room, 2, "fsdp") == [(0, True), (0, True)]
    reused = 2 * 3 * VISIT
    assert run_ranks(only_rank_0_has_room, 2, "replicate") == [(reused, True), (0, True)]


def random_on_one_rank() -> str:
    lwo = attach("fsdp")
    if dist.get_rank() == 1:
        layer = find_stacks(lwo.module)[0].modules[1]
        layer.register_forward_hook(lambda *given: given[2] + torch.rand(()))
    try:
        train(lwo, 1)
    except UserError as error:
        return str(error)
    return "trained"


def test_what_one_rank_finds_is_an_error_on_all() -> None:
    other, own = run_ranks(random_on_one_rank, 2)
    assert "two passes over one batch differ, as they draw random numbers" in own
    assert "another rank has found out why" in other


def wrapped_in_a_list() -> str:
    from torch.distributed.fsdp import fully_shard

    model = oracle.tiny_model(tied=False)
    fully_shard(list(model.model.layers[:2]))
    fully_shard(model)
    try:
        zero.lwo_dist.attach(model, zero.lwo_dist.LWOConfig(**CYCLE))
    except UserError as error:
        return str(error)
    return "attached"


def test_layers_that_are_gathered_together_are_refused() -> None:
    [message] = run_ranks(wrapped_in_a_list, 1)
    assert message.startswith("layer 0 was wrapped in a list, fully_shard([...])")
