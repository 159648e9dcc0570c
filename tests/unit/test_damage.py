"""A damaged checkpoint is never loaded silently: each of 200 random damages is found, or did no
harm.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lwo_dist.checkpoint.format import newest_checkpoint, step_folder
from lwo_dist.checkpoint.schema import STATE
from lwo_dist.checkpoint.store import LayerStore
from lwo_dist.errors import UserError
from tests import stores


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, stores.State]]:
    """A run with checkpoints at the steps 3, 5 and 7, moments of waiting layers among them."""
    folder = tmp_path_factory.mktemp("good")
    lwo = stores.attach(state="keep")
    store = LayerStore(stores.run_folder(folder), stores.model_files, keep=3)
    states = {}
    for until in (3, 5, 7):
        stores.step(lwo, until - lwo.step_count)
        assert not stores.save(store, lwo).error
        states[until] = stores.state_of(lwo)
    return folder, states


def cut(path: Path, draw: Callable) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: draw(st.integers(0, max(0, len(data) - 1)))])


def flip(path: Path, draw: Callable) -> None:
    data = bytearray(path.read_bytes())
    data[draw(st.integers(0, len(data) - 1))] ^= 1 << draw(st.integers(0, 7))
    path.write_bytes(data)


def blank(path: Path, draw: Callable) -> None:
    data = bytearray(path.read_bytes())
    start = draw(st.integers(0, len(data) - 1))
    stop = draw(st.integers(start + 1, len(data)))
    data[start:stop] = bytes(stop - start)
    path.write_bytes(data)


def grow(path: Path, draw: Callable) -> None:
    path.write_bytes(path.read_bytes() + draw(st.binary(min_size=1, max_size=20)))


def remove(path: Path, draw: Callable) -> None:
    path.unlink()


def swap(path: Path, draw: Callable) -> None:
    other = draw(st.sampled_from(sorted(p for p in path.parents[2].rglob("*") if p.is_file())))
    theirs = other.read_bytes()
    other.write_bytes(path.read_bytes())
    path.write_bytes(theirs)


def rename(path: Path, draw: Callable) -> None:
    """A checkpoint's folder under another step's name."""
    checkpoints = (
        path.parents[1] / "checkpoints" if path.parent.name == "layers" else path.parents[1]
    )
    folder = draw(st.sampled_from(sorted(checkpoints.iterdir())))
    free = [step for step in range(1, 12) if not (checkpoints / f"step_{step:06d}").exists()]
    folder.rename(checkpoints / f"step_{draw(st.sampled_from(free)):06d}")


DAMAGES = (cut, flip, blank, grow, remove, swap, rename)


@settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(st.data())
def test_200_random_damages_never_give_a_silently_wrong_load(
    good: tuple[Path, dict[int, stores.State]],
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
) -> None:
    folder, states = good
    copy = tmp_path_factory.mktemp("damaged")
    shutil.copytree(folder / "r", copy / "r")  # without the links: a damage hits one file
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(
            st.sampled_from(
                sorted(p for p in (copy / "r").rglob("*") if p.is_file() and p.stat().st_size)
            )
        )
        data.draw(st.sampled_from(DAMAGES))(path, data.draw)
    try:
        checkpoint = newest_checkpoint(stores.run_folder(copy))
    except UserError as error:
        assert "is whole (" in str(error)
    else:
        if checkpoint is None:  # only where no checkpoint's state.json is left
            assert not list((copy / "r" / "checkpoints").glob(f"*/{STATE}"))
        else:
            assert stores.same(stores.contents(checkpoint), states[checkpoint.step])
    finally:
        shutil.rmtree(copy)


def break_file(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "break_it", "message"),
    [
        (
            "active.safetensors",
            break_file,
            "active.safetensors does not have the sha256 of state.json",
        ),
        (
            "active.safetensors",
            lambda path: path.write_bytes(b""),
            "active.safetensors does not have the sha256",
        ),
        ("model.safetensors.index.json", Path.unlink, "model.safetensors.index.json is missing"),
        (STATE, break_file, "state.json (does not have its own digest|is malformed)"),
        (STATE, lambda path: path.write_text("{"), "state.json is malformed"),
    ],
)
def test_each_damage_is_named_and_the_checkpoint_before_is_used(
    good: tuple[Path, dict[int, stores.State]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    break_it: Callable[[Path], object],
    message: str,
) -> None:
    folder, states = good
    shutil.copytree(folder / "r", tmp_path / "r")
    break_it(tmp_path / "r" / step_folder(7) / name)
    checkpoint = newest_checkpoint(stores.run_folder(tmp_path))
    assert checkpoint is not None and stores.same(stores.contents(checkpoint), states[5])
    said = capsys.readouterr().out
    assert re.search(
        rf"checkpoint \S+step_000007 is damaged \(.*{message}.*\); using the one before", said
    )


def test_a_cut_layer_file_spares_the_checkpoints_that_do_not_name_it(
    good: tuple[Path, dict[int, stores.State]], tmp_path: Path
) -> None:
    folder, states = good
    shutil.copytree(folder / "r", tmp_path / "r")
    # The layer trained between the steps 5 and 7 has a file for each of the two.
    [newest] = (tmp_path / "r" / "layers").glob("*.000007.*.safetensors")
    newest.write_bytes(newest.read_bytes()[:-10])
    checkpoint = newest_checkpoint(stores.run_folder(tmp_path))
    assert checkpoint is not None and stores.same(stores.contents(checkpoint), states[5])
    for path in (tmp_path / "r" / "layers").iterdir():
        break_file(path)
    with pytest.raises(
        UserError, match="no checkpoint in .* is whole .*remove the folder to start anew"
    ):
        newest_checkpoint(stores.run_folder(tmp_path))


def test_a_checkpoint_of_a_newer_format_is_refused(
    good: tuple[Path, dict[int, stores.State]], tmp_path: Path
) -> None:
    shutil.copytree(good[0] / "r", tmp_path / "r")
    path = tmp_path / "r" / step_folder(7) / STATE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(
        UserError, match="format 99; this lwo_dist reads up to 1: install a newer one"
    ):
        newest_checkpoint(stores.run_folder(tmp_path))
