"""What a DeepSpeed switch frees and when, the user's settings that go on after it, and machines
without a compiler.
"""

from __future__ import annotations

import gc
import importlib.util
import shutil
import statistics
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import lwo_dist
from lwo_dist.errors import UserError
from lwo_dist.hook import LWO
from lwo_dist.memory import local_bytes
from lwo_dist.methods.lwo import LayerWise
from lwo_dist.strategies.deepspeed.builder import load_deepspeed, make_engine
from tests import oracle
from tests.distributed import training, zero
from tests.distributed.test_deepspeed import FP32_SUMS, NOTHING_KEPT, CountPayload
from tests.ranks import run_ranks

# Not imported here: the ranks import it through us, as a user's process does.
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed"
)

TWO_STEPS = oracle.Recipe(steps_per_layer=2)
RANKS = 2


# ---- what is freed, and when


def live_bytes() -> int:
    """Bytes behind all tensors that live, each storage once."""
    return local_bytes(item for item in gc.get_objects() if issubclass(type(item), torch.Tensor))


@contextmanager
def whole_collections() -> Iterator[list[int]]:
    """Counts the collections of the whole heap that somebody asks for."""
    seen: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start" and info["generation"] == 2:
            seen.append(1)

    gc.callbacks.append(note)
    try:
        yield seen
    finally:
        gc.callbacks.remove(note)


WATCHED = [
    (1, True, {"precision": "bf16", **FP32_SUMS}),
    pytest.param(2, False, {}, marks=pytest.mark.long),
    (3, True, {"zero": NOTHING_KEPT}),
]


