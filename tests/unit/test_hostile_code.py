"""Code that comes with a hostile run is not run, and its terminal escapes are not printed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

from lwo_dist.checkpoint.format import newest_checkpoint
from lwo_dist.cli import main
from lwo_dist.config import ModelConfig
from lwo_dist.errors import UserError, first_line
from lwo_dist.models.source import PretrainedSource, load_tokenizer
from lwo_dist.storage import RunFolder
from lwo_dist.tasks.scores import Score
from lwo_dist.tracking.sender import reason
from tests import hostile
from tests.hostile import (
    CODE,
    ESCAPE,
    MARKER,
    Case,
    commands,
    resume,
)

case = hostile.case
no_hub = hostile.no_hub


# ---- trust


def add_code(case: Case, code_in: str = "modeling_mine.Mine") -> None:
    """A model defined only by its own code."""
    case.put("modeling_mine.py", CODE)
    case.put_json(
        "config.json",
        lambda values: {
            **values,
            "model_type": "mine",
            "auto_map": {"AutoConfig": code_in, "AutoModelForCausalLM": code_in},
        },
    )
    state = case.state()
    state["run"]["trust_remote_code"] = True
    case.reseal(state)


@pytest.mark.parametrize("code_in", ["modeling_mine.Mine", "someone/else--modeling.Mine"])
def test_a_run_cannot_make_an_export_run_its_code(
    case: Case, code_in: str, capsys: pytest.CaptureFixture[str]
) -> None:
    add_code(case, code_in)
    assert main(["export", str(case.run), "--to", str(case.run / "model")]) == 2
    said = capsys.readouterr().err
    assert code_in in said and str(case.step) in said and "--trust-remote-code" in said
    assert not MARKER.exists() and not (case.run / "model").exists()


def test_an_export_runs_the_code_with_trust_remote_code(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(case.run.parent / "modules"))
    add_code(case)
    target = str(case.run / "model")
    # The code defines no model.
    assert main(["export", str(case.run), "--to", target, "--trust-remote-code"]) == 2
    assert MARKER.exists()


def test_a_resume_does_not_run_code_of_the_run(case: Case) -> None:
    add_code(case)
    checkpoint = newest_checkpoint(RunFolder.at(str(case.run)))
    assert checkpoint is not None
    source = PretrainedSource(ModelConfig(name=str(checkpoint.folder)))
    for build in (source.empty, lambda: source.whole(torch.device("cpu"))):
        with pytest.raises(UserError, match="set model.trust_remote_code: true"):
            build()
    assert not MARKER.exists()


def test_code_beside_a_model_or_tokenizer_that_needs_none_is_not_run(case: Case) -> None:
    case.put("modeling_mine.py", CODE)
    for name, classes in {
        "config.json": {"AutoModelForCausalLM": "modeling_mine.Mine"},
        "tokenizer_config.json": {"AutoTokenizer": ["modeling_mine.Mine", None]},
    }.items():
        case.put_json(name, lambda values, classes=classes: {**values, "auto_map": classes})
    checkpoint = newest_checkpoint(RunFolder.at(str(case.run)))
    assert checkpoint is not None
    config = ModelConfig(name=str(checkpoint.folder))
    PretrainedSource(config).empty()
    PretrainedSource(config).whole(torch.device("cpu"))
    load_tokenizer(config)
    assert main(["export", str(case.run), "--to", str(case.run / "model")]) == 0
    assert not MARKER.exists()


def test_code_of_a_method_is_not_run(
    case: Case, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    case.put("modeling_mine.py", CODE)
    state = case.state()
    state["run"]["method"] = "modeling_mine:Mine"
    case.reseal(state)
    monkeypatch.syspath_prepend(str(case.step))
    assert main(["export", str(case.run), "--to", str(case.run / "model")]) == 2
    assert "code that a file names is not run" in capsys.readouterr().err
    assert not MARKER.exists()


def test_a_run_cannot_choose_the_folder_of_the_licence(case: Case) -> None:
    (case.outside / "README.md").write_text("---\nlicense: secret-licence\n---\n")
    state = case.state()
    state["run"]["base_model"] = str(case.outside)
    case.reseal(state)
    assert main(["export", str(case.run), "--to", str(case.run / "model")]) == 0
    assert "secret-licence" not in (case.run / "model" / "README.md").read_text()


# ---- terminal output


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.update(active_layer=ESCAPE),
        lambda state: state["run"].update(method=ESCAPE),
        lambda state: state["moments"].update({"embed": ESCAPE}),
        lambda state: state["sha256"].update({ESCAPE: "0" * 64}),
        lambda state: state["results"].update({ESCAPE: 1, "losses": ESCAPE}),
        lambda state: state["results"]["evaluations"]["0"].update({f"eval/{ESCAPE}": ESCAPE}),
    ],
)
def test_no_terminal_escape_is_printed(
    case: Case, change: Callable[[Any], None], capsys: pytest.CaptureFixture[str]
) -> None:
    state = case.state()
    change(state)
    case.reseal(state)
    for command in commands(str(case.run), case.run.parent / "out"):
        main(command)
    try:
        resume(RunFolder.at(str(case.run)))
    except UserError as error:
        assert str(error)
    assert "\x1b" not in "".join(capsys.readouterr())


def test_no_escape_comes_with_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for line in (first_line(OSError(f"{ESCAPE}\n{ESCAPE}")), reason(RuntimeError(ESCAPE * 99))):
        assert line.isprintable() and len(line) <= 300

    class Cluster:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def lines(self) -> list[str]:
            return [f"job-{ESCAPE}  RUNNING"]

        def stop(self, job: str) -> str:
            return f"job-{ESCAPE}"

    class Server:
        def __init__(self, *_: Any) -> None: ...

        def find_experiment(self, name: str) -> str:
            return ESCAPE

    monkeypatch.setattr("lwo_dist.cluster.jobs.Jobs", Cluster)
    monkeypatch.setattr("lwo_dist.tracking.mlflow.MLflowStore", Server)
    address = ["--address", "http://localhost:1"]
    for command in (
        ["jobs", "list", *address],
        ["jobs", "stop", *address, "job"],
        ["ui", "tracking.uri=http://localhost:1"],
    ):
        assert main(command) == 0
        out, _ = capsys.readouterr()
        assert "owned" in out and "\x1b" not in out and "\x07" not in out


def test_a_run_cannot_put_markup_into_the_model_card(case: Case) -> None:
    markup = "<script>`[x](http://evil)|\n# Pay here\n```python\nimport evil\n```\n---\n"
    state = case.state()
    for key in ("run_name", "task", "base_model", "source", "licence", "revision"):
        state["run"][key] = f"{markup}{key}"
    for values in (state["run"]["lwo"], state["run"]["train"], state["run"]["versions"]):
        values |= {key: markup for key, value in values.items() if isinstance(value, str)}
    state["run"]["data"] = {markup: 1}
    name = Score(f"x{markup}", markup, markup)
    state["run"] |= {"scores": [asdict(name)], "example": [markup, markup]}
    count = {f"eval/{markup}": 3.0}
    state["results"]["evaluations"] = {
        "0": {name.key: 1.0, **count},
        "11": {name.key: 2.0, **count},
    }
    case.reseal(state)
    gain = {"mean": 1.0, "low": 0.0, "high": 2.0}
    summary = {"eval": {"best_step": 11, "gain_95": {name.name: gain}}}
    (case.run / "summary.json").write_text(json.dumps(summary))
    target = case.run / "model"
    assert main(["export", str(case.run), "--to", str(target)]) == 0
    text = ModelCard.load(target / "README.md").text
    assert "evil" in text and "+1.00 (+0.00 to +2.00)" in text
    for found in ("<script", "[x](", "\n# Pay", "\nimport evil"):
        assert found not in text
    assert len(re.findall("```", text)) == 2  # the usage
    assert all(line.count("|") in (0, 5) for line in text.splitlines())


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"\xff", b"{}", b'{"eval": {"best_step": 11, "gain_95": {"loss": 1}}}']
)
def test_a_malformed_summary_only_costs_the_intervals(case: Case, data: bytes) -> None:
    (case.run / "summary.json").write_bytes(data)
    assert main(["export", str(case.run), "--to", str(case.run / "model")]) == 0
    assert " held-out lines | before |" in (case.run / "model" / "README.md").read_text()
