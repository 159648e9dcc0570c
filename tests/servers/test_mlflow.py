"""Tracking against a real MLflow: a sqlite store, and `mlflow server` on loopback."""

import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from lwo_dist.config import Config, DataConfig, TrainConfig
from lwo_dist.errors import UserError
from lwo_dist.spool import Sent, Spool, count_points, read_spool
from lwo_dist.tracking.mlflow import create_run, end_run, replay
from tests.tracking import (
    FILES,
    POINTS,
    artifacts,
    assert_equal_to_spool,
    begin,
    client_of,
    config_for,
    history,
    train,
    until,
)

pytestmark = pytest.mark.usefixtures("clean_environment")
NOTE = "mlflow.note.content"


def test_a_server_that_starts_after_the_training(server, tmp_path, caplog):
    server.stop()
    config = config_for(server.uri, flush_timeout_s=1)
    assert create_run(config, tmp_path, "late") is None
    callback = begin(config, tmp_path, "late")
    train(callback)
    callback.on_run_end({})
    spool = tmp_path / "late" / "metrics.jsonl"
    assert callback.run_id is None
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 3, lines  # the driver's, the sender's and the last
    assert all("Connection refused" in line and "\n" not in line for line in lines)
    assert lines[-1].startswith(
        f"MLflow lacks {POINTS} metric points, {len(FILES)} files, the state of the run (Connection"
        " refused)"
    )
    assert lines[-1].endswith(f"send it with: lwo-dist replay {spool} --uri {server.uri}")
    with pytest.raises(
        UserError,
        match=(
            rf"Connection refused; it lacks {POINTS} metric points, {len(FILES)} files, the state"
            r" of the run; when"
        ),
    ):
        replay(spool, server.uri)

    server.start()
    assert replay(spool, server.uri) == count_points(spool) == POINTS
    client, run_id = client_of(server.uri), Sent.load(spool).run_id
    assert_equal_to_spool(client, run_id, spool)
    run = client.get_run(run_id)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "late")
    assert run.data.params["train.steps"] == "100"
    assert artifacts(client, run_id) >= FILES
    assert replay(spool, server.uri) == 0


