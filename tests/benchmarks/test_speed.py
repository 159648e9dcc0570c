"""speed.py and links.py run, and what they count holds together; no test asserts their times."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import hosts
from tests.benchmarks.rivals import METHODS, SHAPES, Job, Rival, lwo, make_model, why_not

FOLDER = Path(__file__).parent
COLUMNS = {
    "model",
    "checkpointing",
    "method",
    "step_seconds",
    "flops",
    "floor_ratio",
    "peak_memory_bytes",
    "bytes_per_step",
    "switch_seconds",
}
RATIOS = {
    "model",
    "checkpointing",
    "lwo_over_lora",
    "lwo_over_full",
    "memory_lwo_over_lora",
    "hook_overhead",
    "switch_over_step",
}


def run(script: str, folder: Path, *words: str) -> tuple[dict[str, Any], str]:
    command = [sys.executable, str(FOLDER / script), *words, "--json", str(folder / "found.json")]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return json.loads((folder / "found.json").read_text()), result.stdout


def test_what_speed_counts(tmp_path: Path) -> None:
    found, printed = run("speed.py", tmp_path, "--models", "tiny", "--steps", "2", "--device=cpu")
    cases = {(case["method"], case["checkpointing"]): case for case in found["cases"]}
    skipped = {row["method"]: row["reason"] for row in found["skipped"]}
    assert set(METHODS) == {method for method, _ in cases} | set(skipped)
    for method, reason in skipped.items():
        missing = [name for name in METHODS[method].levers if reason.endswith(f"no field {name}")]
        assert missing or reason == f"{METHODS[method].package} is not installed"
        assert f"skipped: {method} of tiny: {reason}" in printed
    sizes = {name: p.numel() for name, p in make_model(Job(SHAPES["tiny"])).named_parameters()}
    for (method, recomputes), case in cases.items():
        assert set(case) >= COLUMNS
        inside = 2 if "embeddings" in METHODS[method].levers else 4
        assert case["visits"] == (inside if method.startswith(("lwo", "plain_lwo", "badam")) else 1)
        assert case["steps"] == 2 * 4
        rate = case["matmul_flops_per_second"]
        assert math.isclose(case["floor_ratio"], case["step_seconds"] * rate / case["flops"])
        assert (case["switch_seconds"] is None) == ("lora" in method or "full" in method)
        assert (case["flops"] > cases[method, False]["flops"]) == recomputes
        assert f"{case['step_seconds']:.4f}" in printed
    for recomputes in (False, True):
        ours, full = cases["lwo", recomputes], cases["full", recomputes]
        everything = 2 * 4 * sum(sizes.values())
        assert full["bytes_per_step"] == everything == 4 * ours["bytes_per_step"]
        assert ours["flops"] == cases["plain_lwo", recomputes]["flops"]
        assert ours["flops"] < full["flops"] == cases["plain_full", recomputes]["flops"]
        # Two moments of three layers in four; gradients come as activations go.
        more = everything * 3 / 4
        assert full["peak_memory_bytes"] - ours["peak_memory_bytes"] > 0.7 * more
    assert len(found["ratios"]) == sum(method.startswith("lwo") for method, _ in cases)
    for row in found["ratios"]:
        assert set(row) >= RATIOS
        own = cases[row["method"], row["checkpointing"]]
        lora = cases["lora", row["checkpointing"]]
        assert math.isclose(row["lwo_over_lora"], own["step_seconds"] / lora["step_seconds"])
        assert (row["hook_overhead"] is None) == (row["method"] != "lwo")


def test_a_lever_that_the_hook_lacks_is_skipped_by_name() -> None:
    assert why_not(Rival(lwo)) is None
    assert why_not(Rival(lwo, ("order", "warp"))) == "LWOConfig has no field warp"
    assert why_not(Rival(lwo, package="no_such_package")) == "no_such_package is not installed"


def test_what_links_counts(tmp_path: Path) -> None:
    reason = hosts.why_not()
    found, printed = run(
        "links.py", tmp_path, "--model=tiny", "--ranks=2", "--rates=100mbit", "--steps=2"
    )
    if reason is not None:
        assert found["cases"] == []
        assert {"method": "all", "reason": reason} in found["skipped"] and reason in printed
        pytest.skip(reason)
    cases = {case["method"]: case for case in found["cases"]}
    numel = sum(p.numel() for p in make_model(Job(SHAPES["tiny"])).parameters())
    # Each is a reduce-scatter and an all-gather; DDP's of everything, ours of one layer in four.
    # DDP shares its few bits of bookkeeping too.
    assert 8 * numel <= cases["ddp"]["counted_bytes"] < 8 * numel * 1.01
    assert cases["lwo_replicate"]["counted_bytes"] * 4 == 8 * numel
    assert cases["fsdp2"]["counted_bytes"] > cases["lwo_fsdp"]["counted_bytes"]
    for case in cases.values():
        assert case["ranks"] == 2 and case["rate"] == "100mbit"
        # Half of it stays on the rank. Besides there are headers, the norm and the barriers.
        assert case["sent_bytes"] > case["counted_bytes"] / 2, case
    rows = {row["method"]: row for row in found["ratios"]}
    assert set(rows) == {name for name in cases if name.startswith("lwo")}
    ratio = cases["ddp"]["step_seconds"] / cases["lwo_replicate"]["step_seconds"]
    assert math.isclose(rows["lwo_replicate"]["ddp_over_lwo"], ratio)
    assert f"{cases['ddp']['sent_bytes'] / 1e6:.2f}" in printed
