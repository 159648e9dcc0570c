"""`test.sh --gpu` runs to its end without a GPU too, and says what it skips."""

from __future__ import annotations

import json
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch

TEST = Path(__file__).parents[2] / "launch" / "test.sh"


def gpu_suite(*options: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(TEST), "--gpu", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def make_wheel(folder: Path, code: str) -> None:
    """A wheel of a package `sitecustomize`, which Python imports at its start."""
    folder.mkdir()
    with zipfile.ZipFile(folder / "marker-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("sitecustomize.py", code)
        about = "marker-1.0.dist-info"
        wheel.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: marker\nVersion: 1.0\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\n")
        wheel.writestr(f"{about}/RECORD", "")


def test_it_runs_what_works_and_says_what_it_skips(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("the suite itself is for this machine")
    seen = tmp_path / "seen"
    make_wheel(tmp_path / "wheels", f"open({str(seen)!r}, 'w').close()\n")
    figures = tmp_path / "figures"
    done = gpu_suite("--wheels", str(tmp_path / "wheels"), "--json", str(figures))
    assert done.returncode == 0, done.stdout + done.stderr
    assert seen.exists()  # the wheels are on the path
    rows = {line.split(" (")[0] for line in done.stdout.splitlines()}
    for strategy in ("replicate", "fsdp"):
        assert f"ok       oracle, {strategy}, state: keep" in rows
    assert {"skipped  parks", "skipped  NVML", "skipped  speed.py: no GPU"} <= rows
    assert json.loads((figures / "gpu.json").read_text())


def test_a_wrong_option_is_one_line() -> None:
    done = gpu_suite("--everything")
    assert done.returncode != 0
    assert "--everything: --gpu takes --wheels FOLDER and --json FOLDER" in done.stderr
