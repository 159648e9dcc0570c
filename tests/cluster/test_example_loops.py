"""The loops of `launch/examples`, each on two ranks of torchrun, as their first lines say."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.cluster.launching import REPOSITORY, free_port
from tests.models import save_tiny_model

EXAMPLES = REPOSITORY / "launch" / "examples"
LOOPS = ("plain_loop.py", "fsdp2_loop.py", "deepspeed_loop.py", "accelerate_loop.py")


def launch(example: str, *arguments: str, folder: Path) -> str:
    """What the example prints on two ranks."""
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--master-port={free_port()}"]
    done = subprocess.run(
        [*launcher, "--nproc-per-node", "2", str(EXAMPLES / example), *arguments],
        cwd=folder,
        env=os.environ | {"GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def run(loop: str, steps: int, checkpoint: Path) -> list[tuple[int, float, str]]:
    """Step, loss and layer of each line that the loop prints."""
    arguments = ["--steps", str(steps), "--checkpoint", str(checkpoint)]
    printed = launch(loop, *arguments, folder=checkpoint.parent)
    lines = re.findall(r"^step (\d+)  loss ([\d.]+)  (\w+)$", printed, re.MULTILINE)
    return [(int(step), float(loss), layer) for step, loss, layer in lines]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[int, float, str]]]:
    folder = tmp_path_factory.mktemp("unbroken")
    loops = ("plain_loop.py", "fsdp2_loop.py", "accelerate_loop.py")
    found = {loop: run(loop, 6, folder / f"{loop}.pt") for loop in loops}
    # ZeRO computes what a plain loop does.
    return found | {"deepspeed_loop.py": found["plain_loop.py"]}


@pytest.mark.parametrize("loop", LOOPS)
def test_a_loop_learns_and_goes_on_from_its_checkpoint(
    loop: str, unbroken: dict[str, list[tuple[int, float, str]]], tmp_path: Path
) -> None:
    expected = unbroken[loop]
    assert [step for step, _, _ in expected] == [1, 2, 3, 4, 5, 6]
    assert [layer for _, _, layer in expected[::2]] == ["embed_head", "layer_0", "layer_1"]
    assert expected[-1][1] < expected[0][1] - 0.05
    # Three steps end in the middle of a visit.
    first = run(loop, 3, tmp_path / "checkpoint.pt")
    found = first + run(loop, 6, tmp_path / "checkpoint.pt")
    assert [(step, layer) for step, _, layer in found] == [(step, x) for step, _, x in expected]
    losses = [loss for _, loss, _ in expected]
    assert [loss for _, loss, _ in found] == pytest.approx(losses, abs=1e-5)
    # It went on: from the start its losses would be those of the first steps.
    assert found[3][1] != pytest.approx(found[0][1], abs=1e-3)


def test_the_trainer_learns_and_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    unbroken = train(6, tmp_path / "unbroken")
    assert [entry["lwo/active_layer"] for entry in unbroken] == [0, 0, 1, 1, 2, 2]
    assert unbroken[-1]["loss"] < unbroken[0]["loss"] - 0.05
    train(3, tmp_path / "broken")
    again = train(6, tmp_path / "broken")
    assert [entry["step"] for entry in again] == [1, 2, 3, 4, 5, 6]
    for key in ("loss", "grad_norm", "lwo/active_layer"):
        assert [entry[key] for entry in again] == [entry[key] for entry in unbroken]
    assert (tmp_path / "broken" / "model.safetensors").is_file()


def train(steps: int, output: Path) -> list[dict[str, Any]]:
    """What the example for transformers' Trainer logs, for each step."""
    arguments = ["--steps", str(steps), "--output", str(output)]
    launch("hf_trainer.py", *arguments, folder=output.parent)
    state = json.loads((output / f"checkpoint-{steps}" / "trainer_state.json").read_text())
    return [entry for entry in state["log_history"] if "loss" in entry]


def test_trl_learns_from_chats(tmp_path: Path) -> None:
    model = tmp_path / "model"
    save_tiny_model(model, ["def f(x):\n    return x\n"], vocabulary=300)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message.role }}: {{ message.content }}{{ eos_token }}"
        "{% endfor %}"
    )
    tokenizer.save_pretrained(model)
    arguments = ["--model", str(model), "--steps", "8", "--output", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "trl_sft.py"), *arguments],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "HF_HOME": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [float(loss) for loss in re.findall(r"'loss': '?([\d.]+)", done.stdout)]
    assert len(losses) == 8 and losses[-1] < losses[0]
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_every_example_is_run_and_says_how() -> None:
    others = {"common.py", "hf_trainer.py", "trl_sft.py"}
    assert {path.name for path in EXAMPLES.glob("*.py")} == {*LOOPS, *others}
    for loop in (*LOOPS, "hf_trainer.py"):
        port = "torchrun --master-port 29500 --nproc-per-node 2"
        assert f"    {port} launch/examples/{loop}\n" in (EXAMPLES / loop).read_text()
