"""recipes.py: from sources to a table; a finished run is not repeated."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tests.benchmarks import recipe_runs, recipes
from tests.models import save_tiny_model

LWO = {"lr": 1e-3, "stateless": "all", "embeddings": "always"}


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe_runs, "LENGTH", 64)  # prepare is told 32
    monkeypatch.setattr(recipe_runs, "TAKEN_FROM", 8)
    monkeypatch.setattr(recipes, "TURNS", 3)
    monkeypatch.setattr(recipes, "UNTIMED", 1)


def package(folder: Path, line: Callable[[int, int], str]) -> Path:
    """16 files of 20 lines, line(file, number), and a model of their words in `folder`/model."""
    source = folder / "package"
    source.mkdir()
    for i in range(16):
        lines = [line(i, j) for j in range(20)]
        (source / f"module_{i}.py").write_text("\n".join(["def f(values):", *lines, ""]))
    save_tiny_model(folder / "model", [path.read_text() for path in source.iterdir()])
    return source


def test_from_sources_to_a_table(
    short: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = package(tmp_path, lambda i, j: f"    total_{i} = total_{i} + values[{j}]")
    model, data = tmp_path / "model", tmp_path / "data.pt"
    wanted: list[dict[str, Any]] = [
        {"source": "package", "method": method, "lwo": lwo, "steps": 3, "seed": 0}
        for method, lwo in (("lwo", LWO), ("full", {"lr": 1e-3}), ("lora", {"lr": 1e-3}))
    ]
    runs, results = tmp_path / "runs.jsonl", tmp_path / "results.jsonl"
    runs.write_text("\n".join(map(json.dumps, wanted)))
    where = ["--model", str(model), "--data", str(data), "--device", "cpu"]
    recipes.main(["prepare", *where, "--length", "32", str(source)])
    again = ["run", *where, "--list", str(runs), "--results", str(results)]
    recipes.main(again)
    claims = results.with_suffix(".claims")
    first, *others = results.read_text().splitlines(keepends=True)
    claims.unlink()
    recipes.main(again)  # all are done
    assert not claims.exists()
    # An interrupted process had taken the first run.
    results.write_text("".join(others))
    claims.write_text(json.dumps(wanted[0], sort_keys=True) + "\n")
    capsys.readouterr()
    recipes.main(again)
    assert (
        f"1 runs have no result yet and are another process's; if there is none, remove {claims}"
        in (capsys.readouterr().out)
    )
    results.write_text("".join([first, *others]))
    found = [json.loads(line) for line in results.read_text().splitlines()]
    assert [run["method"] for run in found] == ["lwo", "full", "lora"]
    for run in found:
        assert [step for step, _, _ in run["curve"]] == [1, 2, 3]
        assert run["curve"][-1][1] < run["curve"][0][1]  # it learns
    capsys.readouterr()
    recipes.main(["table", *where, "--results", str(results)])
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 2 + 3
    assert rows[1].count("|") == rows[0].count("|") == rows[2].count("|")
    assert "lwo: lr 0.001, stateless all, embeddings always, 2 iterations | 3 |" in rows[2]
    recipes.main(["intervals", "--results", str(results)])
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 2 + 2  # lwo and full, against lora
    gain = found[2]["loss"] - found[0]["loss"]
    assert f"| 3 | lora: lr 0.001; 3 steps | 1 | {gain:+.3f} (" in rows[2]
    recipes.main(["tokens", "--results", str(results)])
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 2 + 3
    all_tokens = sum(number for _, number, _ in found[0]["by_count"])
    of_classes = sum(number * loss for _, number, loss in found[0]["by_count"] if number)
    assert of_classes / all_tokens == pytest.approx(found[0]["loss"], abs=1e-4)
    recipes.main(["time", *where, "--list", str(runs)])
    rows = capsys.readouterr().out.splitlines()
    assert [row.split(" | ")[0] for row in rows[3:]] == ["| full: lr 0.001", "| lora: lr 0.001"]
    assert rows[2].split(" | ")[2] == "1.00"
    recipes.main(["picture", *where, "--results", str(results)])
    assert results.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    # Runs from before the field was there took five iterations: other runs, with more operations.
    old = {key: value for key, value in found[0].items() if key != "iterations"}
    results.write_text("".join(f"{json.dumps(run)}\n" for run in (old, *found[1:])))
    claims.unlink()
    recipes.main(again)
    assert [json.loads(line) for line in claims.read_text().splitlines()] == [wanted[0]]
    # Runs at another length are other runs, with other operations.
    longer = {**found[1], "length": 64}
    results.write_text("".join(f"{json.dumps(run)}\n" for run in (found[0], longer, found[2])))
    claims.unlink()
    recipes.main(again)
    assert [json.loads(line) for line in claims.read_text().splitlines()] == [wanted[1]]
    model_of = AutoModelForCausalLM.from_pretrained(model)
    two, five, none = (
        recipes.flops_of_step(run, model_of) for run in (found[0], old, {**old, "iterations": 0})
    )
    assert none < two
    assert (five - none) / (two - none) == pytest.approx(5 / 2)


class _Fixed(nn.Module):
    """Gives every next token of `known` a logit of 10, and of others one of 0."""

    def __init__(self, known: Tensor):
        super().__init__()
        self.known = known

    def forward(self, input_ids: Tensor) -> Any:
        logits = torch.zeros((*input_ids.shape, 16))
        logits[:, :-1].scatter_(2, self.known[:, 1:, None], 10.0)
        self.logits = logits
        return self


def test_a_line_is_right_if_every_token_is(short: None) -> None:
    ids = torch.arange(32).remainder(16).view(1, 32)
    lines = torch.arange(32).floor_divide(4).view(1, 32)  # 4 tokens each
    known = ids.clone()
    known[0, 17] += 1  # in line 4
    data = {"held": ids, "lines": lines}
    losses, hits = recipe_runs.score(_Fixed(known), data, "cpu", "fp32")
    assert losses.shape == (1, 31)
    # Lines 0 and 1 begin too early, and the last one may go on.
    assert hits == ["11011"]
    right = math.log(math.exp(10) + 15) - 10
    assert losses.mean().item() == pytest.approx((30 * right + right + 10) / 31)


def test_tokens_are_classed_by_how_often_they_were_trained_on() -> None:
    held = torch.tensor([[9, 0, 1, 2], [9, 3, 4, 3]])
    seen = torch.tensor([[1, 2, 2], [2, 4, 4]])  # 0 and 3 never, 1 once, 2 three times, 4 twice
    losses = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    found = recipe_runs.by_count(losses, held, seen)
    none = [[least, 0, None] for least in (11, 51, 301)]
    assert found == [[0, 3, pytest.approx(11 / 3, abs=1e-4)], [1, 2, 3.5], [3, 1, 3.0], *none]


def test_written_lines_are_right_where_every_token_was_the_likeliest(
    short: None, tmp_path: Path
) -> None:
    source = package(tmp_path, lambda i, j: f"    total = total + values[{i * j % 7}]")
    folder, data = tmp_path / "model", tmp_path / "data.pt"
    where = ["--model", str(folder), "--data", str(data)]
    recipes.main(["prepare", *where, "--length", "32", str(source)])
    own = torch.load(data)["package"]
    base, tokenizer = recipe_runs.load(folder)
    run = {"source": "package", "method": "full", "lwo": {"lr": 1e-2}, "steps": 60, "seed": 0}
    training = recipe_runs.Training(run, base, own["train"], "cpu")
    for _ in range(run["steps"]):
        training.step()
    model = training.lwo.model
    hits = "".join(recipe_runs.score(model, own, "cpu", "fp32")[1])
    assert 0 < hits.count("1") < len(hits)
    found = recipe_runs.write(model, own, "cpu", "fp32", tokenizer)
    assert found["written_exact"] == pytest.approx(100 * hits.count("1") / len(hits), abs=0.01)
    assert found["written_exact"] <= found["edit_similarity"] < 100


def test_intervals_are_over_sequences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of two seeds, and weighted by the number of lines of a sequence."""

    def run(method: str, steps: int, seed: int, *hits: str) -> str:
        lwo = {"lr": 1e-3}
        named = {"source": "p", "method": method, "lwo": lwo, "steps": steps, "seed": seed}
        losses = [1.0 + (method == "lora"), 2.0, 3.0]
        return json.dumps({**named, "loss": steps / 10, "losses": losses, "hits": hits})

    results = tmp_path / "results.jsonl"
    lines = [
        run("lora", 5, 0, "0000", "10", ""),
        run("lora", 5, 1, "0000", "10", ""),
        run("lora", 9, 0, "1111", "11", ""),  # a higher loss
        run("lwo", 3, 0, "1100", "10", ""),
        run("lwo", 3, 1, "1000", "10", ""),
        run("lwo", 3, 2, "1111", "11", ""),  # a seed that LoRA lacks
    ]
    results.write_text("\n".join(lines))
    recipes.main(["intervals", "--results", str(results)])
    (row,) = capsys.readouterr().out.splitlines()[2:]
    assert "| lora: lr 0.001; 5 steps | 2 | +0.333 (+0.000 to +1.000) |" in row
    assert "| +25.00 (" in row  # 1.5 of 6 lines
