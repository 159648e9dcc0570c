"""What the end of a run brings to MLflow: the model, the tables, the report; and what a restart
leaves there.
"""

import json
import logging
import re
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lwo_dist.spool import count_points
from lwo_dist.tracking.mlflow import replay
from lwo_dist.tracking.sender import Sender
from tests.models import save_tiny_model
from tests.tracking import assert_equal_to_spool, begin, client_of, config_for, history, train

pytestmark = pytest.mark.usefixtures("clean_environment")


def evaluation(prediction: str, loss: float) -> str:
    sample = {"name": "a.py", "line": 3, "context": "def f(x):", "reference": "    return x"}
    other = sample | {"line": 9}
    samples = [sample | {"prediction": prediction}, other | {"prediction": "<b>"}]
    return json.dumps({"scores": {"eval/loss": loss, "eval/lines": 2.0}, "samples": samples})


@pytest.fixture
def mlflow_at():
    """MLflow's own functions, which look at one store for the whole process."""
    import mlflow

    yield lambda uri: mlflow.set_tracking_uri(uri) or mlflow
    mlflow.set_tracking_uri(None)


@pytest.fixture
def finished(storage: Path):
    """A function that takes a run to its end, with an exported model and two evaluations in its
    folder.
    """

    def finish(name: str, **tracking):
        config = config_for(**tracking)
        callback = begin(config, storage, name)
        train(callback)
        folder = storage / name
        save_tiny_model(folder / "model", ["def f(x):\n    return x\n"])
        (folder / "evaluations").mkdir()
        (folder / "evaluations" / "step_000000.json").write_text(evaluation("    retur", 3.0))
        (folder / "evaluations" / "step_000100.json").write_text(evaluation("    return x", 2.0))
        scores = {"eval/loss": 2.0, "eval/lines": 2.0}
        result = {"before": scores, "after": scores, "best_step": 100, "gain_95": {}}
        callback.on_run_end({"eval": result, "training_seconds": 9.0, "tokens_per_second": 8.0})
        return callback.run_id, client_of(f"sqlite:///{storage}/mlflow.db")

    return finish


def test_the_model_is_logged_registered_and_loads(
    finished, storage, mlflow_at, monkeypatch, caplog
):
    copied = []
    copy = shutil.copy2
    monkeypatch.setattr(shutil, "copy2", lambda *a, **k: copied.append(a[0]) or copy(*a, **k))
    run_id, client = finished("with-model", register_as="tuned")
    spool = storage / "with-model" / "metrics.jsonl"
    # Into the store alone: the weights were copied to no second place on the way.
    weights = [Path(source) for source in copied if str(source).endswith("model.safetensors")]
    assert weights == [spool.parent / "model" / "model.safetensors"]
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    [output] = run.outputs.model_outputs
    model = client.get_logged_model(output.model_id)
    assert (str(model.status), model.source_run_id, output.step) == ("READY", run_id, 100)
    assert model.name == "with-model"
    assert model.params["train.steps"] == "100"
    scores = [(m.key, m.value, m.step, m.dataset_digest) for m in model.metrics]
    assert ("eval/loss", 0.02, 100, "0123456789abcdef") in scores
    assert {step for _, _, step, _ in scores} == {100}
    assert dict(history(client, run_id)["eval/loss"])[100] == 0.02  # once in the run
    assert len(history(client, run_id)["eval/loss"]) == 5
    [version] = client.search_model_versions("name = 'tuned'")
    assert version.run_id == run_id
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]

    mlflow = mlflow_at(client.tracking_uri)
    place = mlflow.artifacts.download_artifacts("models:/tuned/1", dst_path=str(storage / "down"))
    described = mlflow.models.Model.load(place)
    assert described.signature.inputs.to_dict() == [{"type": "string", "required": True}]
    pinned = (Path(place) / "requirements.txt").read_text().split()
    assert f"torch=={torch.__version__.partition('+')[0]}" in pinned
    assert all("==" in line for line in pinned)
    said = run.data.tags["mlflow.note.content"]
    [address] = re.findall(r'load_model\("(.+)"\)', said)
    assert mlflow.transformers.load_model(address).model.num_parameters() > 0
    pipeline = mlflow.transformers.load_model("models:/tuned/1")
    assert pipeline("def f(x):", max_new_tokens=2, do_sample=False)[0]["generated_text"].startswith(
        "def f(x):"
    )
    exported = load_file(storage / "with-model" / "model" / "model.safetensors")
    assert pipeline("def f(x):", max_new_tokens=2, do_sample=False)[0]["generated_text"].startswith(
        "def f(x):"
    )
    held = pipeline.model.state_dict()
    assert exported and all(torch.equal(held[name], value) for name, value in exported.items())

    spool.with_suffix(".sent.json").unlink()
    replay(spool)  # all of it again
    assert len(client.search_model_versions("name = 'tuned'")) == 1
    assert (
        len(client.search_logged_models([run.info.experiment_id], f"source_run_id = '{run_id}'"))
        == 1
    )


