"""A save costs the layers trained since the last one and holds the model of its step; a failed one
loses nothing.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from lwo_dist.checkpoint import writer
from lwo_dist.checkpoint.format import (
    committed_steps,
    newest_checkpoint,
    read_checkpoint,
    step_folder,
)
from lwo_dist.checkpoint.resume import restore
from lwo_dist.checkpoint.schema import INDEX
from lwo_dist.checkpoint.store import LayerStore
from lwo_dist.files import write_whole
from tests import stores

MB = 10**6


def open_store(folder: Path, keep: int = 1) -> LayerStore:
    return LayerStore(stores.run_folder(folder), stores.model_files, keep=keep)


def sizes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in (folder / "r" / "layers").iterdir()}


@pytest.mark.parametrize("state", ["reset", "keep"])
def test_a_save_writes_the_layers_trained_since_the_last_one_and_the_active_moments(
    tmp_path: Path, state: str
) -> None:
    lwo, store = stores.attach(state=state), open_store(tmp_path, keep=100)
    layers = {layer.name: layer for layer in lwo.layers}
    bytes_of = {
        name: sum(t.nbytes for t in lwo.read_layer(layer).values())
        for name, layer in layers.items()
    }
    stores.step(lwo, 1)
    stores.save(store, lwo)  # the first one holds all layers
    before = lwo.step_count
    for until in (2, 3, 6, 7, 16):
        trained = {
            lwo.layers[lwo.schedule.active_layer(step)].name for step in range(before, until)
        }
        stores.step(lwo, until - before)
        known = set(sizes(tmp_path))
        outcome = stores.save(store, lwo)
        moments = sum(
            t.nbytes
            for kinds in lwo.read_moments(lwo.active_layer).values()
            for t in kinds.values()
        )
        parked = sum(
            2 * bytes_of[name]
            for name in trained - {lwo.active_layer.name}
            if lwo.read_moments(layers[name])
        )
        exact = sum(bytes_of[name] for name in trained) + moments + parked
        assert exact <= outcome.bytes_written <= exact + MB, until
        new = set(sizes(tmp_path)) - known
        assert {name.partition(".")[0] for name in new if "moments" not in name} == trained
        before = until
    written = sorted(sizes(tmp_path))
    assert [name for name in written if name.startswith("rest")] == []  # this model has no rest
    assert any("moments" in name for name in written) == (state == "keep")


def test_a_save_holds_the_step_it_was_called_at_though_the_loop_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lwo, store = stores.attach(state="keep"), open_store(tmp_path)
    stores.step(lwo, 3)
    may_write = threading.Event()
    monkeypatch.setattr(
        writer, "write_whole", lambda *args: may_write.wait(60) and write_whole(*args)
    )
    results: dict[str, list[float]] = {"losses": [1.0]}
    store.save(lwo, {"results": results})
    at_save = stores.state_of(lwo)
    assert not store.poll()
    stores.step(lwo, 4)
    results["losses"].append(2.0)
    may_write.set()
    outcome = store.wait()
    assert outcome is not None and not outcome.error
    checkpoint = newest_checkpoint(stores.run_folder(tmp_path))
    assert checkpoint is not None and stores.same(stores.contents(checkpoint), at_save)
    assert checkpoint.state["results"] == {"losses": [1.0]}


def test_the_newest_and_the_best_stay_with_what_they_name(tmp_path: Path) -> None:
    lwo, store = stores.attach(), open_store(tmp_path, keep=2)
    for until in (1, 3, 5, 7, 9):
        stores.step(lwo, until - lwo.step_count)
        stores.save(store, lwo, best_step=3)
    run = stores.run_folder(tmp_path)
    assert committed_steps(run) == [3, 7, 9]
    named = set()
    for step in (3, 7, 9):
        folder = tmp_path / "r" / step_folder(step)
        named |= {
            Path(name).name
            for name in json.loads((folder / INDEX).read_text())["weight_map"].values()
        }
        read_checkpoint(run, step)
    assert set(sizes(tmp_path)) == named


def test_a_store_that_goes_on_writes_nothing_twice(tmp_path: Path) -> None:
    lwo, store = stores.attach(state="keep"), open_store(tmp_path, keep=9)
    stores.step(lwo, 5)
    stores.save(store, lwo)
    checkpoint = newest_checkpoint(stores.run_folder(tmp_path))
    assert checkpoint is not None
    again = stores.attach(state="keep")
    restore(again, checkpoint, has_weights=False)
    assert stores.same(stores.state_of(again), stores.state_of(lwo))
    store = open_store(tmp_path, keep=9)
    store.remember(checkpoint, again)
    before = sizes(tmp_path)
    stores.step(again, 1)
    stores.step(lwo, 1)
    stores.save(store, again)
    new = sizes(tmp_path).keys() - before.keys()
    # The third visit's last step: its layer, and its moments, which wait now.
    assert {name.partition(".")[0] for name in new} == {lwo.layers[2].name} and len(new) == 2
    checkpoint = newest_checkpoint(stores.run_folder(tmp_path))
    assert checkpoint is not None and stores.same(stores.contents(checkpoint), stores.state_of(lwo))


def test_what_a_killed_save_left_is_no_checkpoint_and_is_written_over(tmp_path: Path) -> None:
    lwo, store = stores.attach(), open_store(tmp_path)
    stores.step(lwo, 3)
    stores.save(store, lwo)
    stump = tmp_path / "r" / step_folder(5)
    stump.mkdir()
    (stump / INDEX).write_text("{")
    (tmp_path / "r" / "layers" / ".embed.000005.tmp").write_bytes(b"half")
    run = stores.run_folder(tmp_path)
    assert committed_steps(run) == [3]
    stores.step(lwo, 2)
    assert not stores.save(store, lwo).error
    checkpoint = newest_checkpoint(run)
    assert checkpoint is not None and stores.same(stores.contents(checkpoint), stores.state_of(lwo))
    assert not any(name.endswith(".tmp") for name in sizes(tmp_path))


# ---- a disk that fails


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_costs_one_save_and_no_data(small_disk: Path) -> None:
    lwo, store = stores.attach(), open_store(small_disk, keep=5)
    stores.step(lwo, 3)
    assert not stores.save(store, lwo).error
    first = stores.state_of(lwo)
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    for _ in range(2):
        stores.step(lwo, 2)
        assert "No space left on device" in stores.save(store, lwo).error
        # The good one is untouched, and is what a resume would take.
        checkpoint = newest_checkpoint(stores.run_folder(small_disk))
        assert checkpoint is not None and stores.same(stores.contents(checkpoint), first)
    filler.unlink()
    stores.step(lwo, 2)
    assert not stores.save(store, lwo).error
    checkpoint = newest_checkpoint(stores.run_folder(small_disk))
    assert checkpoint is not None and stores.same(stores.contents(checkpoint), stores.state_of(lwo))


def test_a_folder_that_turns_read_only_is_said_and_spares_what_is_there(small_disk: Path) -> None:
    lwo, store = stores.attach(), open_store(small_disk)
    stores.step(lwo, 3)
    stores.save(store, lwo)
    first = stores.state_of(lwo)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    stores.step(lwo, 2)
    assert "Read-only file system" in stores.save(store, lwo).error
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    checkpoint = newest_checkpoint(stores.run_folder(small_disk))
    assert checkpoint is not None and stores.same(stores.contents(checkpoint), first)


def test_config_and_tokenizer_are_written_once(tmp_path: Path) -> None:
    lwo, store = stores.attach(), open_store(tmp_path, keep=9)
    for until in (1, 3):
        stores.step(lwo, until - lwo.step_count)
        stores.save(store, lwo)
    files = [tmp_path / "r" / step_folder(step) / "tokenizer.json" for step in (1, 3)]
    assert files[0].samefile(files[1]) and files[0].read_text() == '{"model": {}}'
    assert load_file(tmp_path / "r" / step_folder(3) / "active.safetensors")