def test_a_server_that_is_frozen_for_a_while(server, tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")  # the user's word stands
    server.start()
    config = config_for(server.uri)
    run_id = create_run(config, tmp_path, "frozen")
    assert run_id
    callback = begin(config, tmp_path, "frozen", run_id)
    callback._sender._interval_s = 0.2  # the test is short
    spool = tmp_path / "frozen" / "metrics.jsonl"
    train(callback, range(1, 41))
    until(lambda: Sent.load(spool).offset == spool.stat().st_size, 60)  # all sent while it is up
    server.signal(signal.SIGSTOP)
    try:
        train(callback, range(41, 81))
        until(lambda: callback._sender.problem is not None, 60)
    finally:
        server.signal(signal.SIGCONT)
    train(callback, range(81, 101))
    callback.on_run_end({})
    # The calls that timed out were served when the server thawed: MLflow has those points once all
    # the same.
    client = client_of(server.uri)
    assert_equal_to_spool(client, run_id, spool)
    assert count_points(spool) == POINTS
    assert client.get_run(run_id).info.status == "FINISHED"
    lines = [record.getMessage() for record in caplog.records]
    assert ["timed out" in lines[0], "is back" in lines[-1], len(lines)] == [True, True, 2], lines


def test_the_default_store_holds_all_that_the_run_said(storage, first_use, capfd):
    config = config_for()
    run_id = create_run(config, storage, "whole")
    assert create_run(config, storage, "whole") == run_id
    # The rate is not known before there is a model.
    config = config.model_copy(update={"lwo": config.lwo.model_copy(update={"lr": 1e-4})})
    callback = begin(config, storage, "whole", run_id)
    train(callback)
    (storage / "whole" / "summary.json").write_text("{}")
    callback.on_run_end({})
    assert callback.run_id == run_id

    client = client_of(f"sqlite:///{storage}/mlflow.db")
    run = client.get_run(run_id)
    assert_equal_to_spool(client, run_id, storage / "whole" / "metrics.jsonl")
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "whole"
    assert run.info.end_time >= run.info.start_time
    assert run.data.params["lwo.lr"] == "0.0001"
    assert len(run.data.params["data.long"]) == 6000
    assert all(run.data.params[f"data.fact_{i}"] == str(i) for i in range(150))
    assert (run.data.params["device"], run.data.params["world_size"]) == ("cpu", "2")
    assert run.data.params["layers"] == "embed, layers.0, layers.1, head"
    assert (run.data.tags["method"], run.data.tags["strategy"]) == ("lwo", "fsdp")
    assert (run.data.tags["hosts"], run.data.tags["attempts"]) == ("node-a, node-b", "1")
    assert artifacts(client, run_id) == {*FILES, "summary.json", "pictures"}
    place = storage / "mlartifacts" / run_id / "artifacts"
    assert run.info.artifact_uri == place.as_uri()
    assert Config.model_validate(yaml.safe_load((place / "config.yaml").read_text())) == config
    assert first_use[1] == ""  # MLflow tells of every migration of a new database, if one lets it
    assert "".join(capfd.readouterr()) == ""


def test_the_run_says_what_it_is(storage):
    config = config_for().model_copy(
        update={"data": DataConfig(source="https://github.com/a/shop"), "run_name": "said"}
    )
    callback = begin(config, storage, "said")
    client = client_of(f"sqlite:///{storage}/mlflow.db")
    until(lambda: callback.run_id and NOTE in client.get_run(callback.run_id).data.tags, 60)
    run = client.get_run(callback.run_id)
    assert run.data.tags[NOTE].startswith("Tunes **tiny-code** on **shop**")
    assert run.data.tags["mlflow.source.name"] == "lwo-dist train"
    assert {"method": "lwo", "model": "tiny-code", "device": "cpu"}.items() <= run.data.tags.items()
    [used] = run.inputs.dataset_inputs
    assert (used.dataset.name, used.dataset.digest) == ("shop", "0123456789abcdef")
    assert json.loads(used.dataset.source) == {"url": "https://github.com/a/shop"}
    assert json.loads(used.dataset.profile)["fact_7"] == 7
    assert [(tag.key, tag.value) for tag in used.tags] == [("mlflow.data.context", "training")]

    train(callback)
    scores = {"eval/loss": 2.0, "eval/lines": 5.0}
    result = {"before": scores, "after": scores, "best_step": 20, "gain_95": {}}
    callback.on_run_end({"eval": result, "training_seconds": 5.0, "tokens_per_second": 9.0})
    spool = storage / "said" / "metrics.jsonl"
    for _ in range(2):  # the second time, all of it is sent again
        run = client.get_run(callback.run_id)
        assert run.data.tags[NOTE].startswith("**tiny-code** before and after step 20, on 5 held")
        assert len(run.inputs.dataset_inputs) == 1
        spool.with_suffix(".sent.json").unlink()
        replay(spool)


def test_a_description_that_somebody_wrote_stays(storage):
    callback = begin(config_for(), storage, "edited")
    client = client_of(f"sqlite:///{storage}/mlflow.db")
    until(lambda: callback.run_id and NOTE in client.get_run(callback.run_id).data.tags, 60)
    client.set_tag(callback.run_id, NOTE, "mine")
    callback.on_run_end({})
    begin(config_for(), storage, "edited", callback.run_id).on_run_end({})
    assert client.get_run(callback.run_id).data.tags[NOTE] == "mine"


def test_a_run_of_an_earlier_version_replays(storage):
    """Its spool has neither a dataset nor a description, and the parameters have everything."""
    spool = Spool(storage / "earlier" / "metrics.jsonl")
    parameters = {"seed": "0", "zero_stage": "null", "storage": "runs", "lwo.betas": "[0.9, 1]"}
    spool.append(
        "run",
        experiment="lwo_dist",
        run_name="earlier",
        key="k",
        attempt=1,
        start_step=0,
        layers=["embed", "head"],
        parameters=parameters,
        tags={"method": "lwo"},
    )
    spool.append_metrics(5, {"train/loss": 2.0, "memory/peak_bytes": 1e9, "lwo/cycle": 0.0})
    spool.append("end", status="FINISHED", attempt=1)
    spool.close()
    assert replay(spool.path, f"sqlite:///{storage}/mlflow.db") == 3
    client = client_of(f"sqlite:///{storage}/mlflow.db")
    run = client.get_run(Sent.load(spool.path).run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"seed": "0", "lwo.betas": "0.9, 1"}
    assert run.data.metrics == {"train/loss": 2.0, "system/peak_memory_GB": 1.0}


def test_a_resumed_run_stays_one_run_and_no_step_counts_twice(storage):
    config = config_for()
    run_id = create_run(config, storage, "resumed")
    first = begin(config, storage, "resumed", run_id)
    train(first, range(1, 51), loss=2.0)
    first.on_run_failed(ValueError("a worker\ndied"))
    client = client_of(f"sqlite:///{storage}/mlflow.db")
    run = client.get_run(run_id)
    assert (run.info.status, run.data.tags["error"]) == ("FAILED", "ValueError: a worker died")

    changed = config.model_copy(update={"train": TrainConfig(steps=200)})
    second = begin(changed, storage, "resumed", run_id, start_step=40)
    until(lambda: client.get_run(run_id).info.status == "RUNNING", 60)
    train(second, range(41, 101), loss=9.0)
    second.on_run_end({})
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    ends = [run.data.tags[f"attempt.{attempt}.ended"] for attempt in (1, 2)]
    assert (
        ends == ["FAILED: ValueError: a worker died", "FINISHED"] and "error" not in run.data.tags
    )
    assert_equal_to_spool(client, run_id, storage / "resumed" / "metrics.jsonl")
    held = history(client, run_id)
    assert sorted(held["train/loss"]) == [(s, (2.0 if s <= 50 else 9.0) / s) for s in range(1, 101)]
    assert run.data.params["train.steps"] == "100"  # MLflow's parameters never change
    assert run.data.tags["attempt.2.train.steps"] == "200"
    assert (run.data.tags["attempts"], run.data.tags["attempt.2.start_step"]) == ("2", "40")
    assert len(client.search_runs([run.info.experiment_id], "attributes.run_name = 'resumed'")) == 1


def test_a_run_that_was_asked_to_stop_is_killed_not_failed(storage):
    callback = begin(config_for(), storage, "stopped")
    train(callback, range(1, 3))
    callback.on_run_stopped("stopped by SIGTERM at step 2; checkpoint x")
    run = client_of(f"sqlite:///{storage}/mlflow.db").get_run(callback.run_id)
    assert (run.info.status, run.data.tags["error"]) == (
        "KILLED",
        "stopped by SIGTERM at step 2; checkpoint x",
    )


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143)])
def test_an_interrupted_run_is_killed_not_failed(storage, error):
    name = type(error).__name__
    callback = begin(config_for(), storage, name)  # without the driver's run: the sender makes one
    train(callback, range(1, 3))
    callback.on_run_failed(error)
    assert callback.run_id
    assert (
        client_of(f"sqlite:///{storage}/mlflow.db").get_run(callback.run_id).info.status == "KILLED"
    )


