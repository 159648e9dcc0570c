"""A run's folder, on a plain file system and in an object store, and files written whole."""

from __future__ import annotations

import errno
import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import obstore
import pytest
from obstore.store import LocalStore
from pyarrow.fs import LocalFileSystem

from lwo_dist import storage
from lwo_dist.errors import UserError
from lwo_dist.files import write_whole
from lwo_dist.storage import RunFolder, is_url, new_run_name, storage_folder


class FakeStore:
    """An object store in a folder: a file needs no folder to be made before it."""

    region = None

    def __init__(self) -> None:
        self._fs = LocalFileSystem()
        self.calls: list[str] = []
        self.failure: Exception | None = None

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(target: Any) -> Any:
            path = target if isinstance(target, str) else target.base_dir
            self.calls.append(f"{name} {path.rpartition('/')[2]}")
            if self.failure is not None:
                raise self.failure
            if name == "open_output_stream":
                Path(path).parent.mkdir(parents=True, exist_ok=True)
            return getattr(self._fs, name)(target)

        return call


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeStore:
    """What `s3://bucket/runs` leads to; its files lie in `bucket/` of tmp_path."""
    fake = FakeStore()
    monkeypatch.setenv("LWO_SCRATCH_DIR", str(tmp_path / "node"))
    monkeypatch.setattr(
        storage, "_open", lambda url, run_name: (fake, f"{tmp_path}/bucket/runs/{run_name}")
    )
    monkeypatch.setattr(
        storage,
        "_open_conditional",
        lambda url, region: LocalStore(tmp_path / url.partition("://")[2], mkdir=True),
    )
    return fake


@pytest.fixture(params=["folder", "file URL", "store"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RunFolder]:
    """The same run folder in each kind of storage."""
    if request.param == "store":
        request.getfixturevalue("store")
        yield RunFolder("s3://bucket/runs", "r")
    elif request.param == "file URL":
        yield RunFolder(f"file://{tmp_path}/runs", "r")
    else:
        yield RunFolder(str(tmp_path / "runs"), "r")


def write(run: RunFolder, *names: str, text: str = "") -> None:
    for name in names:
        path = run.local / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text or name)


def other_machine(run: RunFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> RunFolder:
    """The same run, seen from a machine that has none of its files."""
    monkeypatch.setenv("LWO_SCRATCH_DIR", str(tmp_path / "other_node"))
    return RunFolder("s3://bucket/runs", "r")


# ---- names


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("s3://bucket/runs", True),
        ("gs://bucket", True),
        ("file:///shared/runs", False),
        ("/shared/runs", False),
        ("runs", False),
    ],
)
def test_which_storage_is_an_object_store(name: str, expected: bool) -> None:
    assert is_url(name) is expected


def test_the_local_folder_of_a_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert storage_folder("runs") == tmp_path / "runs"
    assert storage_folder("~/runs") == tmp_path / "home" / "runs"
    assert storage_folder("file:///shared/runs") == Path("/shared/runs")
    monkeypatch.setenv("LWO_SCRATCH_DIR", str(tmp_path / "node"))
    scratch = storage_folder("s3://bucket/runs")
    assert scratch.parent == tmp_path / "node"
    assert storage_folder("s3://bucket/runs/") == scratch
    assert storage_folder("s3://bucket/other") != scratch
    monkeypatch.delenv("LWO_SCRATCH_DIR")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert storage_folder("s3://bucket/runs") == (
        tmp_path / f"lwo_dist-{os.getuid()}" / scratch.name
    )


@pytest.mark.usefixtures("store")
def test_a_run_by_its_path_or_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    by_path = RunFolder.at("runs/r/")
    assert (by_path.local, by_path.url, str(by_path)) == (
        tmp_path / "runs" / "r",
        None,
        str(tmp_path / "runs" / "r"),
    )
    by_url = RunFolder.at("s3://bucket/runs/r")
    assert by_url.url == str(by_url) == "s3://bucket/runs/r"
    assert by_url.local == RunFolder("s3://bucket/runs", "r").local


def test_a_url_that_nothing_opens_is_refused() -> None:
    with pytest.raises(UserError, match=r"^storage = ftp://host/runs: .*; give a folder, or a URL"):
        RunFolder("ftp://host/runs", "r")


def test_new_run_names_differ_and_say_method_and_time() -> None:
    names = {new_run_name("full") for _ in range(20)}
    assert len(names) > 1  # within one second
    assert all(re.fullmatch(r"full-\d{8}-\d{6}-[0-9a-f]{4}", name) for name in names)


# ---- files


def test_folders_and_files_are_named_from_the_run_s_folder(run: RunFolder) -> None:
    names = ["checkpoints/step_2/b", "checkpoints/step_2/deep/c", "checkpoints/step_1/a", "top"]
    write(run, *names)
    run.push(names)
    assert run.folders("checkpoints") == ["step_1", "step_2"]
    assert run.files("checkpoints/step_2") == ["checkpoints/step_2/b", "checkpoints/step_2/deep/c"]
    assert run.files("") == sorted(names)
    assert run.folders("nowhere") == [] == run.files("nowhere")


