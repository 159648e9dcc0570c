"""After a power loss during a save or an export, an intact checkpoint or model remains.

`Disk` records what a process makes durable: the bytes of a file and the names in a folder are on
disk after their `fsync`. After each change it builds the states that a crash may leave.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from lwo_dist.checkpoint.export import export_model
from lwo_dist.checkpoint.format import newest_checkpoint
from lwo_dist.checkpoint.writer import CheckpointWriter
from lwo_dist.files import write_whole
from lwo_dist.storage import RunFolder
from tests.unit.test_writer import model_files, piece, save

SOUND = Path(__file__).parents[1] / "data" / "round1"
CHANGES = ("fsync", "link", "mkdir", "rename", "rmdir", "unlink")

Names = Callable[[dict[str, int], dict[str, int]], dict[str, int]]
"""The names in a folder after a crash, from those at its last fsync and the current ones."""


def _all(synced: dict[str, int], now: dict[str, int]) -> dict[str, int]:
    return now


def _none(synced: dict[str, int], now: dict[str, int]) -> dict[str, int]:
    return synced


def _removals(synced: dict[str, int], now: dict[str, int]) -> dict[str, int]:
    """Removals and renames are on disk, new files are not."""
    known = set(synced.values())
    kept = {name: inode if inode in known else synced.get(name) for name, inode in now.items()}
    return {name: inode for name, inode in kept.items() if inode is not None}


def _seals(synced: dict[str, int], now: dict[str, int]) -> dict[str, int]:
    """Of the new names, only the seal's is on disk."""
    return synced | {name: inode for name, inode in now.items() if name == "state.json"}


class Disk:
    """The durable state of the folder `root`, while `os` is patched.

    Args:
        check: called after each change with the folder that a crash may leave.
    """

    def __init__(
        self, root: Path, scratch: Path, check: Callable[[Path], None], patch: pytest.MonkeyPatch
    ) -> None:
        self._root = root
        self._scratch = scratch
        self._check = check
        self._bytes: dict[int, bytes] = {}  # inode -> what was synced
        self._names: dict[int, dict[str, int]] = {}
        self._held: list[int] = []  # an open file's inode is not reused
        self._busy = False
        self.crashes = 0
        for path in (root, *root.rglob("*")):  # existing files are on disk
            self._sync(os.open(path, os.O_RDONLY))
        for name in CHANGES:
            patch.setattr(os, name, self._watched(name, getattr(os, name)))

    def _watched(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any, **options: Any) -> Any:
            result = call(*arguments, **options)
            if not self._busy:
                self._busy = True
                if name == "fsync":
                    self._sync(os.dup(arguments[0]))
                for names in (_all, _none, _removals, _seals):
                    crashed = self._scratch / str(self.crashes)
                    self._build(self._root, crashed, names)
                    self._check(crashed)
                    self.crashes += 1
                self._busy = False
            return result

        return watched

    def _sync(self, descriptor: int) -> None:
        self._held.append(descriptor)
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            self._names[status.st_ino] = _names_in(Path(f"/proc/self/fd/{descriptor}"))
        else:
            os.lseek(descriptor, 0, os.SEEK_SET)
            self._bytes[status.st_ino] = Path(f"/proc/self/fd/{descriptor}").read_bytes()

    def _build(self, source: Path, target: Path, names: Names) -> None:
        self._build_inode(source.stat().st_ino, target, names, self._now())

    def _now(self) -> dict[int, dict[str, int]]:
        folders = [self._root, *(path for path in self._root.rglob("*") if path.is_dir())]
        return {folder.stat().st_ino: _names_in(folder) for folder in folders}

    def _build_inode(
        self, inode: int, target: Path, names: Names, now: dict[int, dict[str, int]]
    ) -> None:
        if inode in now or inode in self._names:
            target.mkdir(parents=True)
            synced = self._names.get(inode, {})
            for name, inner in names(synced, now.get(inode, {})).items():
                self._build_inode(inner, target / name, names, now)
        else:
            target.write_bytes(self._bytes.get(inode, b""))

    def close(self) -> None:
        for descriptor in self._held:
            os.close(descriptor)


def _names_in(folder: Path) -> dict[str, int]:
    return {entry.name: entry.inode() for entry in os.scandir(folder)}


def _refuse(*_: Any, **__: Any) -> None:
    raise OSError(95, "Operation not supported")


@pytest.mark.parametrize("link", [os.link, _refuse])
def test_a_crash_at_any_moment_keeps_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, link: Callable[..., None]
) -> None:
    root = tmp_path / "runs"
    root.mkdir()
    committed = 0

    def check(crashed: Path) -> None:
        found = newest_checkpoint(RunFolder(str(crashed), "r")) if committed else None
        assert committed == 0 or (found is not None and found.step >= committed)

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", link)
        disk = Disk(root, tmp_path / "crashed", check, patch)
        writer = CheckpointWriter(RunFolder(str(root), "r"), model_files, keep=1)
        for step in (1, 2, 3):
            pieces = [piece("a", step), *([piece("b", step)] if step == 1 else [])]
            assert save(writer, step, *pieces).error == ""
            committed = step
        assert disk.crashes > 100
        disk.close()


def test_files_are_durable_before_the_commit_and_the_commit_before_the_prune(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the first save too, and for copies on file systems without links."""

    def check(crashed: Path) -> None:
        for seal in crashed.glob("*/checkpoints/*/state.json"):
            if seal.stat().st_size:
                run = RunFolder(str(crashed), "r")
                assert newest_checkpoint(run) is not None

    (tmp_path / "runs").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", _refuse)
        disk = Disk(tmp_path / "runs", tmp_path / "crashed", check, patch)
        writer = CheckpointWriter(RunFolder(str(tmp_path / "runs"), "r"), model_files, keep=1)
        for step in (1, 2):
            assert save(writer, step, piece("a", step), piece("b", step)).error == ""
        disk.close()


def test_a_crash_during_an_export_leaves_a_complete_model_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = newest_checkpoint(RunFolder(str(SOUND), "run"))
    assert checkpoint is not None
    target = tmp_path / "runs" / "model"
    target.parent.mkdir()
    done = False

    def check(crashed: Path) -> None:
        models = [path for path in crashed.iterdir() if not path.name.endswith(".tmp")]
        assert models or not done
        for model in models:
            json.loads((model / "config.json").read_text())
            assert (model / "README.md").stat().st_size
            assert load_file(model / "model.safetensors")

    with monkeypatch.context() as patch:
        disk = Disk(target.parent, tmp_path / "crashed", check, patch)
        for _ in range(2):  # the second replaces the first
            export_model(checkpoint, target)
            done = True
        disk.close()
    assert [path.name for path in target.parent.iterdir()] == ["model"]


def test_a_crash_during_a_record_write_leaves_the_old_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """run.json, summary.json and the files of evaluations."""
    root = tmp_path / "run"
    root.mkdir()
    written = 0

    def check(crashed: Path) -> None:
        path = crashed / "run.json"
        assert not written or int(path.read_text()) in (written, written + 1)

    with monkeypatch.context() as patch:
        disk = Disk(root, tmp_path / "crashed", check, patch)
        for number in (1, 2):
            write_whole(root / "run.json", str(number).encode())
            written = number
        disk.close()
