"""A whole run in bf16 storage with kept moments: resumed, it is the unbroken one."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from lwo_dist.driver import prepare
from tests.distributed.test_deepspeed_run import resume_all
from tests.distributed.test_run import exported, inputs, make_config
from tests.ranks import run_ranks

__all__ = ["inputs"]  # the fixture


def test_a_run_in_bf16_storage_resumes_bitwise(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    settings = (
        "fsdp.storage=bf16",
        "train.precision=bf16",
        "lwo.state=keep",
        "lwo.steps_per_layer=2",
        "lwo.order=ascending",
        # in mid-visit of the third layer of four; 14 steps are nearly two cycles
        "checkpoint.steps=5",
    )
    pair = tuple(prepare(make_config(inputs, tmp_path / part, *settings)) for part in ("a", "b"))
    expected, losses, found, resumed = run_ranks(resume_all, 2, [pair], timeout=200)[0][0]
    assert resumed[0][0] == 6 and resumed[1:] == losses[3:]
    weights = exported(found)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in exported(expected).items())
    assert expected["loss_last"] < expected["loss_first"]
    # What is exported are the masters: bf16 would have rounded them, and the base model's weights
    # are not bf16 either.
    base = load_file(inputs[0] / "model.safetensors")
    trained = [
        name
        for name in weights
        if name in base and not torch.equal(weights[name], base[name].bfloat16().float())
    ]
    assert trained and all(
        not torch.equal(weights[n], weights[n].bfloat16().float()) for n in trained
    )
