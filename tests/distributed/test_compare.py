"""Whole comparisons, each run in a process of its own: what they write, and how one that was killed
goes on.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient

from lwo_dist.compare.child import run_children
from lwo_dist.config.reading import make_config
from tests.code_samples import code, git, write_tree
from tests.models import save_tiny_model

SETTINGS = (
    "train.steps=6",
    "train.global_batch_size=4",
    "train.sequence_length=64",
    "train.logging_steps=2",
    "eval.num_lines=8",
    "eval.max_new_tokens=6",
    "eval.steps=3",
    "lwo.steps_per_layer=2",
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_tree(folder / "src", files=16)
    save_tiny_model(folder / "model", [code(i) for i in range(4)])
    return folder


def command(
    inputs: Path, storage: Path, *arguments: str, name: str = "cmp", settings: Sequence[str] = ()
) -> list[str]:
    program = Path(sys.executable).parent / "lwo-dist"
    places = [f"data.source={inputs / 'src'}", f"model.name={inputs / 'model'}"]
    own = [*places, f"storage={storage}", *SETTINGS, *settings]
    return [str(program), "compare", "--name", name, "--without-ray", *own, *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}


def compare(inputs: Path, storage: Path, *arguments: str, name: str = "cmp") -> dict[str, Any]:
    done = subprocess.run(
        command(inputs, storage, *arguments, name=name),
        capture_output=True,
        text=True,
        timeout=600,
        env=environment(),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {**read(storage, name), "printed": done.stdout}


def read(storage: Path, name: str = "cmp") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((storage / name / "comparison.json").read_text())
    return found


def scores_of(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Every run's scores: what does not depend on how busy the machine is."""
    return [
        {
            "run": row["run_name"],
            "lr": row["lr"],
            "scores": [point["scores"] for point in row["curve"]],
        }
        for row in (*found["sweep"], *found["rows"])
    ]


WHOLE = ("--seeds=2", "--rates=1e-3,1e-1", "--sweep-steps=2", "--jobs=2")


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """Two methods, and one that cannot read its model."""
    storage = tmp_path_factory.mktemp("whole")
    shutil.copytree(inputs / "model", inputs / "damaged")
    weights = inputs / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    damaged = inputs / "damaged.yaml"
    damaged.write_text(f"method: full\nmodel: {{name: {inputs / 'damaged'}}}\n")
    return storage, compare(inputs, storage, f"--methods={damaged},lwo,full", *WHOLE)


def test_each_method_gets_the_same_search_and_its_own_best_rate(whole):
    _, found = whole
    for method in ("lwo", "full"):
        tries = {row["lr"]: row for row in found["sweep"] if row["method"] == method}
        assert {1e-3, 1e-1} <= tries.keys()
        losses = {lr: row["scores"]["loss"] for lr, row in tries.items()}
        assert found["rates"]["completion"][method] == min(losses, key=losses.__getitem__)
        assert {row["steps"] for row in tries.values()} == {2}


def test_every_run_starts_from_the_same_scores_on_the_same_examples(whole):
    """Those of the sweep are other examples, so that no rate is chosen on what is compared."""
    _, found = whole
    starts = {
        purpose: {json.dumps(row["before"]) for row in rows if row["status"] == "done"}
        for purpose, rows in (("sweep", found["sweep"]), ("compared", found["rows"]))
    }
    assert len(starts["sweep"]) == len(starts["compared"]) == 1
    assert starts["sweep"] != starts["compared"]


def test_the_readings_are_those_of_the_runs(whole):
    """Rows from the runs' own files; what is read at equal steps compares the last evaluations."""
    storage, found = whole
    reading = found["readings"]["completion"]["equal_steps"]
    for method in ("lwo", "full"):
        losses = []
        for seed in (0, 1):
            summary = json.loads(
                (storage / f"cmp-completion-{method}-seed{seed}" / "summary.json").read_text()
            )
            last = summary["eval"]["curve"][-1]
            assert last["step"] == 6
            losses.append(last["eval/loss"])
        assert reading[method]["mean"]["scores"]["loss"] == pytest.approx(sum(losses) / 2)
    assert losses[0] != losses[1]
    gain = reading["full"]["mean"]["scores"]["loss"] - reading["lwo"]["mean"]["scores"]["loss"]
    assert reading["lwo"]["against"]["loss"]["mean"] == pytest.approx(gain, rel=1e-4)
    assert reading["full"]["against"] == {}  # the last method, where lora is not compared