def test_what_was_pushed_is_pulled_and_replaces_what_is_there(run: RunFolder) -> None:
    write(run, "a/b", text="sent")
    run.push(["a/b"])
    if run.url is not None:
        write(run, "a/b", text="older copy")
    assert run.pull("a/b") == run.local / "a" / "b"
    assert (run.local / "a" / "b").read_text() == "sent"
    assert [path.name for path in (run.local / "a").iterdir()] == ["b"]  # no temporary file


def test_another_machine_pulls_into_folders_that_it_lacks(
    store: FakeStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = RunFolder("s3://bucket/runs", "r")
    write(run, "a/b")
    run.push(["a/b"])
    other = other_machine(run, monkeypatch, tmp_path)
    assert other.local != run.local
    assert other.pull("a/b").read_text() == "a/b"


@pytest.mark.usefixtures("store")
def test_a_pull_of_a_missing_file_says_so_and_leaves_nothing() -> None:
    run = RunFolder("s3://bucket/runs", "r")
    with pytest.raises(FileNotFoundError):
        run.pull("nothing")
    assert list(run.local.iterdir()) == []


def test_a_download_that_breaks_off_spares_the_older_copy(store: FakeStore) -> None:
    run = RunFolder("s3://bucket/runs", "r")
    write(run, "a", text="older copy")

    class Broken:
        def __enter__(self) -> Broken:
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def read(self, size: int) -> bytes:
            raise OSError("connection reset")

    store.open_input_stream = lambda path: Broken()  # type: ignore[attr-defined]
    with pytest.raises(OSError, match="connection reset"):
        run.pull("a")
    assert [path.name for path in run.local.iterdir()] == ["a"]
    assert (run.local / "a").read_text() == "older copy"


def test_every_failure_of_a_store_is_an_oserror_that_names_the_run(store: FakeStore) -> None:
    run = RunFolder("s3://bucket/runs", "r")
    write(run, "a")
    store.failure = ValueError("no such bucket\nand a page more")
    for call in (lambda: run.push(["a"]), lambda: run.pull("a"), lambda: run.files("")):
        with pytest.raises(OSError, match=r"^s3://bucket/runs/r: no such bucket$"):
            call()


def test_remove_is_for_files_here_and_in_the_store(run: RunFolder) -> None:
    write(run, "a", "b", "c")
    run.push(["a", "b", "c"])
    (run.local / "b").unlink()
    run.remove(["a", "b", "never"])
    assert run.files("") == ["c"]
    assert sorted(path.name for path in run.local.iterdir()) == ["c"]


def test_a_folder_goes_with_its_first_file_before_the_others(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["step/a", "step/state.json", "step/deep/z", "other/a"]
    write(run, *names)
    run.push(names)
    gone: list[str] = []
    unlink = Path.unlink
    monkeypatch.setattr(
        Path, "unlink", lambda path, **options: gone.append(path.name) or unlink(path, **options)
    )
    run.remove_folder("step", first="state.json")
    assert gone[0] == "state.json"
    assert {"a", "z"} <= set(gone)
    assert run.files("") == ["other/a"]
    assert not (run.local / "step").exists()


def test_the_store_loses_the_first_file_before_the_others(store: FakeStore) -> None:
    run = RunFolder("s3://bucket/runs", "r")
    write(run, "step/a", "step/state.json", "step/z")
    run.push(run.local.joinpath("step", name).relative_to(run.local).as_posix() for name in "az")
    run.push(["step/state.json"])
    store.calls.clear()
    run.remove_folder("step", first="state.json")
    deleted = [call for call in store.calls if call.startswith("delete_file")]
    assert deleted == ["delete_file state.json", "delete_file a", "delete_file z"]


# ---- the record of a run


RECORD = ["config.yaml", "metrics.jsonl", "pictures/memory.png", "run.json"]
NO_RECORD = [
    "layers/embed.safetensors",
    "checkpoints/step_1/state.json",
    "model/config.json",
    "checkpoint_manager_snapshot.json",
    ".validate_storage_marker",
    ".run.json.tmp",
]


def test_small_files_go_and_come_and_large_ones_stay(
    store: FakeStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = RunFolder("s3://bucket/runs", "r")
    write(run, *RECORD, *NO_RECORD)
    run.push_small()
    assert run.files("") == RECORD
    run.push(NO_RECORD)
    other = other_machine(run, monkeypatch, tmp_path)
    write(other, "run.json", text="newer")
    other.fetch_small()
    here = [path for path in other.local.rglob("*") if path.is_file()]
    assert sorted(path.relative_to(other.local).as_posix() for path in here) == RECORD
    assert (other.local / "run.json").read_text() == "newer"
    assert (other.local / "config.yaml").read_text() == "config.yaml"


def test_a_plain_folder_sends_and_fetches_nothing(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path / "runs"), "r")
    run.push(["no such file"])
    run.push_small()
    run.fetch_small()
    assert not (tmp_path / "runs").exists()
    assert run.pull("a") == tmp_path / "runs" / "r" / "a"


# ---- can it be written


def test_a_storage_that_can_be_written_is_left_as_it_was(run: RunFolder) -> None:
    run.check_writable()
    assert run.files("") == []
    assert [path for path in run.local.parent.rglob("*") if path.is_file()] == []


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/runs: Not a directory; give a writable"):
        RunFolder(str(tmp_path / "file" / "runs"), "r").check_writable()


def test_a_store_that_cannot_be_written_is_refused(store: FakeStore) -> None:
    run = RunFolder("s3://bucket/runs", "r")
    store.failure = PermissionError("access denied")
    with pytest.raises(UserError, match=r"^storage = s3://bucket/runs/r: .*access denied; give a"):
        run.check_writable()
    assert list(run.local.iterdir()) == []


# ---- write_whole


def test_a_whole_write_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_whole(path, b"old")

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_the_name_appears_only_when_the_bytes_are_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_whole(path, b"old")
    synced: list[tuple[str, bytes]] = []
    fsync = os.fsync

    def watch(descriptor: int) -> None:
        kind = "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
        synced.append((kind, path.read_bytes()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watch)
    write_whole(path, b"new")
    assert synced == [("file", b"old"), ("folder", b"new")]


def test_a_file_system_that_syncs_no_folders_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse_folders(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse_folders)
    write_whole(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"


# ---- files that several processes want to write


def test_a_file_is_created_once(run: RunFolder) -> None:
    assert run.read("lease/1.json", limit=100) is None
    assert run.create("lease/1.json", b"first")
    assert not run.create("lease/1.json", b"second")
    assert run.read("lease/1.json", limit=100) == b"first"
    run.write("lease/1.json", b"third")
    assert run.read("lease/1.json", limit=100) == b"third"
    run.write("lease/new", b"fourth")
    assert run.files("lease") == ["lease/1.json", "lease/new"]


def test_of_many_that_create_it_at_once_one_does(run: RunFolder) -> None:
    with ThreadPoolExecutor(8) as pool:
        texts = [str(number).encode() for number in range(8)]
        made = list(pool.map(lambda text: run.create("lease/1.json", text), texts))
    assert made.count(True) == 1
    assert run.read("lease/1.json", limit=100) == texts[made.index(True)]


def test_it_is_created_without_hard_links_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    run = RunFolder(str(tmp_path), "r")
    assert run.create("lease/1.json", b"first") and not run.create("lease/1.json", b"second")
    assert run.read("lease/1.json", limit=100) == b"first"
    assert [path.name for path in (run.local / "lease").iterdir()] == ["1.json"]


def test_a_new_file_is_read_past_a_client_s_cache_of_missing_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On NFS, a name that was missing stays so until its folder is opened."""
    run = RunFolder(str(tmp_path), "r")
    run.write("lease/1.json", b"theirs")
    missing: set[Path] = set()
    open_file, open_folder = Path.open, os.open

    def cached(path: Path, *arguments: Any) -> Any:
        try:
            assert path not in missing
            return open_file(path, *arguments)
        except (AssertionError, FileNotFoundError):
            missing.add(path)
            raise FileNotFoundError from None

    def opened(path: Path, *arguments: Any) -> int:
        missing.difference_update(Path(path).iterdir())
        return open_folder(path, *arguments)

    monkeypatch.setattr(Path, "open", cached)
    monkeypatch.setattr(os, "open", opened)
    assert run.read("lease/2.json", limit=100) is None
    os.link(run.path("lease/1.json"), run.path("lease/2.json"))
    assert run.read("lease/2.json", limit=100) == b"theirs"


@pytest.mark.parametrize("times", [1, 2])
def test_a_file_that_is_replaced_while_it_is_read_is_read_again(
    times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS reports it as a stale file handle, and one that is gone for good as well."""
    run = RunFolder(str(tmp_path), "r")
    run.write("lease/1.alive", b"beat")
    stale = [OSError(errno.ESTALE, "Stale file handle")] * times
    open_file = Path.open

    def opened(path: Path, *arguments: Any) -> Any:
        if stale:
            raise stale.pop()
        return open_file(path, *arguments)

    monkeypatch.setattr(Path, "open", opened)
    if times == 1:
        assert run.read("lease/1.alive", limit=100) == b"beat"
    else:
        with pytest.raises(OSError, match="Stale"):
            run.read("lease/1.alive", limit=100)


@pytest.mark.usefixtures("store")
def test_a_store_that_ignores_the_condition_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    put = obstore.put
    monkeypatch.setattr(obstore, "put", lambda store, name, data, mode: put(store, name, data))
    with pytest.raises(UserError, match=r"s3://bucket/runs/r: this store ignores the condition"):
        RunFolder("s3://bucket/runs", "r").check_writable()
