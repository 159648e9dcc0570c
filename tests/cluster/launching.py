"""Small runs through the real commands."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.models import save_tiny_model

__all__ = ["REPOSITORY", "STEPS", "command", "environment", "make_inputs", "run", "torchrun"]

REPOSITORY = Path(__file__).parents[2]
STEPS = 6


def make_inputs(folder: Path) -> Path:
    """Make `model`, `source` and `home` in `folder`; runs go into `runs`."""
    (folder / "source").mkdir(parents=True)
    for i in range(8):
        lines = "".join(f"    total_{i} += values[{j}]  # line {j}\n" for j in range(15))
        (folder / "source" / f"module_{i}.py").write_text(f"def function_{i}(values):\n{lines}")
    save_tiny_model(folder / "model", [path.read_text() for path in (folder / "source").iterdir()])
    (folder / "home").mkdir()
    return folder


def environment(folder: Path, **more: str) -> dict[str, str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_", "HF_", "OMP_"))}
    return inherited | {"HOME": str(folder / "home"), "PYTHONPATH": str(REPOSITORY)} | more


def overrides(folder: Path, run_name: str, *more: str) -> list[str]:
    return [
        "-c", f"{REPOSITORY}/launch/configs/debug_cpu.yaml",
        f"model.name={folder}/model", f"data.source={folder}/source", f"storage={folder}/runs", f"run_name={run_name}",
        f"train.steps={STEPS}", "train.global_batch_size=4", "train.sequence_length=32", "train.logging_steps=2",
        "eval.num_lines=4", "eval.max_new_tokens=4", "tracking.enabled=false", *more,
    ]  # fmt: skip


def command(folder: Path, run_name: str, *more: str) -> list[str]:
    return [sys.executable, "-m", "lwo_dist.cli", "train", *overrides(folder, run_name, *more)]


def torchrun(folder: Path, run_name: str, *more: str, script: Path | None = None) -> list[str]:
    """Two ranks of `launch/train.py`, or of another script that takes the same arguments."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return [*launcher, str(script or REPOSITORY / "launch" / "train.py"), *overrides(folder, run_name, *more)]


def run(command: list[str], environment: dict[str, str], timeout: float = 600) -> subprocess.CompletedProcess[str]:
    # Started elsewhere than the storage lies, because the workers' own folder is elsewhere, too.
    return subprocess.run(
        command, cwd=environment["HOME"], env=environment, capture_output=True, text=True, timeout=timeout
    )
