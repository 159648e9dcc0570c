"""Names, symlinks and object keys of a hostile run lead nowhere outside its folder."""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lwo_dist import storage
from lwo_dist.checkpoint.format import newest_checkpoint
from lwo_dist.checkpoint.resume import find_checkpoint
from lwo_dist.checkpoint.schema import INDEX, STATE
from lwo_dist.cli import main
from lwo_dist.config import Config
from lwo_dist.errors import UserError
from lwo_dist.storage import RunFolder
from tests import hostile
from tests.hostile import (
    ESCAPE,
    ODD_KEYS,
    SECRET,
    STEP,
    Case,
    bucket_of,
    time_limit,
    try_all,
)

case = hostile.case
no_hub = hostile.no_hub


# ---- names


@pytest.mark.parametrize(
    "name",
    [
        "../../../../outside/secret",
        "../../layers/../../../outside/secret.safetensors",
        "../../../r/layers/x.safetensors",
        "/etc/hostname",
        "..",
        ".",
        "",
        ".hidden.json",
        "deep/config.json",
        "../../layers/embed.bin",
        "../step_000012/config.json",
        "pytorch_model.bin",
        "adapter_config.json",
        STATE,
        "a\\b",
        f"{ESCAPE}.json",
        "\u202egpj.exe.json",
        "\udc80.json",
        "x" * 300,
    ],
)
def test_an_invalid_file_name_is_refused(
    case: Case, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    state = case.state()
    state["sha256"][name] = hashlib.sha256(SECRET).hexdigest()
    case.reseal(state)
    said = try_all(str(case.run), case.run.parent / "out", capsys)
    refused = "is not a checkpoint file|sha256.*: Input should be a valid string"
    assert sum(re.search(refused, line) is not None for line in said) >= 4
    case.check()
    with pytest.raises(UserError, match=refused):
        newest_checkpoint(RunFolder.at(str(case.run)))


@pytest.mark.parametrize(
    "name", ["../../../../outside/secret.safetensors", "/etc/hostname", "config.json", "..", 7]
)
def test_an_invalid_name_in_the_index_or_the_moments_is_refused(
    case: Case, name: Any, tmp_path: Path
) -> None:
    def lead_away(index: Any) -> None:
        index["weight_map"] |= dict.fromkeys(list(index["weight_map"])[:1], name)

    case.put_json(INDEX, lead_away)
    with pytest.raises(UserError, match="the index (names|is malformed)"):
        newest_checkpoint(RunFolder.at(str(case.run)))
    other = Case(tmp_path / "other")
    state = other.state()
    state["moments"]["embed"] = name if name != "config.json" else "../../layers/none.safetensors"
    other.reseal(state)
    with pytest.raises(UserError, match="no sha256 of the moments|moments.embed"):
        newest_checkpoint(RunFolder.at(str(other.run)))


def test_a_file_not_listed_in_state_json_is_not_loaded(case: Case) -> None:
    (case.step / "adapter_config.json").write_text('{"base_model_name_or_path": "/elsewhere"}')
    with pytest.raises(UserError, match="adapter_config.json is not listed in state.json"):
        newest_checkpoint(RunFolder.at(str(case.run)))


# ---- symlinks


@pytest.mark.parametrize(
    "name",
    [
        "layers",
        "checkpoints",
        STEP,
        f"{STEP}/config.json",
        f"{STEP}/{STATE}",
        f"{STEP}/stray.json",
        "layers/stray.safetensors",
        "model",
        "metrics.jsonl",
        "evaluations",
    ],
)
def test_no_symlink_is_followed(case: Case, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    link = case.run / name
    moved = case.outside / f"moved-{link.name}"
    if link.exists():
        shutil.move(link, moved)
    else:
        shutil.copyfile(case.outside / "secret", moved)
    link.symlink_to(moved)
    files = {path: path.read_bytes() for path in case.outside.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="link"):
        find_checkpoint(Config(), RunFolder.at(str(case.run)))
    try_all(str(case.run), case.run.parent / "out", capsys)
    main(["export", str(case.run), "--to", str(case.run / "model"), "--overwrite"])
    capsys.readouterr()
    assert files == {path: path.read_bytes() for path in case.outside.rglob("*") if path.is_file()}
    exported = case.run.parent / "out"
    assert SECRET not in [path.read_bytes() for path in exported.rglob("*") if path.is_file()]


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_pipes_and_folders_are_not_read(case: Case, make: Callable[[Path], None]) -> None:
    (case.step / "tokenizer.json").unlink()
    make(case.step / "tokenizer.json")
    with (
        time_limit(20),
        pytest.raises(UserError, match="tokenizer.json is not a regular file"),
    ):
        newest_checkpoint(RunFolder.at(str(case.run)))


# ---- object keys


def test_odd_object_keys_are_ignored(
    case: Case, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for odd in (ODD_KEYS, *([key] for key in ODD_KEYS)):
        with bucket_of(case, odd, monkeypatch) as (url, _):
            run = RunFolder.at(url)
            run.fetch_small()
            checkpoint = find_checkpoint(Config(), run)
            assert checkpoint is not None and checkpoint.step == 11
            out, _ = capsys.readouterr()
            assert out.count("warning: ") <= 1 and "\x1b" not in out
            said = try_all(url, case.run.parent / "out", capsys)
            assert any("step 11  whole" in line for line in said)
            scratch = (case.run.parent / "scratch").resolve()
            assert all(path.resolve().is_relative_to(scratch) for path in scratch.rglob("*"))
            assert not (scratch / "escaped").exists()
            case.check()
            shutil.rmtree(scratch)


class Counted(io.BytesIO):
    """Counts the bytes that are read of an object."""

    read_bytes = 0

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        Counted.read_bytes += len(data)
        return data


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("run.json", lambda run: run.fetch_small()),
        ("report.html", lambda run: run.fetch_small()),
        (f"{STEP}/{STATE}", newest_checkpoint),
        (f"{STEP}/config.json", newest_checkpoint),
    ],
)
def test_an_oversized_object_is_not_downloaded(
    case: Case, name: str, call: Callable[[RunFolder], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = 200_000  # more than the others have
    monkeypatch.setattr(storage, "_MAX_SMALL_BYTES", limit)
    monkeypatch.setattr("lwo_dist.checkpoint.format.MAX_BYTES", limit)
    monkeypatch.setattr(storage, "_CHUNK_BYTES", 1000)
    with bucket_of(case, [], monkeypatch) as (url, bucket):
        bucket.keys[f"bucket/runs/r/{name}"] = b" " * 10**7
        reader = bucket.open_input_stream

        def open_counted(key: str) -> io.BytesIO:
            return Counted(reader(key).getvalue()) if key.endswith(name) else reader(key)

        monkeypatch.setattr(bucket, "open_input_stream", open_counted)
        monkeypatch.setattr(Counted, "read_bytes", 0)
        with pytest.raises(UserError, match=f"{name} is larger than 200 KB, .*; remove it from s3"):
            call(RunFolder.at(url))
        assert limit < Counted.read_bytes <= limit + 1000
        scratch = case.run.parent / "scratch"
        assert all(path.stat().st_size <= limit for path in scratch.rglob("*"))
