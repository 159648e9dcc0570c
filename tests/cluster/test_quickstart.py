"""The newcomer's command, from a fresh clone in an empty HOME: long, because it installs
everything.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("new comer") / "lwo dist"
    subprocess.run(["git", "clone", "--quiet", str(REPOSITORY), str(folder)], check=True)
    return folder


def quickstart(clone: Path, *arguments: str) -> str:
    home = clone.parent / "home"
    home.mkdir(exist_ok=True)
    kept = ("PATH", "LANG", "PIP_", "SSL_", "TMPDIR")
    environment = {k: v for k, v in os.environ.items() if k.startswith(kept)} | {"HOME": str(home)}
    done = subprocess.run(
        [str(clone / "launch" / "quickstart.sh"), *arguments],
        cwd=home,
        env=environment,
        capture_output=True,
        text=True,
        timeout=3000,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.long
def test_the_quickstart_makes_a_real_model_better(clone: Path) -> None:
    out = quickstart(clone, "run_name=first")
    summary = json.loads((clone / "runs" / "first" / "summary.json").read_text())
    scores = summary["eval"]
    assert scores["after"]["eval/lines"] >= 200
    assert scores["before"]["eval/edit_similarity"] > 35  # as that of a model that knows code
    assert scores["gain_95"]["loss"]["low"] > 0 and scores["gain_95"]["edit_similarity"]["low"] > 0
    assert re.search(r"lines exactly right +\d+ +\d+", out) and str(summary["export"]) in out
    assert len(out.splitlines()) < 60
    model = AutoModelForCausalLM.from_pretrained(summary["export"])
    tokenizer = AutoTokenizer.from_pretrained(summary["export"])
    prompt = tokenizer("def main():\n", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=8).shape[1] > prompt.input_ids.shape[1]

    # A repository of one's own: here a git repository with a few files.
    source = clone.parent / "my repository"
    source.mkdir()
    for i, path in enumerate(sorted((REPOSITORY / "lwo_dist").rglob("*.py"))):
        (source / f"{i}_{path.name}").write_text(path.read_text())
    for command in (["init", "-q"], ["add", "-A"]):
        subprocess.run(["git", "-C", str(source), *command], check=True)
    quickstart(
        clone, "--source", str(source), "run_name=own", "train.steps=20", "eval.num_lines=100"
    )
    assert (clone / "runs" / "own" / "model" / "model.safetensors").is_file()
