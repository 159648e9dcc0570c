"""File modes of everything that a run and an export write, whatever the caller's umask."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from lwo_dist.cli import main
from lwo_dist.config import Config
from lwo_dist.run import prepare_and_run
from tests.distributed import test_run
from tests.distributed.test_run import make_config
from tests.ranks import run_ranks

inputs = test_run.inputs


def run_with_open_umask(config: Config) -> None:
    """Run as a torchrun rank does, with the usual umask."""
    os.umask(0o022)
    prepare_and_run(config)
    assert os.umask(0o022) == 0o022


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def tree(folder: Path) -> list[Path]:
    return [path for path in (folder, *folder.rglob("*")) if not path.is_symlink()]


def open_to(who: int, paths: list[Path]) -> list[str]:
    return [f"{mode(path):04o} {path}" for path in paths if mode(path) & who]


def closed_to_group(paths: list[Path]) -> list[str]:
    """The paths where the group has fewer permissions than the owner."""
    closed = [path for path in paths if (mode(path) & 0o070) << 3 != mode(path) & 0o700]
    return [f"{mode(path):04o} {path}" for path in closed]


@pytest.fixture(params=["private", "group"])
def access(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_run_modes_follow_access(access: str, inputs: tuple[Path, Path], tmp_path: Path) -> None:
    storage = tmp_path / "runs"
    settings = [f"access={access}", "tracking.enabled=true", "train.steps=4", "eval.num_lines=4"]
    # The default is private.
    settings = settings if access == "group" else settings[1:]
    run_ranks(run_with_open_umask, 2, make_config(inputs, storage, *settings))
    found = tree(storage)
    names = {path.name for path in found}
    # The run's record, the model, the spool, the tokenised data, MLflow's database and pictures.
    for name in ("run.json", "model.safetensors", "metrics.jsonl", "train.arrow", "mlflow.db"):
        assert name in names
    assert any(path.suffix == ".png" and "artifacts" in path.parts for path in found)
    assert open_to(0o007, found) == []
    before = os.umask(0o022)
    try:
        assert main(["export", str(storage / "r"), "--to", str(tmp_path / "given")]) == 0
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(before)
    given = tree(tmp_path / "given")
    assert len(given) > 3 and open_to(0o007, given) == []
    if access == "private":
        assert open_to(0o070, [*found, *given]) == []
    else:
        assert closed_to_group([*found, *given]) == []
        folders = [path for path in found if path.is_dir()]
        assert [path for path in folders if not mode(path) & stat.S_ISGID] == []


def test_an_existing_storage_folder_keeps_its_mode(
    access: str, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    storage = tmp_path / "runs"
    storage.mkdir()
    storage.chmod(0o755)
    (storage / "notes.txt").touch(mode=0o600)
    config = make_config(inputs, storage, f"access={access}", "train.steps=2", "eval.num_lines=2")
    run_ranks(run_with_open_umask, 1, config)
    assert (mode(storage), mode(storage / "notes.txt")) == (0o755, 0o600)
    assert open_to(0o007, tree(storage / "r") + tree(storage / "cache")) == []
