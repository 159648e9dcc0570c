"""A comparison whose runs are runs on Ray."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from .launching import environment, make_inputs, overrides


def test_the_runs_of_a_comparison_are_runs_on_ray(tmp_path: Path) -> None:
    """Two workers each. Both methods start from the same scores, and the page has both."""
    folder = make_inputs(tmp_path)
    settings = [s for s in overrides(folder, "") if not s.startswith("run_name=")]
    settings += ["cluster.num_workers=2", "--name=cmp", "--methods=lwo,lora"]
    settings += ["--seeds=1", "--rates=1e-2", "--no-equal-time"]
    done = subprocess.run(
        [sys.executable, "-m", "lwo_dist.cli", "compare", *settings],
        env=environment(folder, OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("starting Ray") == 2
    found = json.loads((folder / "runs" / "cmp" / "comparison.json").read_text())
    assert [(row["method"], row["status"]) for row in found["rows"]] == [
        ("lwo", "done"),
        ("lora", "done"),
    ]
    lwo, lora = found["rows"]
    assert lwo["world_size"] == lora["world_size"] == 2
    assert lwo["before"] == lora["before"]
    assert lwo["scores"] != lora["scores"]
    assert lora["serve_bytes"] < lwo["serve_bytes"]
    assert "lwo against lora" in done.stdout