def watch_switches(stage: int, late: bool, more: dict) -> dict[str, list]:
    load_deepspeed()
    from lwo_dist.strategies.deepspeed.strategy import private as private

    gc.collect()
    before = live_bytes()
    engine = zero.make_engine(stage, TWO_STEPS, tied=False, late=late, **more)
    mine = engine.client_optimizer  # a user may keep it for as long as the run lasts
    old: list[weakref.ref] = []
    # As each ZeRO optimizer is made: how much of the last one's still lives, and what lives besides
    # the weights.
    alive, besides, configure = [], [], engine._configure_optimizer

    def spy(*args: Any) -> None:
        alive.append(sum(tensor() is not None for tensor in old))
        besides.append(besides_the_weights(engine) - before)
        configure(*args)

    engine._configure_optimizer = spy
    gc.disable()  # else it might free what lives in a cycle just in time
    lwo = lwo_dist.attach(engine, zero.lwo_config(TWO_STEPS))
    visits = training.follow(lwo)
    # Added by hand: gloo's threads may free a buffer of attach's last collective at any moment,
    # so that the difference of two measurements here would not be the sums.
    before += local_bytes([visits._sums.shared, visits._sums.own])
    states, other, collections = [], [], []
    for step in range(2 * len(lwo.layers) + 2):
        if step % 2:  # the switch comes
            state = private.inner_optimizer(engine.optimizer).state
            tensors = [
                *private.masters(engine.optimizer),
                *(t for s in state.values() for t in s.values()),
            ]
            old[:] = [
                weakref.ref(tensor)
                for tensor in [*tensors, *private.gradient_buffers(engine.optimizer)]
            ]
            del state, tensors
        with whole_collections() as seen:
            visits.begin_step()
            training.train_step(lwo, step)
        collections.append(len(seen))
        if step % 2 == 0:  # in the middle of a visit
            memory = lwo.memory()
            states.append((12 * size_of(lwo) // RANKS, memory["optimizer_state_bytes"]))
            kept = [
                t
                for tensors in lwo.strategy._parked_masters._parked.values()
                for t in tensors.values()
            ]
            on_host = local_bytes([*kept, *visits.masters_before])
            reported = on_host + memory["optimizer_state_bytes"] + memory["gradient_bytes"]
            other.append(besides_the_weights(engine) - before - reported)
    gc.enable()
    held = [len(mine.state), sum(len(group["params"]) for group in mine.param_groups)]
    return {
        "alive": alive,
        "besides": besides,
        "states": states,
        "other": other,
        "collections": collections,
        "mine": held,
    }


def besides_the_weights(engine: Any) -> int:
    """Bytes that live, without the weights."""
    parameters = list(engine.module.parameters())
    shards = [p.ds_tensor for p in parameters if hasattr(p, "ds_id")]
    return live_bytes() - local_bytes([*parameters, *shards, *engine.module.buffers()])


def size_of(lwo: LWO) -> int:
    parameters = dict(lwo.module.named_parameters())
    return sum(
        getattr(parameters[n], "ds_numel", parameters[n].numel())
        for n in lwo.active_layer.parameter_names
    )


@pytest.mark.parametrize(("stage", "late", "more"), WATCHED)
def test_a_switch_frees_the_old_state_first_and_collects_no_heap(
    stage: int, late: bool, more: dict
) -> None:
    found = run_ranks(watch_switches, RANKS, stage, late, more, deepspeed=True)[0]
    assert not any(found["alive"]) and not any(found["collections"])
    assert found["mine"] == [0, 0]
    for formula, held in found["states"]:
        assert formula <= held <= formula + 12 * 4 * 20  # padding of the layer's parameters
    # The median: gloo's threads may hold a buffer of the last collective a little longer.
    assert (
        statistics.median(found["other"]) < 64
    )  # what lives is what `memory` says, parks and weights
    if "precision" not in more:  # with bf16 the parks live on
        assert statistics.median(found["besides"]) < min(held for _, held in found["states"]) / 4


# ---- the user's settings, after switches


THEIRS = {"reduce_bucket_size": 500, "allgather_bucket_size": 600}
Row = tuple[int, int, int | None, int, float]


def settings_in_use() -> dict[tuple[int, str], list[Row]]:
    """Of each step: the layer's parameters, the two bucket sizes, how many reductions, bytes
    reduced a parameter.
    """
    found = {}
    for stage in (1, 2, 3):
        for dtype, buckets in (("fp32", {}), ("bf16", THEIRS)):
            sums = {"communication_data_type": dtype, "data_types": {"grad_accum_dtype": "bf16"}}
            lwo = zero.attach_engine(
                stage, TWO_STEPS, tied=False, precision="bf16", zero=buckets, **sums
            )
            found[stage, dtype] = rows = []
            for step in range(4):
                made, size = lwo.model.optimizer, size_of(lwo)
                sizes = size, made.reduce_bucket_size, getattr(made, "allgather_bucket_size", None)
                tokens, labels = training.micro_batches(step, 1)[0]
                loss = oracle.loss_sum(lwo.model, tokens, labels)
                with CountPayload() as sent:
                    lwo.backward(loss)
                lwo.step()
                reductions = [
                    n
                    for kind, n in sent.calls
                    if kind in ("all_reduce", "reduce_scatter") and n > 8
                ]
                rows.append((*sizes, len(reductions), sum(reductions) / size))
    return found


def test_bucket_sizes_and_communication_dtype_are_the_user_s() -> None:
    found = run_ranks(settings_in_use, RANKS, timeout=200, deepspeed=True)[0]
    for (stage, dtype), rows in found.items():
        for size, bucket, gathered, reductions, bytes_a_parameter in rows:
            where = f"stage {stage} {dtype} layer of {size}"
            assert bytes_a_parameter == (4 if dtype == "fp32" else 2), where
            if dtype == "fp32":  # our bucket: all gradients of the layer go out together
                assert (bucket, reductions) == (size, 1), where
            else:
                assert (bucket, gathered) == (500, None if stage == 3 else 600), where
                assert reductions >= 5 or size < 5000, where


def misspelt() -> dict[int, str]:
    found = {}
    for stage in (2, 3):
        settings = zero.settings(stage, zero={"reduce_bucket_sise": 5})
        with pytest.raises(UserError) as refused:
            if stage == 3:
                load_deepspeed().partitioner(settings)
            else:
                make_engine(
                    oracle.tiny_model(tied=False), zero.lwo_config(TWO_STEPS), settings, LayerWise()
                )
        found[stage] = str(refused.value)
    return found


def test_a_misspelt_key_is_one_line() -> None:
    for message in run_ranks(misspelt, 1, deepspeed=True)[0].values():
        assert (
            message.startswith("deepspeed config: ")
            and "reduce_bucket_sise" in message
            and "\n" not in message
        )


# ---- no compiler


def without_a_compiler() -> tuple[list[str | None], list[float]]:
    tools = [shutil.which(tool) for tool in ("c++", "g++", "clang++", "cc", "gcc", "ninja")]
    lwo = zero.attach_engine(1, TWO_STEPS, tied=False)
    return tools, [training.train_step(lwo, step)[0] for step in range(4)]


def test_neither_compiler_nor_ninja_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    for tools, losses in run_ranks(without_a_compiler, RANKS):
        assert set(tools) == {None} and len(losses) == 4
    assert not (tmp_path / "extensions").exists()  # nothing was even tried
