"""Every config of `launch/configs` runs to its end: with a tiny model, fewer ranks and short
sequences, and all else as the file says. `tests/unit/test_memory.py` holds them against the GPUs
that they name.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lwo_dist.config.reading import load_config
from lwo_dist.driver import prepare
from lwo_dist.run import run
from tests.code_samples import code, write_tree
from tests.models import save_tiny_model
from tests.ranks import run_ranks

CONFIGS = sorted((Path(__file__).parents[2] / "launch" / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_it_trains_and_exports(path: Path, tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model", [code(i) for i in range(20)])
    write_tree(tmp_path / "source")
    ranks = min(2, load_config(path).cluster.num_workers)
    settings = [
        f"model.name={tmp_path / 'model'}",
        f"data.source={tmp_path / 'source'}",
        f"storage={tmp_path / 'runs'}",
        "run_name=r",
        "train.steps=4",
        "train.sequence_length=64",
        "eval.num_lines=8",
        "eval.max_new_tokens=8",
        f"cluster.num_workers={ranks}",
        "tracking.enabled=false",
    ]
    ready = prepare(load_config(path, settings))
    summary = run_ranks(run, ranks, ready)[0]
    assert summary["steps"] == 4 and summary["skipped_steps"] == 0
    scores = summary["eval"]
    assert scores["after"]["eval/loss"] < scores["before"]["eval/loss"]
    assert (tmp_path / "runs" / "r" / "model" / "model.safetensors").is_file()
    rate = ready.lwo.lr or 0.019  # 0.6 / 32, the width of this model
    card = (tmp_path / "runs" / "r" / "model" / "README.md").read_text()
    assert f"learning rate {rate:g} (" in card
    assert json.loads((tmp_path / "runs" / "r" / "summary.json").read_text()) == summary