def test_a_run_that_fails_is_a_row_and_the_others_go_on(whole):
    storage, found = whole
    by_method = {
        method: {row["status"] for row in found["rows"] if row["method"] == method}
        for method in ("lwo", "full", "damaged")
    }
    assert by_method == {"lwo": {"done"}, "full": {"done"}, "damaged": {"failed"}}
    (error,) = {row["error"] for row in found["rows"] if row["status"] == "failed"}
    assert "damaged" in error
    assert error.replace("|", "/") in (storage / "cmp" / "comparison.md").read_text()
    assert re.search(r"2 of \d+ compared runs failed", found["printed"])


def test_a_run_whose_process_dies_is_a_failed_run(inputs, tmp_path):
    """As under a kernel that is out of memory. What runs beside it goes on."""
    places = {"data": {"source": str(inputs / "src")}, "model": {"name": str(inputs / "model")}}
    run = {"storage": str(tmp_path), "train": {"steps": 1}, "tracking": {"enabled": False}}
    configs = [
        make_config({**places, **run, "run_name": name, "method": method})
        for name, method in (("dies", "tests.dummies:Dying"), ("lives", "full"))
    ]
    outcomes = run_children(configs, "process", jobs=2)
    assert str(outcomes["dies"]) == "its process died (SIGKILL)"
    assert outcomes["lives"] is None
    assert (tmp_path / "lives" / "summary.json").is_file()


def test_the_runs_are_nested_in_mlflow(whole):
    storage, found = whole
    client = MlflowClient(f"sqlite:///{storage / 'mlflow.db'}")
    (experiment,) = (e for e in client.search_experiments() if e.name == "lwo_dist")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    parent = runs["cmp"]
    assert parent.info.run_id == found["mlflow_run_id"]
    assert parent.info.status == "FINISHED"
    done = {row["run_name"] for row in (*found["sweep"], *found["rows"]) if row["status"] == "done"}
    assert done <= runs.keys()
    assert {runs[name].data.tags["mlflow.parentRunId"] for name in done} == {parent.info.run_id}
    files = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert files == {"comparison.json", "comparison.md", "comparison-completion.png"}
    mean = found["readings"]["completion"]["equal_steps"]["lwo"]["mean"]["scores"]["loss"]
    assert parent.data.metrics["completion/equal_steps/lwo/loss"] == mean


def test_weights_are_not_kept(whole):
    storage, _ = whole
    assert not list(storage.glob("cmp-*/**/*.safetensors"))


def test_a_second_command_does_no_run_again_but_tries_the_failed_ones(inputs, whole):
    storage, found = whole
    times = {path: path.stat().st_mtime_ns for path in storage.glob("cmp-*/summary.json")}
    again = compare(inputs, storage, f"--methods={inputs / 'damaged.yaml'},lwo,full", *WHOLE)
    assert {path: path.stat().st_mtime_ns for path in storage.glob("cmp-*/summary.json")} == times
    tried = re.findall(r"run \d+: \w+, completion, (\w+)", again["printed"])
    # Both rates beside each other, then each alone, as they may have lacked room.
    assert tried == ["damaged"] * 4
    assert again["readings"] == found["readings"]


