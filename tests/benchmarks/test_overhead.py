"""The benchmark of the hook's overhead runs and says what it should; no test asserts its times."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("overhead.py")


@pytest.mark.parametrize("method", ["lwo", "lora"])
def test_the_benchmark_of_the_hook_runs(tmp_path: Path, method: str) -> None:
    sizes = {"hidden": 16, "layers": 1, "vocabulary": 32, "length": 8, "steps": 2, "warm-up": 1}
    small = [f"--{name}={size}" for name, size in sizes.items()]
    command = [sys.executable, str(SCRIPT), "--method", method, *small]
    command += ["--json", str(tmp_path / "found.json")]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    [case] = json.loads((tmp_path / "found.json").read_text())["cases"]
    assert (case["method"], case["steps"], case["tokens"]) == (method, 2, 16)
    ratio = case["hook_step_seconds"] / case["plain_step_seconds"]
    assert math.isclose(case["hook_overhead"], ratio) and ratio > 0
    assert f"{ratio:.3f}" in result.stdout.splitlines()[-1]
