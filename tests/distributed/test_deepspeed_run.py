"""DeepSpeed around the strategy: whole runs, late engines, schedulers, what is refused, what a
switch costs.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import shutil
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM

import lwo_dist
from lwo_dist import distributed
from lwo_dist.callback import Callback
from lwo_dist.config import Config
from lwo_dist.driver import prepare
from lwo_dist.errors import UserError
from lwo_dist.run import run
from tests import oracle
from tests.distributed import training, zero
from tests.distributed.test_deepspeed import FP32_SUMS
from tests.distributed.test_run import Losses, exported, inputs, make_config, run_and_record
from tests.ranks import run_ranks

__all__ = ["inputs"]  # the fixture

# Not imported here: the ranks import it through us, as a user's process does.
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed"
)

EPS = "lwo.eps=1e-6"


def run_all(configs: list[Config]) -> list[tuple[Any, list]]:
    return [run_and_record(config) for config in configs]


def test_runs_end_in_the_same_model_as_fsdp(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    def config(name: str, *overrides: str) -> Config:
        return prepare(make_config(inputs, tmp_path / name, "eval.steps=6", EPS, *overrides))

    json_file = tmp_path / "zero.json"
    json_file.write_text(
        json.dumps({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}})
    )
    zero = [
        config(f"zero_{stage}", "strategy=deepspeed", f"zero_stage={stage}") for stage in (1, 2, 3)
    ]
    zero.append(config("json", "strategy=deepspeed", f"deepspeed={json_file}"))
    [(expected, losses), *others] = run_ranks(
        run_all, 2, [config("fsdp", "strategy=fsdp"), *zero], timeout=500, deepspeed=True
    )[0]
    for settings, (summary, found) in zip(zero, others, strict=True):
        where = settings.storage
        assert summary["strategy"] == "deepspeed" and summary["skipped_steps"] == 0
        assert [step for step, _ in found] == [step for step, _ in losses]
        assert max(abs(a - b) for (_, a), (_, b) in zip(found, losses, strict=True)) < 1e-5, where
        model = AutoModelForCausalLM.from_pretrained(summary["export"])
        for name, tensor in exported(expected).items():
            assert (model.state_dict()[name] - tensor).abs().max() < 3e-5, f"{where}: {name}"
        for key in ("before", "after"):
            difference = abs(summary["eval"][key]["eval/loss"] - expected["eval"][key]["eval/loss"])
            assert difference < 1e-4, where
        assert summary["optimizer_state_bytes"] > 0 and summary["comm_bytes_per_step"] > 0


class CopyAt5(Callback):
    """Keeps the run folder as a run that is killed after 5 steps leaves it."""

    def __init__(self, target: Path):
        self.target = target

    def on_checkpoint(self, step: int, folder: Path) -> None:
        if step == 5:
            shutil.copytree(folder.parents[1], self.target, dirs_exist_ok=True)


def resume_all(pairs: list[tuple[Config, Config]]) -> list[tuple]:
    """Of each: the unbroken run, then the same one from where it was after 5 steps."""
    results = []
    for unbroken, again in pairs:
        losses, resumed = Losses(), Losses()
        expected = run(unbroken, [losses, CopyAt5(Path(again.storage) / str(again.run_name))])
        distributed.barrier()
        results.append((expected, losses.losses, run(again, [resumed]), resumed.losses))
    return results


def test_a_resumed_run_follows_the_unbroken_one(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    cases = [("zero_2", 2, "bf16"), ("zero_3", 3, "bf16"), ("zero_3_fp32", 3, "fp32")]
    pairs = []
    for name, stage, precision in cases:
        settings = (
            "strategy=deepspeed",
            f"zero_stage={stage}",
            f"train.precision={precision}",
            "checkpoint.steps=5",
            EPS,
        )
        pairs.append(
            tuple(
                prepare(make_config(inputs, tmp_path / name / part, *settings))
                for part in ("a", "b")
            )
        )
    results = run_ranks(resume_all, 2, pairs, timeout=150, deepspeed=True)[0]
    for (name, _, _), (expected, losses, found, resumed) in zip(cases, results, strict=True):
        assert resumed[0][0] == 6 and resumed[1:] == losses[3:], name
        weights = exported(found)
        assert all(
            torch.equal(tensor, weights[key]) for key, tensor in exported(expected).items()
        ), name


# ---- engines that others made


def foreign_engines() -> dict[str, Any]:
    found: dict[str, Any] = {}
    recipe = oracle.Recipe(steps_per_layer=2, lr=1e-3)
    for stage in (2, 3):
        # A scheduler of the engine's own sets the rate, across switches; the hook's schedule does
        # not.
        decay = partial(LambdaLR, lr_lambda=lambda step: 1 / (1 + step))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            lwo = zero.attach_engine(stage, recipe, tied=True, late=True, lr_scheduler=decay)
        found[f"rates {stage}"] = [training.train_step(lwo, step)[1].lr for step in range(5)]
        found[f"steps {stage}"] = lwo.model.global_steps
        found[f"warnings {stage}"] = [str(w.message) for w in caught if w.category is UserWarning]
        found[f"no clipping {stage}"] = lwo.model.optimizer.clip_grad
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lwo = zero.attach_engine(1, replace(recipe, eps=1e-5), tied=True, gradient_clipping=0.5)
        training.train_step(lwo, 0)
        found["clipping"] = lwo.model.optimizer.clip_grad
    found["clipping warnings"] = [str(w.message) for w in caught if w.category is UserWarning]
    engine = zero.make_engine(2, recipe, tied=True)
    with pytest.raises(UserError) as refused:
        lwo_dist.attach(engine, zero.lwo_config(replace(recipe, accumulation=2)))
    found["accumulation"] = str(refused.value)
    engine.basic_optimizer = torch.optim.SGD([torch.zeros(1)])
    with pytest.raises(UserError) as refused:
        lwo_dist.attach(engine, zero.lwo_config(recipe))
    found["SGD"] = str(refused.value)
    with pytest.raises(UserError) as refused:
        zero.attach_engine(0, recipe, tied=True)
    found["stage 0"] = str(refused.value)
    lwo = zero.attach_engine(1, oracle.Recipe(accumulation=2), tied=True)
    lwo.model.step()
    with pytest.raises(RuntimeError) as refused:
        training.train_step(lwo, 0)
    found["foreign step"] = str(refused.value)
    return found


def test_engines_that_others_made_are_driven_or_refused() -> None:
    found = run_ranks(foreign_engines, 2, timeout=200, deepspeed=True)[0]
    for stage in (2, 3):
        assert found[f"rates {stage}"] == pytest.approx([1e-3 / (1 + step) for step in range(5)])
        assert found[f"steps {stage}"] == 5
        said = " ".join(found[f"warnings {stage}"])
        assert (
            "scheduler LambdaLR sets the learning rate" in said
            and "lwo_dist.prepare(model, config)" in said
        )
        assert found[f"no clipping {stage}"] == 0.0  # not DeepSpeed's silent 1.0
    assert found["clipping"] == 0.5
    assert (
        "gradient_clipping = 0.5 of the deepspeed config wins over max_grad_norm = 0.0"
        in found["clipping warnings"]
    )
    assert (
        "gradient_accumulation_steps = 1, but LWOConfig's = 2; set them alike"
        in found["accumulation"]
    )
    assert "optimizer is SGD; layers are trained with AdamW" in found["SGD"]
    assert "set zero_optimization.stage to 1, 2 or 3" in found["stage 0"]
    assert "call lwo.backward() and lwo.step() instead" in found["foreign step"]


# ---- what stays after many switches


def after_switches(
    cases: list[tuple[int, str, dict]], switches: int
) -> list[tuple[list, list, list]]:
    results = []
    for stage, precision, settings in cases:
        lwo = zero.attach_engine(
            stage, oracle.Recipe(steps_per_layer=1), tied=False, precision=precision, **settings
        )
        tensors, hooks, resident = [], [], []
        for step in range(switches):
            training.train_step(lwo, step % 24)
            if step % 24 == 23:  # the same place of the cycle of six
                gc.collect()
                # Not the float64 sum of `train_step`: gloo's thread may still hold the last one.
                alive = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
                tensors.append(sum(tensor.dtype != torch.float64 for tensor in alive))
                del alive
                modules = list(lwo.module.modules())
                hooks.append(
                    sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)
                )
                resident.append(psutil.Process().memory_info().rss)
        results.append((tensors, hooks, resident))
    return results


@pytest.mark.long
def test_120_switches_leave_nothing_behind() -> None:
    cases = [(1, "bf16", FP32_SUMS), (2, "fp32", {}), (3, "fp32", {})]
    results = run_ranks(after_switches, 2, cases, 120, timeout=300, deepspeed=True)[0]
    for case, (tensors, hooks, resident) in zip(cases, results, strict=True):
        # The first samples hold what is left of the case before.
        assert max(tensors[2:]) == min(tensors[2:]) <= tensors[1], f"{case}: {tensors}"
        assert max(hooks) == min(hooks), f"{case}: {hooks}"
        assert resident[-1] - resident[1] < 8 * 2**20, f"{case}: {resident}"
