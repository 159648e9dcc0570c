"""The benchmark of method lora runs and says what it should; what it measures is nobody's to
assert.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("lora.py")


def test_the_benchmark_of_lora_runs(tmp_path: Path) -> None:
    sizes = {"hidden": 16, "layers": 1, "vocabulary": 32, "length": 8, "steps": 2, "warm-up": 1}
    small = [f"--{name}={size}" for name, size in sizes.items()]
    command = [sys.executable, str(SCRIPT), *small, "--json", str(tmp_path / "lora.json")]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    [case] = json.loads((tmp_path / "lora.json").read_text())["cases"]
    assert (case["rank"], case["steps"], case["tokens"]) == (16, 2, 16)
    ratio = case["lora_step_seconds"] / case["plain_step_seconds"]
    assert math.isclose(case["lora_over_plain"], ratio) and ratio > 0
    assert f"{ratio:.3f}" in result.stdout.splitlines()[-1]
