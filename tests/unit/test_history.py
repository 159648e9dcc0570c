"""Pairs from the fixes in a git history: which there are, and on which side."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from lwo_dist import distributed
from lwo_dist.config import DataConfig
from lwo_dist.data.history import MOST_FILES, is_fix, read_fixes
from lwo_dist.data.pairs import Pair
from lwo_dist.data.private import read_defect, read_repair
from lwo_dist.data.source_tree import read_source_tree
from lwo_dist.driver import prepare
from lwo_dist.errors import UserError
from lwo_dist.git import Repository
from lwo_dist.registry import TASKS
from lwo_dist.run import run
from tests.code_samples import git, make_config
from tests.models import save_tiny_model
from tests.ranks import run_ranks


def function(name: str, value: int) -> str:
    return f'def {name}(x):\n    """Do the work of it."""\n    y = x + {value}\n    return y\n'


class History:
    """A repository that grows by commits, one second after another."""

    def __init__(self, root: Path):
        self.root = root
        self._date = 0
        if not root.exists():
            root.mkdir()
            git(root, "init", "-q", "-b", "main")

    def commit(self, message: str, **files: str) -> None:
        for name, text in files.items():
            path = self.root / (name.replace("__", "/") + (".py" if "." not in name else ""))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        git(self.root, "add", ".")
        self._date += 1
        git(self.root, "commit", "-q", "-m", message, date=self._date)


@pytest.fixture
def history(tmp_path: Path, forty_fixes: Path) -> History:
    """Forty files with one fix each."""
    shutil.copytree(forty_fixes, tmp_path / "tree")
    return History(tmp_path / "tree")


@pytest.fixture(scope="module")
def forty_fixes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = History(tmp_path_factory.mktemp("forty") / "tree")
    made.commit("first", **{f"f{n}": function(f"work_{n}", n) for n in range(40)})
    for n in range(40):
        made.commit(f"Fix {n}", **{f"f{n}": function(f"work_{n}", 1000 + n)})
    return made.root


def config(history: History, **settings: Any) -> DataConfig:
    return DataConfig(source=str(history.root), **settings)


def fixes(history: History, **settings: Any) -> tuple[list[tuple[str, str]], dict[str, int]]:
    """Of each fix the function and the line that it wrote, and what is skipped."""
    found, skipped = read_fixes(config(history, **settings), history.root, "repair")
    return [(fix.before.name, fix.after.code.split("\n")[-2].strip()) for fix in found], skipped


@pytest.mark.parametrize(
    ("subject", "expected"),
    [
        ("Fix a crash", True),
        ("fixes #12", True),
        ("fix: a bug", True),
        ("Bugfix for the parser", True),
        ("hotfix", True),
        ("Handle errors of the store", True),
        ("Correct an incorrect sum", True),
        ("This defect is gone", True),
        ("Add a prefix", False),
        ("Use the default", False),
        ("Add fixtures", False),
        ("Debug output", False),
        ("Reissue tokens", False),
    ],
)
def test_what_is_a_fix(subject: str, expected: bool) -> None:
    assert is_fix(subject) is expected


def test_repair_pairs(history: History, tmp_path: Path) -> None:
    found = read_repair(config(history), tmp_path)
    [pair] = [pair for pair in (*found.train, *found.held_out) if pair.name == "f7.py"]
    assert pair == Pair(
        "def work_7(x):\n    y = x + 7\n    return y",
        "def work_7(x):\n    y = x + 1007\n    return y",
        "f7.py",
        1,
        "python",
    )
    assert len(found.train) + len(found.held_out) == 40
    assert found.skipped == {"not a fix": 1}


def test_defect_pairs_are_balanced(history: History, tmp_path: Path) -> None:
    history.commit("Fix again", f7=function("work_7", 77))
    found = read_defect(config(history), tmp_path)
    for pairs in (found.train, found.held_out):
        assert (
            len({Counter(pair.target for pair in pairs)[answer] for answer in ("yes", "no")}) == 1
        )
    sevens = {
        pair.source.split("\n")[1].strip(): pair.target
        for pair in (*found.train, *found.held_out)
        if pair.name == "f7.py"
    }
    # What the first fix wrote and the second changed is neither.
    assert sevens == {"y = x + 7": "yes", "y = x + 77": "no"}
    assert found.skipped["function both before and after a fix"] == 2


def test_sides_are_those_of_the_files(history: History, tmp_path: Path) -> None:
    for evaluate_on in ("held_out", "validation"):
        settings = config(
            history, held_out_fraction=0.3, validation_fraction=0.2, evaluate_on=evaluate_on
        )
        files = read_source_tree(settings, tmp_path)
        for read in (read_repair, read_defect):
            found = read(settings, tmp_path)
            assert {pair.name for pair in found.train} == {file.name for file in files.train}
            assert {pair.name for pair in found.held_out} == {file.name for file in files.held_out}


def test_the_newest_fixes_are_held_out_by_time(history: History, tmp_path: Path) -> None:
    settings = {"split": "time", "held_out_fraction": 0.1, "validation_fraction": 0.1}
    final = read_repair(config(history, **settings), tmp_path)
    assert {pair.name for pair in final.held_out} == {f"f{n}.py" for n in range(36, 40)}
    chosen = read_repair(config(history, **settings, evaluate_on="validation"), tmp_path)
    assert {pair.name for pair in chosen.held_out} == {f"f{n}.py" for n in range(32, 36)}
    assert chosen.train == final.train
    assert {pair.name for pair in final.train} == {f"f{n}.py" for n in range(32)}
    assert read_repair(config(history), tmp_path).identity != final.identity


def test_what_changed_is_found_by_name_and_signature(tmp_path: Path) -> None:
    made = History(tmp_path / "tree")
    made.commit(
        "first",
        **{
            "a.java": "class A {\n int f(int x) { return 1; }\n int f(long x) { return 2; }\n"
            " int g() { return 3; }\n int h() { return 4; }\n}\n"
        },
    )
    made.commit(
        "fix",
        **{
            "a.java": "class A {\n int h()  {\n return 4; /* four */ }\n int g() { return 33; }\n"
            " int f(long x) { return 22; }\n int f(int x) { return 1; }\n}\n"
        },
    )
    found, _ = read_fixes(config(made), made.root, "repair")
    assert sorted((fix.before.code, fix.after.code) for fix in found) == [
        ("int f(long x) { return 2; }", "int f(long x) { return 22; }"),
        ("int g() { return 3; }", "int g() { return 33; }"),
    ]
    assert {(fix.before.name, fix.after.line) for fix in found} == {("A.f", 5), ("A.g", 4)}


def test_skipped_and_counted(tmp_path: Path) -> None:
    made = History(tmp_path / "tree")
    key = f"KEY = 'ghp_{'a1' * 18}'\n"
    files = {f"f{n}": function("f", n) for n in range(MOST_FILES + 1)}
    made.commit(
        "first",
        **files,
        good=function("good", 0),
        leaks=function("leaks", 0) + key,
        leaked=function("leaked", 0),
        vendor__a=function("a", 0),
        big=function("big", 0) + "x = 1\n" * 400,
        **{"notes.txt": "one\n", "lib.js": "function js() { return 1; }\n"},
    )
    made.commit("Fix all", **{name: text.replace("+", "-") for name, text in files.items()})
    made.commit("Add more", good=function("good", 1))
    made.commit("Fix a leak", leaks=function("leaks", 1))
    made.commit("Fix it with a key", leaked=function("leaked", 1) + key)
    made.commit("Fix others' code", vendor__a=function("a", 1))
    made.commit("Fix the text", **{"notes.txt": "two\n"})
    made.commit("Fix js", **{"lib.js": "function js() { return 2; }\n"})
    made.commit("Fix it well", good=function("good", 2))
    made.commit("Fix a large one", big=function("big", 1) + "x = 1\n" * 400)
    made.commit("Fix by a new file", new=function("new", 0))
    (made.root / "good.py").unlink()
    made.commit("Fix by removing it")
    found, skipped = fixes(made, extensions=[".py", ".txt"], max_file_bytes=2000)
    assert found == [("good", "y = x + 2")]
    assert skipped == {
        "not a fix": 2,
        "extension": 1,
        "huge or missing": 1,
        "large commit": 1,
        "no grammar": 1,
        "secret": 2,
        "vendored folder": 1,
    }


def test_merges_and_links_are_left_out(tmp_path: Path) -> None:
    made = History(tmp_path / "tree")
    made.commit("first", a=function("a", 0), b=function("b", 0))
    git(made.root, "switch", "-q", "-c", "side")
    made.commit("Fix a", a=function("a", 1))
    git(made.root, "switch", "-q", "main")
    made.commit("Fix b", b=function("b", 1))
    git(made.root, "merge", "-q", "--no-ff", "-m", "Merge side", "side", date=50)
    (made.root / "a.py").unlink()
    (made.root / "a.py").symlink_to("def a(x):\n    y = 2\n    return y\n")  # a link's content
    made.commit("Fix by a link")
    found, skipped = fixes(made)
    assert sorted(found) == [("a", "y = x + 1"), ("b", "y = x + 1")]
    assert skipped == {"not a fix": 1}


def test_only_the_newest_commits_and_the_folder_are_read(tmp_path: Path) -> None:
    made = History(tmp_path / "tree")
    made.commit("first", a=function("a", 0), sub__b=function("b", 0))
    for n in range(1, 4):
        made.commit("Fix a", a=function("a", n))
        made.commit("Fix b", sub__b=function("b", n))
    assert fixes(made, max_commits=3)[0] == [
        ("b", "y = x + 3"),
        ("a", "y = x + 3"),
        ("b", "y = x + 2"),
    ]
    found, _ = read_fixes(config(made), made.root / "sub", "repair")
    assert [(fix.after.file, fix.after.name) for fix in found] == [("b.py", "b")] * 3


def test_a_url_is_cloned_with_its_history(history: History, tmp_path: Path) -> None:
    bare = tmp_path / "bare.git"
    git(tmp_path, "clone", "-q", "--bare", str(history.root), str(bare))
    cache = tmp_path / "cache"
    for source in (str(bare), f"file://{history.root}"):
        settings = DataConfig(source=source)
        read_source_tree(settings, cache)  # which needs no history
        found = read_repair(settings, cache)
        assert len(found.train) + len(found.held_out) == 40
    clones = sorted(cache.glob("sources/*"))
    assert [path.name.endswith("-history") for path in clones].count(True) == 2
    assert len(clones) == 4
    for path in clones:
        repository = Repository.at(path)
        assert repository.is_shallow is not path.name.endswith("-history")


def _plain_folder(history: History) -> Path:
    plain = history.root.parent / "plain"
    plain.mkdir()
    for n in range(5):
        (plain / f"{n}.py").write_text(function("f", n))
    return plain


def _one_commit(history: History) -> Path:
    made = History(history.root.parent / "one")
    made.commit("Fix all", a=function("a", 1), b=function("b", 1))
    return made.root


def _shallow(history: History) -> Path:
    git(history.root.parent, "clone", "-q", "--depth=2", f"file://{history.root}", "shallow")
    return history.root.parent / "shallow"


def _without_fixes(history: History) -> Path:
    made = History(history.root.parent / "proud")
    made.commit("Start", a=function("a", 1), b=function("b", 1))
    made.commit("Go on", a=function("a", 2))
    return made.root


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            _plain_folder,
            " is not in a git repository, and task = repair needs a git history; give a repository,"
            " or use another task or data.format",
        ),
        (
            _one_commit,
            " has 1 commit with source files, and task = repair needs a git history of fixes; give"
            " a repository with its history",
        ),
        (
            _shallow,
            " is a shallow clone, and task = repair needs the whole history; run `git fetch"
            " --unshallow` there, or use another task or data.format",
        ),
        (
            _without_fixes,
            ": no function was changed by a fix among the newest 10000 commits (skipped: 2 not a"
            " fix); give a repository with fixes, or raise data.max_commits",
        ),
    ],
)
def test_no_history(history: History, tmp_path: Path, make: Any, message: str) -> None:
    root = make(history)
    with pytest.raises(UserError) as raised:
        read_repair(DataConfig(source=str(root)), tmp_path)
    assert str(raised.value) == f"data.source = {root}{message}"


def test_without_git(history: History, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError) as raised:
        read_repair(config(history, use_git=False), tmp_path)
    assert str(raised.value) == (
        f"data.source = {history.root} needs git, which is not installed; install git, or use"
        " another task or data.format"
    )


def test_lost_objects_are_said(history: History, tmp_path: Path) -> None:
    """As in a partial clone: missing file contents are counted, missing folders refused."""
    blob = git(history.root, "rev-parse", "HEAD~3:f39.py")
    (history.root / ".git" / "objects" / blob[:2] / blob[2:]).unlink()
    found, skipped = fixes(history)
    assert len(found) == 39 and skipped["huge or missing"] == 1
    tree = git(history.root, "rev-parse", "HEAD~3^{tree}")
    (history.root / ".git" / "objects" / tree[:2] / tree[2:]).unlink()
    with pytest.raises(UserError, match="git log failed: unable to read tree"):
        fixes(history)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "model"
    save_tiny_model(folder, [function(f"work_{n}", n) for n in range(40)])
    return folder


@pytest.mark.parametrize("task", ["generation", "summarisation", "repair", "defect"])
def test_every_task_trains_on_private_code(
    task: str, history: History, model_folder: Path, tmp_path: Path
) -> None:
    settings = make_config(
        history.root,
        tmp_path / "runs",
        f"task={task}",
        f"model.name={model_folder}",
        "strategy=replicate",
        "train.steps=4",
        "train.global_batch_size=4",
        "train.sequence_length=120",
        "eval.max_new_tokens=40",
        "lwo.steps_per_layer=2",
        "lwo.lr=1e-2",
        "tracking.enabled=false",
        "cluster.num_workers=1",
    )
    (summary,) = run_ranks(_whole_run, 1, settings)
    before, after = summary["eval"]["before"], summary["eval"]["after"]
    many = TASKS.get(task).example[1]
    files = read_source_tree(settings.data, tmp_path)
    each = 2 if task == "defect" else 1
    assert before[f"eval/{many}"] == each * len(files.held_out) >= 2
    assert after["eval/loss"] < before["eval/loss"]


def _whole_run(config: Any) -> dict[str, Any] | None:
    return run(distributed.on_rank_0(prepare, config))
