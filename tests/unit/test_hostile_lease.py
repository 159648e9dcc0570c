"""Claims that somebody made up: each is a dead one, or gets one line, at once."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lwo_dist import lease
from lwo_dist.errors import UserError
from lwo_dist.storage import RunFolder

HOLDER = "0123456789abcdef"
SOUND = {"holder": HOLDER, "host": "h", "user": "u", "pid": 1, "started": 0.0, "machine": "m"}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    monkeypatch.setattr(lease, "EXPIRES_S", 0.05)
    monkeypatch.setattr(lease, "_LOOK_S", 0.01)
    (tmp_path / "r" / "lease").mkdir(parents=True)
    return RunFolder(str(tmp_path), "r")


def put(run: RunFolder, claim: Any, name: str = "000001.json") -> Path:
    path = run.local / "lease" / name
    path.write_bytes(claim if isinstance(claim, bytes) else json.dumps(claim).encode())
    return path


ODD = [None, [], {}, "x", "\x1b[2J\n", "\ud800", -1, 0, 2**70, 10**4000, 1.5, float("nan"), True]


@pytest.mark.parametrize(
    "claim",
    [
        b"",
        b"[" * 10**6,
        b'{"holder":' * 10**5,
        b"9" * 5000,
        b"\xff",
        b"null",
        b"[]",
        {},
        *({**SOUND, "holder": value} for value in (*ODD, "../../x", f"{HOLDER}\n", "A" * 16)),
    ],
)
def test_a_claim_that_nobody_made_is_of_nobody_alive(run: RunFolder, claim: Any) -> None:
    put(run, claim)
    lease.refuse_held(run)
    assert not lease.is_ours(run)
    assert lease.take(run).number == 2


@pytest.mark.parametrize("field", ["host", "user", "pid", "started", "machine", "since"])
def test_odd_values_in_a_claim_get_one_line(
    run: RunFolder, field: str, capsys: pytest.CaptureFixture[str]
) -> None:
    here = {**SOUND, "machine": lease.this_process()["machine"], "pid": os.getpid()}
    for number, value in enumerate(ODD, 1):
        put(run, {**here, field: value}, f"{number:06}.json")
        put(run, b"1", f"{HOLDER}.alive")
        lease.refuse_held(run)
        with pytest.raises(lease.LostRunError) as lost:
            lease.join(run, "f" * 16)
        for line in (str(lost.value), *capsys.readouterr().out.splitlines()):
            assert line.isprintable() and len(line) < 600


@pytest.mark.parametrize(
    "name",
    [
        "0000000000000000000000000001.json",
        "0000007.json",
        "9999999999.json",
        f"{'9' * 240}.json",
        "²²²²²².json",
        "\u0661\u0661\u0661\u0661\u0661\u0661.json",
        "000007",
        "000007.json.json",
        "-00007.json",
    ],
)
def test_a_name_that_no_claim_has_is_none(run: RunFolder, name: str) -> None:
    put(run, {**SOUND, "holder": lease.this_process()["holder"]}, name)
    (run.local / "lease" / "inner").mkdir()
    put(run, SOUND, "inner/000009.json")
    assert lease.take(run).number == 1


def test_the_last_number_gets_one_line(run: RunFolder) -> None:
    put(run, SOUND, "999999999.json")
    with pytest.raises(UserError, match="lease/999999999.json is the last claim .*; remove it"):
        lease.take(run)


def _folder(path: Path) -> None:
    path.mkdir()


def _dangling(path: Path) -> None:
    path.symlink_to("nowhere")


@pytest.mark.parametrize("make", [os.mkfifo, _folder, _dangling])
def test_what_is_in_the_way_of_a_claim_gets_one_line(
    run: RunFolder, make: Callable[[Path], None]
) -> None:
    claim = lease.take(run)
    make(run.local / "lease" / "000002.json")
    started = time.monotonic()
    with pytest.raises(UserError, match="remove what is in the way|is a symlink"):
        lease.take(run)
    with pytest.raises(UserError, match="remove what is in the way|is a symlink"):
        lease.join(run, claim.holder)
    with pytest.raises(UserError, match="is not a regular file|is a symlink"):
        claim.check()
    assert not claim.is_lost()
    assert time.monotonic() - started < 10


def test_a_store_that_takes_no_claim_is_not_asked_for_ever(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder = lease.take(run).holder
    monkeypatch.setattr(RunFolder, "create", lambda *_: False)
    for claim in (lambda: lease.take(run, force=True), lambda: lease.join(run, holder)):
        with pytest.raises(UserError, match="takes no claim, but shows no newer one"):
            claim()


def test_a_file_in_place_of_the_folder_gets_one_line(run: RunFolder) -> None:
    (run.local / "lease").rmdir()
    (run.local / "lease").write_text("")
    with pytest.raises(UserError, match="r/lease cannot be used: "):
        lease.take(run)


def test_neither_a_huge_claim_nor_a_huge_sign_of_life_is_read(run: RunFolder) -> None:
    for path in (put(run, SOUND), put(run, b"", f"{HOLDER}.alive"), put(run, b"", "000002.json")):
        with path.open("ab") as file:
            file.truncate(2**42)  # sparse
    started = time.monotonic()
    assert lease.take(run).number == 3
    put(run, SOUND, "000004.json")
    assert lease.take(run).number == 5
    assert time.monotonic() - started < 10


def test_thousands_of_claims_cost_one_listing(run: RunFolder) -> None:
    for number in range(1, 3001):
        put(run, b"{}", f"{number:06}.json")
    started = time.monotonic()
    assert lease.take(run).number == 3001
    assert time.monotonic() - started < 10


def test_a_sign_of_life_is_not_written_through_a_link(run: RunFolder, tmp_path: Path) -> None:
    me = lease.this_process()
    outside = tmp_path / "outside"
    outside.write_text("mine")
    (run.local / "lease" / f".{me['holder']}.alive.{os.getpid()}.tmp").symlink_to(outside)
    lease.take(run)
    assert outside.read_text() == "mine"