def test_another_design_under_the_same_name_is_refused(inputs, whole):
    storage, _ = whole
    before = (storage / "cmp" / "comparison.json").read_bytes()
    done = subprocess.run(
        command(inputs, storage, "--methods=lwo,full", "--seeds=1"),
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert done.returncode == 2
    assert "begun with other settings (methods)" in done.stderr
    assert (storage / "cmp" / "comparison.json").read_bytes() == before


def test_tasks_beside_each_other_from_a_data_set_and_from_a_git_history(inputs, tmp_path):
    """Each has its own data and its own scores; the untuned base is scored once a task."""
    data = tmp_path / "pairs.jsonl"
    rows = [{"java": f"int a{i} = {i};", "cs": f"int A{i} = {i};"} for i in range(40)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = "fields: {source: java, target: cs}"
    tasks = {
        "ported": f"task: translation\ndata: {{source: {data}, format: jsonl, {fields}}}\n",
        "bugs": f"task: defect\ndata: {{source: {fixed_functions(tmp_path / 'history')}}}\n",
    }
    for name, text in tasks.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    listed = ",".join(["completion", *(str(tmp_path / f"{name}.yaml") for name in tasks)])
    settings = ["train.sequence_length=128", "eval.num_lines=4", "data.near_duplicates=null"]
    done = subprocess.run(
        command(
            inputs, tmp_path, f"--tasks={listed}", "--methods=full", *SHORT[1:], settings=settings
        ),
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = read(tmp_path)
    scores = {row["task"]: row.get("scores", row.get("error")) for row in found["rows"]}
    assert {"exact_match", "bleu", "lines"} <= scores["completion"].keys()
    assert {"exact_match", "codexglue_bleu", "translations"} <= scores["ported"].keys()
    assert {"accuracy", "f1", "functions"} <= scores["bugs"].keys()
    page = (tmp_path / "cmp" / "comparison.md").read_text()
    assert re.findall(r"^## (\w+)$", page, re.MULTILINE) == ["completion", "ported", "bugs"]
    assert done.stdout.count("evaluating before training") == 3


def fixed_functions(folder: Path) -> Path:
    """A git repository in which every function is wrong at first, and then fixed."""
    folder.mkdir()
    git(folder, "init")
    for right in (False, True):
        for i in range(12):
            sign = "+" if right else "-"
            body = f"def add_{i}(a, b):\n    total_{i} = a {sign} b\n    return total_{i}\n"
            (folder / f"f{i}.py").write_text(body)
            if right:
                git(folder, "commit", "-am", f"Fix the sign in add_{i}")
        if not right:
            git(folder, "add", ".")
            git(folder, "commit", "-m", "Add functions")
    return folder


SHORT = ("--methods=lwo,full", "--rates=1e-2", "--seeds=1", "--no-equal-time")


def test_a_killed_comparison_goes_on_to_the_same_scores(inputs, tmp_path):
    """SIGKILL in the middle of a run. Beside it, another comparison in the same storage is not
    disturbed, and shows the scores to end with.
    """
    killed = command(inputs, tmp_path, *SHORT, name="killed")
    with running(command(inputs, tmp_path, *SHORT, name="whole")) as beside:
        with running(killed) as first:
            wait_for(tmp_path / "killed-completion-full-seed0" / "checkpoints", first)
            children = psutil.Process(first.pid).children(recursive=True)
            first.send_signal(signal.SIGKILL)
            first.wait()
        psutil.wait_procs(children, timeout=120)
        assert len(read(tmp_path, "killed")["rows"]) < 2
        with running(killed) as second:
            assert second.wait(timeout=600) == 0
        assert beside.wait(timeout=600) == 0
    found, expected = (
        json.dumps(scores_of(read(tmp_path, name))).replace(f"{name}-", "")
        for name in ("killed", "whole")
    )
    assert found == expected


def test_a_stopped_comparison_says_how_to_go_on(inputs, tmp_path):
    """SIGTERM: the run saves, and the exit code is that of a stop."""
    stopped = command(inputs, tmp_path, *SHORT, settings=["train.steps=100000"])
    with running(stopped, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        wait_for(tmp_path / "cmp-completion-lwo-seed0" / "checkpoints", process)
        process.send_signal(signal.SIGTERM)
        printed, _ = process.communicate(timeout=120)
    assert process.returncode == 75, printed
    assert "the same command goes on with cmp" in printed
    assert "stopped by SIGTERM" in printed
    assert list((tmp_path / "cmp-completion-lwo-seed0" / "checkpoints").glob("step_*/state.json"))


@contextmanager
def running(command: list[str], **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """The command; killed at the end if it still runs."""
    process: subprocess.Popen[Any] = subprocess.Popen(command, env=environment(), **options)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def wait_for(folder: Path, process: subprocess.Popen[Any]) -> None:
    """Until a checkpoint in `folder` is committed."""
    while not list(folder.glob("step_*/state.json")):
        assert process.poll() is None, "the comparison has ended"
        time.sleep(0.05)
