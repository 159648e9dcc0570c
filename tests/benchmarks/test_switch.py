"""The benchmark of the switch runs and says what it should; what it measures is nobody's to
assert.
"""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("switch.py")


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
def test_the_benchmark_of_the_switch_runs(tmp_path: Path) -> None:
    small = [
        "--stages",
        "2",
        "--hidden",
        "16",
        "--layers",
        "1",
        "--vocabulary",
        "32",
        "--visits",
        "3",
        "--steps",
        "2",
    ]
    command = [sys.executable, str(SCRIPT), *small, "--json", str(tmp_path / "switch.json")]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    [case] = json.loads((tmp_path / "switch.json").read_text())["cases"]
    assert (case["stage"], case["steps"], case["switches"]) == (2, 6, 3)
    for key in ("step_seconds", "first_step_seconds", "switch_seconds"):
        assert case[key] > 0, key
    assert math.isclose(case["switch_over_step"], case["switch_seconds"] / case["step_seconds"])
    assert f"{case['switch_over_step']:.3f}" in result.stdout.splitlines()[-1]
