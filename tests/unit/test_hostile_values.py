"""Values of wrong types and absurd sizes in a hostile run get one line."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from lwo_dist.checkpoint.format import newest_checkpoint
from lwo_dist.checkpoint.resume import refuse_other_run
from lwo_dist.checkpoint.schema import ADAPTERS_INDEX, INDEX, MOMENTS, STATE
from lwo_dist.config import Config
from lwo_dist.driver import read_record
from lwo_dist.errors import DamagedError, UserError
from lwo_dist.storage import RunFolder
from tests import hostile
from tests.hostile import (
    Case,
    time_limit,
    try_all,
)

case = hostile.case
no_hub = hostile.no_hub


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(step="11"), "step"),
        (lambda s: s.update(step=10**30), "step"),
        (lambda s: s.update(active_layer=7), "active_layer"),
        (lambda s: s.update(sha256=[]), "sha256"),
        (lambda s: s["sha256"].update({"config.json": 7}), "sha256"),
        (lambda s: s["sha256"].pop(MOMENTS), "does not name active.safetensors"),
        (
            lambda s: s["sha256"].update({ADAPTERS_INDEX: "0" * 64}),
            "names adapters.index.json and model.safetensors.index.json",
        ),
        (lambda s: s["sha256"].pop(INDEX), "names no model.safetensors.index.json"),
        (lambda s: s.update(moments=None), "moments"),
        (lambda s: s.update(format="1"), "format"),
        (lambda s: s.pop("sha256"), "sha256"),
    ],
)
def test_a_malformed_value_is_named(
    case: Case, change: Callable[[Any], None], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    state = case.state()
    change(state)
    case.reseal(state)
    said = try_all(str(case.run), case.run.parent / "out", capsys)
    assert all(message in line for line in said if "state.json" in line)
    assert any("state.json" in line for line in said)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("run"), "has no run"),
        (lambda s: s.update(run=[]), "run"),
        (lambda s: s["run"].pop("base_model"), "run.base_model"),
        (lambda s: s["run"].update(lora={"rank": 0}), "run.lora.rank"),
        (lambda s: s["run"].update(lora={"target_modules": [".*"]}), "run.lora.target_modules"),
        (lambda s: s["run"].update(base_digest="1"), "run.base_digest"),
        (lambda s: s["data"].update(seed="0"), "data.seed"),
        (lambda s: s["results"].update(peaks=7), "results.peaks"),
        (lambda s: s["results"]["evaluations"].update({"²": {}}), "results.evaluations"),
        (lambda s: s.pop("results"), "has no results"),
    ],
)
def test_a_resume_names_a_malformed_trainer_value(
    case: Case, change: Callable[[Any], None], message: str
) -> None:
    state = case.state()
    change(state)
    with pytest.raises(DamagedError, match=message):
        refuse_other_run(Config(), SimpleNamespace(fingerprint=""), state)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "data", [b"[" * 10**6, b'{"a":' * 10**5, b"1" * 5000, b"\xff", b"null", b"[]", b""]
)
def test_bad_json_gives_no_traceback(
    case: Case, data: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    sound = (case.step / STATE).read_bytes()
    (case.step / STATE).write_bytes(data)
    try_all(str(case.run), case.run.parent / "out", capsys)
    for name in (INDEX, "config.json"):
        (case.step / STATE).write_bytes(sound)
        case.put(name, data)
        try_all(str(case.run), case.run.parent / "out", capsys)


def test_an_oversized_file_is_not_read(case: Case) -> None:
    with (case.step / STATE).open("ab") as file:
        file.truncate(2**40)  # sparse
    with pytest.raises(UserError, match="is larger than 134217728 bytes"):
        newest_checkpoint(RunFolder.at(str(case.run)))


@pytest.mark.parametrize("header", [2**63 - 1, 2**40, 10, 0])
def test_a_safetensors_header_of_an_absurd_length_gets_one_line(
    case: Case, header: int, capsys: pytest.CaptureFixture[str]
) -> None:
    data = header.to_bytes(8, "little") + b"{}"
    layer = next(name for name in case.state()["sha256"] if name.startswith("../../layers/head"))
    for name in (layer, MOMENTS):
        case.put(name, data)
        said = try_all(str(case.run), case.run.parent / "out", capsys)
        assert any("is malformed" in line for line in said)


@pytest.mark.parametrize("key", ["num_hidden_layers", "encoder_layers", "decoder_layers"])
def test_a_config_cannot_make_an_export_build_endless_layers(
    case: Case, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    case.put_json("config.json", lambda values: values.update({key: 10**9}))
    with time_limit(20):
        said = try_all(str(case.run), case.run.parent / "out", capsys)
    assert any(f"{key} = 1000000000, but" in line for line in said)


@pytest.mark.parametrize(
    "data",
    [
        b"[" * 10**6,
        b"1" * 5000,
        b"\xff",
        b"",
        b"[]",
        b"7",
        b"{}",
        b'{"run_name": "r", "attempts": "1"}',
        b'{"run_name": "r", "attempts": -1}',
        b'{"run_name": "r", "attempts": 1e400}',
        b'{"run_name": "r", "attempts": true}',
        b'{"run_name": "r", "attempts": 1, "mlflow_run_id": ["x"]}',
        b'{"run_name": "r", "attempts": 1, "holder": {"a": "\\u001b[2J"}}',
    ],
)
def test_a_wrong_run_json_gets_one_line(case: Case, data: bytes) -> None:
    (case.run / "run.json").write_bytes(data)
    with pytest.raises(UserError, match=r"r/run.json is damaged \(.*\); remove it") as error:
        read_record(RunFolder.at(str(case.run)))
    assert str(error.value).isprintable() and len(str(error.value)) < 1000


def test_neither_a_link_nor_a_pipe_nor_a_huge_file_is_read_for_run_json(case: Case) -> None:
    path = case.run / "run.json"
    run = RunFolder.at(str(case.run))
    record = read_record(run)
    assert record is not None and record["run_name"]
    path.unlink()
    assert read_record(run) is None
    path.symlink_to(case.outside / "secret.json")
    with pytest.raises(UserError, match=r"run.json is a symlink; .*\); remove it"):
        read_record(run)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match=r"run.json is not a regular file\); remove it"):
        read_record(run)
    path.unlink()
    with path.open("wb") as file:
        file.truncate(2**40)  # sparse
    with pytest.raises(UserError, match=r"is larger than 134217728 bytes\); remove it"):
        read_record(run)