def test_a_sigkilled_run_replays_whole(storage, dead_uri, caplog):
    script = (
        "import os, signal, sys; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
        "from tests.tracking import begin, config_for, train\n"
        "callback = begin(config_for(sys.argv[3]), Path(sys.argv[2]), 'killed')\n"
        "train(callback)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    arguments = [str(Path(__file__).parents[2]), str(storage), dead_uri]
    done = subprocess.run([sys.executable, "-c", script, *arguments], check=False)
    assert done.returncode == -signal.SIGKILL
    spool = storage / "killed" / "metrics.jsonl"
    with spool.open("ab") as file:
        file.write(b'{"kind": "metrics", "st')

    uri = f"sqlite:///{storage}/mlflow.db"
    assert replay(spool.parent, uri) == count_points(spool) == POINTS
    assert "torn line" in caplog.text
    client, run_id = client_of(uri), Sent.load(spool).run_id
    assert_equal_to_spool(client, run_id, spool)
    run = client.get_run(run_id)
    assert run.info.status == "KILLED"
    assert run.info.end_time == max(
        record.time_ms for record in read_spool(spool) if record.kind == "metrics"
    )
    assert "pictures/loss_by_layer.png" in artifacts(client, run_id)


def test_a_lost_offset_file_makes_no_second_run_and_no_second_point(storage):
    callback = begin(config_for(), storage, "lost")
    train(callback)
    callback.on_run_end({})
    spool = storage / "lost" / "metrics.jsonl"
    spool.with_suffix(".sent.json").unlink()
    assert replay(spool) == POINTS  # sent again, and dropped by MLflow
    assert Sent.load(spool).run_id == callback.run_id
    assert_equal_to_spool(client_of(f"sqlite:///{storage}/mlflow.db"), callback.run_id, spool)


def test_the_driver_ends_a_run_whose_workers_are_gone(storage):
    config = config_for()
    client = client_of(f"sqlite:///{storage}/mlflow.db")
    run_id = create_run(config, storage, "early")
    end_run(config, storage, "early", "FAILED")  # they died before they began
    assert client.get_run(run_id).info.status == "FAILED"
    callback = begin(config, storage, "early", run_id)
    train(callback)
    callback.on_run_end({})
    end_run(config, storage, "early", "KILLED")  # too late to matter
    assert client.get_run(run_id).info.status == "FINISHED"
    assert_equal_to_spool(client, run_id, storage / "early" / "metrics.jsonl")


def test_a_live_run_is_not_replayed(storage, dead_uri):
    callback = begin(config_for(dead_uri, flush_timeout_s=0), storage, "live")
    with pytest.raises(UserError, match="still running"):
        replay(storage / "live")
    callback.on_run_end({})
    with pytest.raises(UserError, match="does not exist"):
        replay(storage / "nowhere.jsonl")


def test_no_event_touches_the_network(tmp_path, dead_uri, monkeypatch):
    connect, callers = socket.socket.connect, Counter()

    def spy(self, address):
        callers[threading.current_thread().name] += 1
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", spy)
    callback = begin(config_for(dead_uri, flush_timeout_s=1), tmp_path, "dead")
    train(callback)
    callback.on_checkpoint(100, tmp_path)
    until(lambda: callers["lwo-mlflow-sender"], 60)  # the spy sees what there is to see
    callback.on_run_end({})
    assert set(callers) == {"lwo-mlflow-sender"}
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "5"
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "0"


def test_a_folder_that_cannot_be_written_stops_no_training(tmp_path, caplog):
    (tmp_path / "run").write_text("a file, where the run's folder should be")
    callback = begin(config_for(), tmp_path, "run")
    train(callback)
    callback.on_run_end({})
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1, lines
    assert lines[0].startswith("tracking: on_run_start: ")
    assert lines[0].endswith("the run continues")


def test_files_that_cannot_be_uploaded_hold_up_nothing(tmp_path, storage, caplog):
    config = config_for(
        f"sqlite:///{storage}/mlflow.db", experiment="no-artifacts", flush_timeout_s=2
    )
    (tmp_path / "mlartifacts").write_text("a file, where the folder should be")
    callback = begin(config, tmp_path, "files")
    train(callback)
    callback.on_run_end({})
    spool = tmp_path / "files" / "metrics.jsonl"
    client = client_of(config.tracking.uri)
    assert_equal_to_spool(client, callback.run_id, spool)
    assert client.get_run(callback.run_id).info.status == "FINISHED"
    assert f"MLflow lacks {len(FILES)} files (config.yaml could not be uploaded: " in caplog.text
    (tmp_path / "mlartifacts").unlink()
    assert replay(spool, config.tracking.uri) == 0
    assert artifacts(client, callback.run_id) >= {"config.yaml", "pictures/memory.png"}


@pytest.mark.parametrize(
    ("status", "said"), [(500, "too many 500 error responses"), (401, "error code 401")]
)
def test_a_server_that_refuses_gets_one_line(tmp_path, caplog, status, said):
    class Refuses(BaseHTTPRequestHandler):
        def do_POST(self):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b"no")

        do_GET = do_PUT = do_POST  # noqa: N815

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Refuses) as refusing:
        thread = threading.Thread(target=refusing.serve_forever, daemon=True)
        thread.start()
        callback = begin(
            config_for(f"http://127.0.0.1:{refusing.server_port}", flush_timeout_s=1),
            tmp_path,
            "no",
        )
        train(callback)
        until(lambda: any(record.levelno >= logging.WARNING for record in caplog.records), 90)
        callback.on_run_end({})
        refusing.shutdown()
    lines = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(lines) == 2, lines
    assert all(said in line for line in lines), lines
    assert lines[1].startswith(
        f"MLflow lacks {POINTS} metric points, {len(FILES)} files, the state of the run ("
    )


