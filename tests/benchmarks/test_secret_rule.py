"""The benchmark of the secret rule runs, and reads every file with and without the rule."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def test_the_benchmark_reports_both_times_and_their_ratio(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.benchmarks.secret_rule", "--files", "20"]
    command += ["--rounds", "2", "--json", str(tmp_path / "out.json")]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["files"] == 20 and result["bytes"] > 20_000
    assert len(result["seconds_with_rule"]) == len(result["seconds_without_rule"]) == 2
    assert result["ratio"] > 0
