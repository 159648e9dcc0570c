"""Other users of the machine can neither read nor replace our files."""

from __future__ import annotations

import os
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lwo_dist.access import Access, access_of, private_folder, scratch_folder, share, umask_of
from lwo_dist.cache import build_once
from lwo_dist.cluster import nodes
from lwo_dist.data.repository import clone_repository
from lwo_dist.errors import UserError
from lwo_dist.examples.tiny_code import Recipe, ensure_tiny_code
from lwo_dist.storage import storage_folder

OTHER_USER = 54321
_LONG_AGO = (1_000_000_000, 1_000_000_000)
TINY = Recipe(
    files=3,
    vocab_size=300,
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=1,
    num_key_value_heads=1,
    sequence_length=16,
    steps=1,
)


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def _link(path: Path) -> None:
    elsewhere = path.with_name("elsewhere")
    elsewhere.mkdir(mode=0o700)
    path.symlink_to(elsewhere)


def _others(path: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("needs root: a folder of another user")
    path.mkdir(mode=0o700)
    os.chown(path, OTHER_USER, OTHER_USER)


def _open(path: Path) -> None:
    path.mkdir()
    path.chmod(0o755)


def _of_the_group(path: Path) -> None:
    path.mkdir()
    path.chmod(0o770)


TAKEN = [
    (_link, r"is a symlink \(owner: "),
    (_others, f"belongs to user {OTHER_USER}, "),
    (_open, r"is open to others \(mode 0755\), .* run chmod 700 .* if all its .* are yours, or "),
    (_of_the_group, r"is open to others \(mode 0770\)"),
    (Path.touch, r"is not a folder \(owner: "),
]


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The machine's temporary directory; a short path, because of Ray's sockets."""
    with tempfile.TemporaryDirectory(prefix="", dir="/tmp") as name:
        monkeypatch.setattr(tempfile, "tempdir", name)
        monkeypatch.delenv("LWO_SCRATCH_DIR", raising=False)
        monkeypatch.delenv("RAY_TMPDIR", raising=False)
        yield Path(name)


def test_a_private_folder_has_mode_0700(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        made = private_folder(tmp_path / "mine")
    finally:
        os.umask(before)
    assert _mode(made) == 0o700
    assert private_folder(made) == made


def _use_scratch() -> None:
    scratch_folder()


def _use_bucket() -> None:
    storage_folder("s3://bucket/runs")


def _use_ray() -> None:
    with nodes._temporary_folder():
        pass


@pytest.mark.parametrize("use", [_use_scratch, _use_bucket, _use_ray])
@pytest.mark.parametrize(("take", "why"), TAKEN)
def test_an_unsafe_scratch_folder_is_refused(
    use: Callable[[], None], take: Callable[[Path], None], why: str, temporary: Path
) -> None:
    folder = temporary / f"lwo_dist-{os.getuid()}"
    take(folder)
    with pytest.raises(UserError, match=f"^{folder} {why}") as refused:
        use()
    assert "\n" not in str(refused.value)
    assert "set LWO_SCRATCH_DIR to a folder of your own" in str(refused.value)
    assert folder.is_file() or list(folder.iterdir()) == []


@pytest.mark.parametrize(("take", "why"), TAKEN)
def test_an_unsafe_local_folder_of_a_bucket_is_refused(
    take: Callable[[Path], None], why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Anybody who knows the bucket's name can compute the folder's.
    monkeypatch.setenv("LWO_SCRATCH_DIR", str(tmp_path))
    folder = storage_folder("s3://bucket/runs")
    assert _mode(folder) == 0o700
    folder.rmdir()
    take(folder)
    with pytest.raises(UserError, match=f"^{folder} {why}"):
        storage_folder("s3://bucket/runs")


def test_a_scratch_folder_that_cannot_be_created(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LWO_SCRATCH_DIR", str(tmp_path / "file" / "scratch"))
    with pytest.raises(UserError, match="^LWO_SCRATCH_DIR = .*: Not a directory; give a writable"):
        storage_folder("s3://bucket/runs")


def test_the_ray_folder_is_private_and_removed(temporary: Path) -> None:
    with nodes._temporary_folder() as folder:
        folder.mkdir()
        folder.chmod(0o777)  # as Ray does
        assert [_mode(path) for path in folder.parents[:2]] == [0o700, 0o700]
        assert len(os.fsencode(folder)) + 68 <= 107
        assert folder.parents[2] == temporary
    assert not folder.parent.exists()


def test_ray_folders_of_killed_drivers_are_removed_after_a_day(temporary: Path) -> None:
    around = scratch_folder()
    for name, age in (("rold", 2), ("rnew", 0)):
        (around / name / "r").mkdir(parents=True)
        os.utime(around / name, _LONG_AGO if age else None)
    with nodes._temporary_folder() as running:
        os.utime(running.parent, _LONG_AGO)
        with nodes._temporary_folder():
            assert running.parent.exists()
        left = {path.name for path in around.iterdir()}
        assert left == {"rnew", running.parent.name}


def test_a_user_given_ray_folder_is_not_cleared(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(temporary))
    (temporary / "results").mkdir()
    os.utime(temporary / "results", _LONG_AGO)
    with nodes._temporary_folder() as folder:
        assert folder.parents[1] == temporary and _mode(folder.parent) == 0o700
    assert [path.name for path in temporary.iterdir()] == ["results"]


def test_the_umask_is_restored() -> None:
    before = os.umask(0o022)
    try:
        with pytest.raises(ZeroDivisionError), umask_of("private"):
            assert os.umask(0o077) == 0o077
            raise ZeroDivisionError
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(before)


def test_share_gives_the_group_the_owners_permissions(tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    for name, mode in (("read", 0o400), ("written", 0o600), ("run", 0o700)):
        (folder / "below").mkdir(parents=True, exist_ok=True)
        (folder / "below" / name).touch(mode=mode)
    outside = tmp_path / "outside"
    outside.touch(mode=0o600)
    (folder / "link").symlink_to(outside)
    share(folder)
    modes = [_mode(folder / "below" / name) for name in ("read", "written", "run")]
    assert [mode & 0o777 for mode in modes] == [0o440, 0o660, 0o770]
    assert _mode(folder / "below") & stat.S_ISGID
    assert _mode(outside) == 0o600
    share(tmp_path / "missing")


def _tree(folder: Path) -> list[Path]:
    return [path for path in (folder, *folder.rglob("*")) if not path.is_symlink()]


@pytest.fixture
def repository(tmp_path: Path) -> str:
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "a.py").write_text("x = 1\n")
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "a"]):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(folder), *identity, *words], check=True)
    return folder.as_uri()


@pytest.mark.parametrize("what", ["clone", "tiny-code", "build_once"])
@pytest.mark.parametrize("access", ["private", "group"])
def test_caches_follow_the_umask(
    access: Access, what: str, tmp_path: Path, repository: str
) -> None:
    cache = tmp_path / "cache"
    with umask_of(access):
        if what == "clone":
            clone_repository(repository, cache)
        elif what == "tiny-code":  # LWO_CACHE_DIR; safetensors writes 0600 whatever the umask
            ensure_tiny_code(cache, recipe=TINY, log=lambda line: None)
        else:
            build_once(cache / "t", lambda folder: (folder / "f").touch(mode=0o600))
    found = _tree(cache)
    assert len(found) > 2
    assert [path for path in found if _mode(path) & 0o007] == []
    if access == "private":
        assert [path for path in found if _mode(path) & 0o070] == []
        assert access_of(cache) == "private"
    else:
        assert [path for path in found if (_mode(path) & 0o070) << 3 != _mode(path) & 0o700] == []
        assert access_of(cache) == "group"