def test_a_description_that_cannot_be_written_harms_nothing(storage, caplog):
    callback = begin(config_for(), storage, "odd")
    callback.on_run_end({"eval": {"best_step": 7}})
    assert "the description could not be written" in caplog.text
    run = client_of(f"sqlite:///{storage}/mlflow.db").get_run(callback.run_id)
    assert run.info.status == "FINISHED"


def test_no_model_is_logged_where_none_is_wanted(finished):
    run_id, client = finished("without", log_model=False)
    assert not client.get_run(run_id).outputs.model_outputs


def test_scores_and_completions_are_tables(finished, mlflow_at):
    run_id, client = finished("tables", log_model=False)
    mlflow_at(client.tracking_uri)
    experiment = client.get_run(run_id).info.experiment_id
    completions = client.load_table(experiment, "tables/completions.json", [run_id])
    scores = client.load_table(experiment, "tables/scores.json", [run_id])
    assert completions[["file", "line", "before", "after", "reference"]].values.tolist() == [
        ["a.py", 3, "    retur", "    return x", "    return x"],
        ["a.py", 9, "<b>", "<b>", "    return x"],
    ]
    assert scores[["step", "loss", "lines"]].values.tolist() == [[0, 3.0, 2.0], [100, 2.0, 2.0]]


def test_the_report_is_one_file_that_loads_nothing(finished, storage):
    finished("report", log_model=False)
    page = (storage / "report" / "report.html").read_text()
    assert page.count("<svg") == 3
    assert "<mark>    return x</mark>" in page and "&lt;b&gt;" in page and "<b>" not in page
    text = (
        page.replace("http://www.w3.org/", "")
        .replace("http://creativecommons.org/", "")
        .replace("http://purl.org/", "")
    )
    for loads in ("src=", "@import", "url(http", "<link", "fetch(", "https://matplotlib.org/)"):
        assert loads not in text.replace("https://matplotlib.org/", ""), loads


def test_a_model_that_cannot_be_uploaded_harms_nothing(finished, storage, monkeypatch, caplog):
    from lwo_dist.tracking import mlflow_model

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(mlflow_model, "_upload", fail)
        run_id, client = finished("no-room", flush_timeout_s=3)
        for thread in threading.enumerate():
            if isinstance(thread, Sender):  # else its last attempt could meet the replay below
                thread.join(60)
    spool = storage / "no-room" / "metrics.jsonl"
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert_equal_to_spool(client, run_id, spool)
    assert (
        "MLflow lacks 1 files (model could not be uploaded: No space left on device)" in caplog.text
    )
    assert replay(spool) == 0
    [output] = client.get_run(run_id).outputs.model_outputs
    assert str(client.get_logged_model(output.model_id).status) == "READY"


def test_a_restart_is_marked_and_what_it_cost_is_counted(storage, monkeypatch):
    from lwo_dist import spool as spool_module
    from lwo_dist.tracking import restarts

    clock = [1_000.0]
    for module in (restarts, spool_module):
        monkeypatch.setattr(module.time, "time", lambda: clock[0])

    def go(callback, steps):
        for step in steps:
            clock[0] += 2.0
            callback.on_metrics(step, {"train/loss": 1.0 / step, "time/step_seconds": 2.0})

    first = begin(config_for(), storage, "restarted")
    go(first, range(1, 51))
    first.on_run_failed(RuntimeError("a worker died"))
    clock[0] += 30.0  # nobody trains
    second = begin(config_for(), storage, "restarted", start_step=40)
    go(second, range(41, 71))
    second.on_run_end({})
    client = client_of(f"sqlite:///{storage}/mlflow.db")
    held = history(client, second.run_id)
    # 30 s of nothing, 10 steps twice; before the restart there is nothing to show.
    assert held["system/lost_seconds"] == [(step, 50.0) for step in range(51, 71)]
    assert held["system/attempt"] == [(step, 2.0) for step in range(51, 71)]
    tags = client.get_run(second.run_id).data.tags
    assert (tags["attempts"], tags["attempt.2.start_step"]) == ("2", "40")
    assert tags["attempt.2.started"] == "1970-01-01 00:18:50+00:00"
    assert count_points(storage / "restarted" / "metrics.jsonl") == 70 * 4
