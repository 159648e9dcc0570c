"""The benchmark of the README runs and shows the effect."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.long
def test_discard_leaves_weights_unmoved_that_parked_masters_move(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "tests.benchmarks.rounding",
        "--lr",
        "1e-5",
        "--pretrain-steps",
        "40",
    ]
    subprocess.run([*command, "--json", str(tmp_path / "out.json")], cwd=REPOSITORY, check=True)
    host, discard = json.loads((tmp_path / "out.json").read_text())["cases"]
    assert (host["inactive_master"], discard["inactive_master"]) == ("host", "discard")
    assert (
        host["reduction"] > 0 and host["unchanged_share"] < 0.01 < 0.2 < discard["unchanged_share"]
    )
    assert host["warning"] is None and "steps_per_layer x lr = 1.0e-04" in discard["warning"]
