"""Pairs from one's own code: what they hold, on which side they are, what is skipped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lwo_dist.config import DataConfig
from lwo_dist.data import source_tree
from lwo_dist.data.pairs import Pair, split_pairs
from lwo_dist.data.private import read_generation, read_summarisation
from lwo_dist.data.source_tree import read_source_tree
from lwo_dist.errors import UserError
from tests.code_samples import git


def function(number: int, name: str = "work") -> str:
    return (
        f"def {name}_{number}(value):\n"
        f'    """Do the work of number {number}. And more."""\n'
        f"    total = value + {number}\n"
        f"    return total * {number}\n"
    )


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    files = {f"file_{n}.py": f"import os\n\n\n{function(n)}" for n in range(20)}
    return write(tmp_path / "tree", files)


def config(root: Path, **settings: Any) -> DataConfig:
    return DataConfig(source=str(root), **settings)


def names(pairs: tuple[Pair, ...]) -> set[str]:
    return {pair.name for pair in pairs}


def test_generation_and_summarisation(tree: Path, tmp_path: Path) -> None:
    found = read_generation(config(tree), tmp_path)
    [pair] = [pair for pair in (*found.train, *found.held_out) if pair.name == "file_7.py"]
    assert pair == Pair(
        'def work_7(value):\n    """Do the work of number 7. And more."""',
        "    total = value + 7\n    return total * 7",
        "file_7.py",
        4,
        "python",
    )
    assert found.counts["train_pairs"] + found.counts["held_out_pairs"] == 20
    found = read_summarisation(config(tree), tmp_path)
    [pair] = [pair for pair in (*found.train, *found.held_out) if pair.name == "file_7.py"]
    assert pair == Pair(
        "def work_7(value):\n    total = value + 7\n    return total * 7",
        "Do the work of number 7.",
        "file_7.py",
        4,
        "python",
    )


@pytest.mark.parametrize("evaluate_on", ["held_out", "validation"])
def test_sides_are_those_of_completion(tree: Path, tmp_path: Path, evaluate_on: str) -> None:
    settings = config(tree, held_out_fraction=0.3, validation_fraction=0.3, evaluate_on=evaluate_on)
    files = read_source_tree(settings, tmp_path)
    for read in (read_generation, read_summarisation):
        pairs = read(settings, tmp_path)
        assert names(pairs.train) == {file.name for file in files.train}
        assert names(pairs.held_out) == {file.name for file in files.held_out}


def test_equal_functions_are_on_one_side(tree: Path, tmp_path: Path) -> None:
    """Also where the file around them is another, and the layout."""
    held_out = sorted(names(read_generation(config(tree), tmp_path).held_out))[0]
    number = int(held_out[5:-3])
    moved = function(number).replace("+", " + ").replace("    return", "\n    return")
    inside = "class A:\n" + "".join(f"    {line}\n" for line in moved.splitlines())
    for copy in range(8):
        write(tree, {f"copy_{copy}.py": f"n = {copy}\n\n{inside}\n\n{function(100 + copy)}"})
    found = read_generation(config(tree), tmp_path)
    with_it = [p for p in (*found.train, *found.held_out) if f"work_{number}(" in p.source]
    assert len(with_it) == 1 and with_it[0] in found.held_out
    assert found.skipped["duplicate function"] == 8


def test_what_is_skipped_is_counted(tree: Path, tmp_path: Path) -> None:
    write(
        tree,
        {
            "notes.md": "Not code.\n",
            "a.py": "def plain():\n    return 1\n",
            "b.py": 'def empty():\n    """Nothing to be done here."""\n    ...\n',
            "c.py": 'def f():\n    """Short."""\n    return 2\n',
            "d.py": "def f(:\n    return (3\n",
            "e.py": f"{function(1000)}\nKEY = 'ghp_{'a1' * 18}'\n",
        },
    )
    assert read_generation(config(tree), tmp_path).skipped == {
        "no grammar": 1,
        "no docstring": 1,
        "empty body": 1,
        "function with a syntax error": 1,
        "secret": 1,
    }
    found = read_summarisation(config(tree), tmp_path)
    assert found.skipped == {
        "no grammar": 1,
        "no docstring": 1,
        "docstring too short": 1,
        "function with a syntax error": 1,
        "secret": 1,
    }


def test_a_source_without_functions(tmp_path: Path) -> None:
    root = write(tmp_path / "tree", {f"{n}.txt": f"text {n}\n" for n in range(5)})
    with pytest.raises(UserError) as raised:
        read_generation(config(root), tmp_path)
    assert str(raised.value) == (
        f"data.source = {root}: no usable example to train on (skipped: 5 no grammar); give a"
        " larger source, or another data.held_out_fraction"
    )


def test_equal_pairs_of_a_data_set_are_not_on_two_sides() -> None:
    pairs = [Pair("same", "text", f"{n}.jsonl", 1) for n in range(30)]
    pairs += [Pair(f"other {n}", "text", f"{n}.jsonl", 2) for n in range(30)]
    found = split_pairs(DataConfig(held_out_fraction=0.3), "x", pairs, {"empty": 1})
    assert {p.source for p in found.held_out} & {p.source for p in found.train} == set()
    assert found.skipped["empty"] == 1
    dropped = found.skipped["also held out"]
    assert dropped == len([p for p in pairs if p.source == "same"]) - len(
        [p for p in found.held_out if p.source == "same"]
    )


def test_a_data_set_has_no_dates() -> None:
    with pytest.raises(ValueError, match=r"split: time needs a git history, but format is jsonl;"):
        DataConfig(split="time", format="jsonl")


def test_the_identity_follows_what_is_read(tree: Path, tmp_path: Path) -> None:
    def identity(**settings: Any) -> object:
        return read_generation(config(tree, **settings), tmp_path).identity

    first = identity()
    assert identity() == first
    assert identity(held_out_fraction=0.5) != first
    write(tree, {"file_3.py": function(3).replace("total *", "total +")})
    assert identity() != first


def test_the_split_by_time(tree: Path, tmp_path: Path) -> None:
    """The last changed are held out; a file that is in no commit is left out."""
    git(tree, "init", "-q", "-b", "main")
    for n in range(20):
        git(tree, "add", f"file_{n}.py")
        git(tree, "commit", "-q", "-m", f"{n}", date=n)
    write(tree, {"file_2.py": function(2222), "new.py": function(99)})
    git(tree, "commit", "-q", "-m", "change", "file_2.py", date=1000)
    git(tree, "add", "new.py")
    settings = {"split": "time", "held_out_fraction": 0.15, "validation_fraction": 0.1}
    held_out = {"file_2.py", "file_18.py", "file_19.py"}
    for read in (read_source_tree, read_generation):
        found: Any = read(config(tree, **settings), tmp_path)
        assert {item.name for item in found.held_out} == held_out
        assert found.skipped == {"in no commit": 1}
        train = {item.name for item in found.train}
        found = read(config(tree, **settings, evaluate_on="validation"), tmp_path)
        assert {item.name for item in found.held_out} == {"file_16.py", "file_17.py"}
        assert {item.name for item in found.train} == train
        assert len(train) == 15
    # The same where only a folder of the repository is read, or a clone of it.
    git(tree, "reset", "-q", "--hard")
    bare = tmp_path / "bare.git"
    git(tmp_path, "clone", "-q", "--bare", str(tree), str(bare))
    cloned = read_source_tree(DataConfig(source=str(bare), **settings), tmp_path / "cache")
    assert {file.name for file in cloned.held_out} == held_out
    (tree / "sub").mkdir()
    for n in range(20):
        git(tree, "mv", f"file_{n}.py", "sub")
        git(tree, "commit", "-q", "-m", f"move {n}", date=2000 - n)
    below = read_source_tree(config(tree / "sub", **settings), tmp_path)
    assert {file.name for file in below.held_out} == {f"file_{n}.py" for n in range(3)}


def _no_repository(root: Path) -> Path:
    return root


def _one_commit(root: Path) -> Path:
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "all")
    return root


def _no_commit(root: Path) -> Path:
    git(root, "init", "-q")
    git(root, "add", ".")
    return root


def _shallow(root: Path) -> Path:
    _one_commit(root)
    write(root, {"file_0.py": function(1234)})
    git(root, "commit", "-q", "-a", "-m", "second", date=5)
    git(root, "clone", "-q", "--depth=1", f"file://{root}", "shallow")
    return root / "shallow"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            _no_repository,
            "is not in a git repository, and data.split = time needs a git history; give a"
            " repository, or use data.split=hash",
        ),
        (_one_commit, "one commit has all there is, so data.split = time has no older"),
        (_no_commit, "does not have any commits yet"),
        (
            _shallow,
            "is a shallow clone, and data.split = time needs the whole history; run `git fetch"
            " --unshallow` there, or use data.split=hash",
        ),
    ],
)
def test_no_history_to_split_by(tree: Path, tmp_path: Path, make: Any, message: str) -> None:
    with pytest.raises(UserError) as raised:
        read_source_tree(config(make(tree), split="time"), tmp_path)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_without_git(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _one_commit(tree)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="needs git, which is not installed"):
        read_source_tree(config(tree, split="time", use_git=False), tmp_path)


def test_a_file_that_goes_meanwhile_is_said(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find_and_lose(*arguments: Any, **options: Any) -> Any:
        found = source_tree.find_files(*arguments, **options)
        for path in tree.glob("*.py"):
            path.unlink()
        return found

    monkeypatch.setattr("lwo_dist.data.private.find_files", find_and_lose)
    with pytest.raises(UserError, match="No such file or directory; let no other program change"):
        read_generation(config(tree), tmp_path)
