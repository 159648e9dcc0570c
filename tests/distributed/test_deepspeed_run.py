"""DeepSpeed around the strategy: whole runs, late engines, schedulers, what is refused, what a switch costs."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lwo_dist import distributed
from lwo_dist.callback import Callback
from lwo_dist.config import Config
from lwo_dist.run import prepare, run
from tests.distributed.test_run import Losses, exported, inputs, make_config, run_and_record
from tests.ranks import run_ranks

__all__ = ["inputs"]  # the fixture

# Not imported here: the ranks import it through us, as a user's process does.
pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")

EPS = "lwo.eps=1e-6"


def run_all(configs: list[Config]) -> list[tuple[Any, list]]:
    return [run_and_record(config) for config in configs]


def test_runs_end_in_the_same_model_as_fsdp(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    def config(name: str, *overrides: str) -> Config:
        return prepare(make_config(inputs, tmp_path / name, "eval.steps=6", EPS, *overrides))

    json_file = tmp_path / "zero.json"
    json_file.write_text(json.dumps({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}))
    zero = [config(f"zero_{stage}", "strategy=deepspeed", f"zero_stage={stage}") for stage in (1, 2, 3)]
    zero.append(config("json", "strategy=deepspeed", f"deepspeed={json_file}"))
    [(expected, losses), *others] = run_ranks(run_all, 2, [config("fsdp", "strategy=fsdp"), *zero], timeout=500)[0]
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
        pairs.append(tuple(prepare(make_config(inputs, tmp_path / name / part, *settings)) for part in ("a", "b")))
    results = run_ranks(resume_all, 2, pairs, timeout=150)[0]
    for (name, _, _), (expected, losses, found, resumed) in zip(cases, results, strict=True):
        assert resumed[0][0] == 6 and resumed[1:] == losses[3:], name
        weights = exported(found)
        assert all(torch.equal(tensor, weights[key]) for key, tensor in exported(expected).items()), name