def test_no_password_is_written_anywhere(tmp_path, first_use, dead_uri, caplog, monkeypatch, capfd):
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ada")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "env-hunter2")
    secret = dead_uri.replace("http://", "http://ada:uri-hunter2@")
    with pytest.raises(
        ValueError, match="contains a password; set MLFLOW_TRACKING_USERNAME"
    ) as kept_out:
        config_for(secret)
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", secret)
    config = config_for(flush_timeout_s=1)
    assert create_run(config, tmp_path, "secret") is None
    callback = begin(config, tmp_path, "secret")
    train(callback)
    callback.on_run_failed(RuntimeError(f"lost {secret} with env-hunter2"))
    spool = tmp_path / "secret" / "metrics.jsonl"
    with pytest.raises(UserError) as refused:
        replay(spool)
    shutil.copy(first_use[0] / "mlflow.db", tmp_path)
    replay(spool, f"sqlite:///{tmp_path}/mlflow.db")
    said = caplog.text + str(kept_out.value) + str(refused.value) + "".join(capfd.readouterr())
    assert "replay" in said
    written = [file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()]
    assert len(written) >= 8  # the spool, its offset, config, pictures, the database, artifacts
    for text in (*written, said.encode()):
        assert b"hunter2" not in text
    assert any(dead_uri.encode() in text for text in written)  # the address itself is kept


@pytest.mark.long
def test_a_hundred_thousand_points_arrive(storage):
    callback = begin(config_for(flush_timeout_s=600), storage, "many")
    for step in range(10_000):
        callback.on_metrics(
            step, {f"m/{i}": step + i for i in range(8)}
        )  # and the two that tell of restarts
    callback.on_run_end({})
    spool = storage / "many" / "metrics.jsonl"
    assert count_points(spool) == 100_000
    assert_equal_to_spool(client_of(f"sqlite:///{storage}/mlflow.db"), callback.run_id, spool)
