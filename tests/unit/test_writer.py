"""The thread that writes checkpoints: pieces first, nothing lost, nothing written twice."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lwo_dist.checkpoint import writer
from lwo_dist.checkpoint.format import (
    DamagedError,
    committed_steps,
    read_checkpoint,
    sha256_of,
    step_folder,
)
from lwo_dist.checkpoint.writer import CheckpointWriter, Outcome, Piece, Save
from lwo_dist.files import write_new, write_whole
from lwo_dist.lease import LostRunError
from lwo_dist.storage import RunFolder

POSITION = {"active_layer": "a", "skipped_steps": 0}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(str(tmp_path), "r")


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    disk = Disk()
    for write in (write_new, write_whole):
        monkeypatch.setattr(writer, write.__name__, partial(disk.write, write))
    create = RunFolder.create

    def create_noted(run: RunFolder, name: str, data: bytes) -> bool:
        disk.note(name.rpartition("/")[2])
        return create(run, name, data)

    monkeypatch.setattr(RunFolder, "create", create_noted)
    return disk


class Disk:
    """Notes every file that is written; one whose name holds `refuses` cannot be."""

    def __init__(self) -> None:
        self.written: list[str] = []
        self.refuses = ""

    def note(self, name: str) -> None:
        if self.refuses and self.refuses in name:
            raise OSError(28, "No space left on device")
        self.written.append(name)

    def write(self, write: Callable[[Path, bytes], None], path: Path, data: bytes) -> None:
        self.note(path.name)
        write(path, data)


def model_files(folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text('{"model": {}}')


def make_writer(
    run: RunFolder,
    keep: int = 9,
    files: Callable[[Path], None] = model_files,
    may_write: Callable[[], None] = lambda: None,
) -> CheckpointWriter:
    return CheckpointWriter(run, files, keep=keep, may_write=may_write)


def piece(layer: str, step: int, value: float = 0.0, size: int = 4) -> Piece:
    tensors = {f"{layer}.weight": torch.full((size,), value + step)}
    return Piece(f"{layer}.{step:06d}", ".safetensors", tensors)


def save(target: CheckpointWriter, step: int, *pieces: Piece, best_step: int = 0) -> Outcome:
    """Put the pieces and commit a checkpoint of the layers a and b; returns what came of it."""
    for item in pieces:
        target.put(item.stem.partition(".")[0], item)
    weights = {layer: (f"{layer}.weight",) for layer in ("a", "b")}
    moments = {"a.weight": {"exp_avg": torch.ones(4)}}
    target.commit(Save(step, {"step": step, **POSITION}, {}, moments, weights, {}, best_step))
    return target.outcome()


def contents(run: RunFolder, step: int) -> dict[str, float]:
    """First value of each weight of a checkpoint whose every byte is verified."""
    return {
        name: float(tensor[0])
        for tensors in read_checkpoint(run, step).weights()
        for name, tensor in tensors.items()
    }


def test_pieces_come_before_the_checkpoint_and_state_json_comes_last(
    run: RunFolder, disk: Disk
) -> None:
    target = make_writer(run)
    outcome = save(target, 3, piece("a", 3), piece("b", 2))
    assert [name.partition(".")[0] for name in disk.written] == [
        "a",
        "b",
        "active",
        "model",
        "state",
    ]
    assert outcome.folder == run.local / step_folder(3)
    assert (outcome.step, outcome.error) == (3, "") and outcome.seconds > 0
    assert contents(run, 3) == {"a.weight": 3.0, "b.weight": 2.0}
    files = [path for path in run.local.rglob("*") if path.is_file()]
    assert outcome.bytes_written == sum(path.stat().st_size for path in files)


def test_a_layer_that_did_not_change_is_written_once_and_named_again(
    run: RunFolder, disk: Disk
) -> None:
    target = make_writer(run)
    save(target, 3, piece("a", 3), piece("b", 2))
    disk.written.clear()
    save(target, 5, piece("a", 5))
    assert [name.partition(".")[0] for name in disk.written] == ["a", "active", "model", "state"]
    assert contents(run, 5) == {"a.weight": 5.0, "b.weight": 2.0}
    assert contents(run, 3) == {"a.weight": 3.0, "b.weight": 2.0}


@pytest.mark.parametrize("refused", ["a.000005", "active", "model.safetensors.index", "state.json"])
def test_a_save_that_fails_is_no_checkpoint_and_the_next_one_holds_its_layers(
    run: RunFolder, disk: Disk, refused: str
) -> None:
    target = make_writer(run)
    save(target, 3, piece("a", 3), piece("b", 2))
    disk.refuses = refused
    failed = save(target, 5, piece("a", 5))
    assert "No space left on device" in failed.error
    assert ("a.000005" in failed.error) == (refused == "a.000005")  # the file that failed is named
    assert failed.bytes_written == 0
    assert committed_steps(run) == [3]
    assert contents(run, 3) == {"a.weight": 3.0, "b.weight": 2.0}
    disk.refuses = ""
    # The loop hands over only what has changed since: b.
    assert save(target, 7, piece("b", 7)).error == ""
    assert contents(run, 7) == {"a.weight": 5.0, "b.weight": 7.0}


def test_a_newer_piece_replaces_one_that_could_not_be_written(run: RunFolder, disk: Disk) -> None:
    target = make_writer(run)
    disk.refuses = "a.000003"
    assert save(target, 3, piece("a", 3), piece("b", 2)).error
    assert save(target, 5, piece("a", 5)).error == ""
    assert not any(name.startswith("a.000003") for name in disk.written)
    assert contents(run, 5) == {"a.weight": 5.0, "b.weight": 2.0}


def test_the_newest_and_the_best_are_kept_with_the_files_they_name(run: RunFolder) -> None:
    target = make_writer(run, keep=2)
    save(target, 1, piece("a", 1), piece("b", 1), best_step=1)
    for step in (3, 5, 7):
        save(target, step, piece("a", step), best_step=3)
    assert committed_steps(run) == [3, 5, 7]
    save(target, 9, piece("b", 9), best_step=3)
    assert committed_steps(run) == [3, 7, 9]
    stems = {path.name.rpartition(".")[0].rpartition(".")[0] for path in run.local.glob("layers/*")}
    assert stems == {"a.000003", "b.000001", "a.000007", "b.000009"}
    for step in (3, 7, 9):
        contents(run, step)


def test_old_checkpoints_that_cannot_be_removed_fail_no_save(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise DamagedError("state.json is malformed")

    target = make_writer(run, keep=1)
    save(target, 1, piece("a", 1), piece("b", 1))
    with monkeypatch.context() as patch:
        patch.setattr(writer, "prune", refuse)
        assert save(target, 3, piece("a", 3)).error == ""
    assert f"warning: old checkpoints in {run} could not be removed" in capsys.readouterr().out
    assert committed_steps(run) == [1, 3]
    save(target, 5, piece("a", 5))
    assert committed_steps(run) == [5]


# ---- another process takes the run over


SEAL = f"{step_folder(3)}/state.json"
CHECKS = ("a", "b", "folder", "active", "index", "state", "after state", "prune")


def test_every_change_is_allowed_first_and_the_seal_afterwards_too(
    run: RunFolder, disk: Disk
) -> None:
    target = make_writer(run, may_write=lambda: disk.written.append("?"))
    save(target, 3, piece("a", 3), piece("b", 3))
    assert [name.partition(".")[0] for name in disk.written] == [
        *("?", "a", "?", "b", "?"),  # the last one to remove what is left in the folder
        *("?", "active", "?", "model", "?", "state", "?"),
        "?",  # to remove older checkpoints
    ]


@pytest.mark.parametrize("lost_at", CHECKS)
def test_a_save_of_a_run_that_is_lost_changes_nothing_more(
    run: RunFolder, lost_at: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """When it looks, the other process has taken the run and committed the same step."""
    calls = count()

    def may_write() -> None:
        if next(calls) >= CHECKS.index(lost_at):
            run.create(SEAL, b"theirs")
            raise LostRunError("another process took this run over")

    save(make_writer(run), 1, piece("a", 1), piece("b", 1))
    target = make_writer(run, keep=1, may_write=may_write)
    with pytest.raises(LostRunError):
        save(target, 3, piece("a", 3), piece("b", 3))
    assert "warning" not in capsys.readouterr().out
    if lost_at in ("after state", "prune"):
        assert contents(run, 3) == {"a.weight": 3.0, "b.weight": 3.0}
    else:
        assert run.read(SEAL, limit=10**6) == b"theirs"
    assert contents(run, 1) == {"a.weight": 1.0, "b.weight": 1.0}


@pytest.mark.parametrize("sealed_after", ["folder", "active", "index", "state"])
def test_the_seal_of_another_process_is_not_overwritten(run: RunFolder, sealed_after: str) -> None:
    """It commits the step after a look that has found nothing."""
    calls = count()

    def may_write() -> None:
        if next(calls) == CHECKS.index(sealed_after):
            run.create(SEAL, b"theirs")

    target = make_writer(run, may_write=may_write)
    outcome = save(target, 3, piece("a", 3), piece("b", 3))
    assert outcome.error in (f"another process has committed {step_folder(3)}", "File exists")
    assert run.read(SEAL, limit=10**6) == b"theirs"


# ---- memory


class LazyExecutor:
    """Runs a job when somebody waits for it, so that what `put` waits for can be seen."""

    def __init__(self, *_: Any) -> None:
        pass

    def submit(self, job: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.exception = lambda timeout=None: self._run(future, job, arguments)  # type: ignore[method-assign]
        return future

    def _run(self, future: Future[Any], job: Callable[..., Any], arguments: Any) -> None:
        future.set_result(job(*arguments))


@pytest.fixture
def lazy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "ThreadPoolExecutor", LazyExecutor)
    monkeypatch.setattr(writer, "_MAX_WAITING_BYTES", 100)


@pytest.mark.usefixtures("lazy")
def test_put_waits_while_more_than_the_limit_is_in_memory(run: RunFolder, disk: Disk) -> None:
    target = make_writer(run)
    for step in (1, 2):
        target.put(f"a{step}", piece("a", step, size=12))  # 48 bytes each
    assert disk.written == [] and not target.is_done
    target.put("a3", piece("a", 3, size=12))
    [written] = disk.written
    assert written.startswith("a.000001")  # the oldest, and no more than is needed


@pytest.mark.usefixtures("lazy")
def test_one_piece_above_the_limit_is_written_before_put_returns(
    run: RunFolder, disk: Disk
) -> None:
    target = make_writer(run)
    target.put("a", piece("a", 1, size=26))  # 104 bytes
    assert len(disk.written) == 1 and target.is_done


@pytest.mark.usefixtures("lazy")
def test_a_piece_that_a_newer_one_replaced_is_skipped(run: RunFolder, disk: Disk) -> None:
    target = make_writer(run)
    target.put("a", piece("a", 1, size=12))
    target.put("a", piece("a", 2, size=26))  # over the limit: both jobs have run when this returns
    [written] = disk.written
    assert written.startswith("a.000002") and target.is_done


@pytest.mark.usefixtures("lazy")
def test_put_waits_for_no_piece_that_could_not_be_written(run: RunFolder, disk: Disk) -> None:
    target = make_writer(run)
    disk.refuses = ".safetensors"
    target.put("a", piece("a", 1, size=100))
    assert disk.written == [] and target.is_done


# ---- config and tokenizer


def test_config_and_tokenizer_are_written_once_and_linked(run: RunFolder) -> None:
    calls: list[str] = []

    def count(folder: Path) -> None:
        calls.append(folder.name)
        model_files(folder)

    target = make_writer(run, keep=1, files=count)
    save(target, 1, piece("a", 1), piece("b", 1))
    inode = (run.local / step_folder(1) / "config.json").stat().st_ino
    for step in (3, 5):  # the folder with the first copy is pruned on the way
        save(target, step, piece("a", step))
    assert calls == ["step_000001"]
    assert (run.local / step_folder(5) / "config.json").stat().st_ino == inode
    state = json.loads((run.local / step_folder(5) / "state.json").read_text())
    assert {"config.json", "tokenizer.json"} <= state["sha256"].keys()
    contents(run, 5)


def test_they_are_copied_where_there_are_no_links(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    target = make_writer(run)
    save(target, 1, piece("a", 1), piece("b", 1))
    save(target, 3, piece("a", 3))
    first, second = (run.local / step_folder(step) / "tokenizer.json" for step in (1, 3))
    assert not first.samefile(second) and first.read_bytes() == second.read_bytes()
    contents(run, 3)


def test_they_are_written_again_where_the_last_copy_is_gone(run: RunFolder) -> None:
    target = make_writer(run)
    save(target, 1, piece("a", 1), piece("b", 1))
    (run.local / step_folder(1) / "config.json").unlink()
    assert save(target, 3, piece("a", 3)).error == ""
    assert (run.local / step_folder(3) / "config.json").read_text() == "{}"


# ---- a resumed run


def test_a_resumed_run_writes_no_file_again_and_forgets_later_checkpoints(
    run: RunFolder, disk: Disk
) -> None:
    before = make_writer(run)
    save(before, 1, piece("a", 1), piece("b", 1))
    save(before, 3, piece("a", 3))
    save(before, 5, piece("a", 5))
    disk.written.clear()
    written = {
        path.name.partition(".")[0]: (f"layers/{path.name}", sha256_of(path))
        for path in run.local.glob("layers/*")
        if path.name.startswith(("a.000003", "b."))
    }
    target = make_writer(run, keep=2)
    target.remember(written, 3)
    save(target, 4, piece("b", 4))
    assert [name.partition(".")[0] for name in disk.written] == ["b", "active", "model", "state"]
    assert contents(run, 4) == {"a.weight": 3.0, "b.weight": 4.0}
    assert committed_steps(run) == [3, 4]  # 5 belongs to the attempt that is given up


def test_a_damaged_file_of_the_same_name_is_written_anew(run: RunFolder, disk: Disk) -> None:
    save(make_writer(run), 1, piece("a", 1), piece("b", 1))
    [damaged] = run.local.glob("layers/a.*")
    damaged.write_bytes(damaged.read_bytes()[:-4])
    disk.written.clear()
    assert save(make_writer(run), 1, piece("a", 1), piece("b", 1)).error == ""
    # The one of b is whole, and stays.
    assert [name.partition(".")[0] for name in disk.written] == ["a", "active", "model", "state"]
    assert float(load_file(damaged)["a.weight"][0]) == 1.0
    contents(run, 1)
