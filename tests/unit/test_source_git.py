"""Sources in git: tracked files, clones, and what is said where git or the repository fails."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest

from lwo_dist.errors import UserError
from tests.code_samples import write_tree
from tests.unit.test_source_tree import git, names, one_line, read, repository


def test_an_index_cannot_name_files_outside_the_tree(tmp_path: Path) -> None:
    root = repository(tmp_path / "tree")
    (tmp_path / "outside.py").write_text("outside = 1\n")
    (root / "aa").mkdir()
    for name in ("aa/outside.py", "bbbbb/config"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(f"x = '{name}'\n")
    git(root, "add", ".")
    index = root / ".git" / "index"
    body = index.read_bytes()[:-20].replace(b"aa/outside.py", b"../outside.py")
    body = body.replace(b"bbbbb/config", b"/.git/config")
    index.write_bytes(body + hashlib.sha1(body).digest())
    tree = read(root, tmp_path)
    assert len(names(tree)) == 12
    assert not any("outside" in name or "config" in name for name in names(tree))


def test_git_tracked_files_only(tmp_path: Path) -> None:
    root = repository(tmp_path / "tree")
    (root / "untracked.py").write_text("x = 1\n")
    (root / "file_1.py").unlink()
    tree = read(root, tmp_path)
    assert len(names(tree)) == 11
    assert tree.skipped == {"not a regular file": 1}
    assert names(read(root / "sub", tmp_path)) == {f"file_{i}.py" for i in (0, 3, 6, 9)}
    assert "untracked.py" in names(read(root, tmp_path, use_git=False))


def test_tracked_vendored_folders_are_skipped(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "tree")
    for name in ("node_modules/a/x.py", "node_modules/b/y.py", "lib/node_modules/z.py"):
        (root / name).parent.mkdir(parents=True)
        (root / name).write_text(f"x = '{name}'\n")
    git(root, "init")
    git(root, "add", ".")
    tree = read(root, tmp_path)
    assert len(names(tree)) == 12
    assert tree.skipped == {"vendored folder": 2}


def test_folder_that_git_ignores_is_walked(tmp_path: Path) -> None:
    root = repository(tmp_path / "tree")
    inside = write_tree(root / "environment" / "package", files=5)
    (root / ".gitignore").write_text("environment/\n")
    assert len(names(read(inside, tmp_path))) == 5


def test_inside_a_git_hook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, other = repository(tmp_path / "tree"), tmp_path / "other"
    other.mkdir()
    git(other, "init")
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(other / ".git" / "index"))
    (root / "untracked.py").write_text("x = 1\n")
    assert len(names(read(root, tmp_path))) == 12


def test_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = repository(tmp_path / "tree")
    plain = write_tree(tmp_path / "plain")
    monkeypatch.setenv("PATH", str(tmp_path))
    for source in (root, root / "sub", "https://host.invalid/x.git"):
        with pytest.raises(
            UserError, match="needs git, which is not installed; install git, or"
        ) as error:
            read(source, tmp_path / "cache")
        one_line(error)
    assert len(names(read(root, tmp_path, use_git=False))) == 12
    assert len(names(read(plain, tmp_path))) == 12
    assert not list(tmp_path.glob("cache/**/.building*"))


def test_damaged_repository(tmp_path: Path) -> None:
    root = repository(tmp_path / "tree")
    (root / ".git" / "HEAD").write_text("nonsense")
    with pytest.raises(
        UserError, match="git ls-files failed: .+; fix it, or read all files"
    ) as error:
        read(root, tmp_path)
    one_line(error)


def test_clone_is_shallow_and_kept(tmp_path: Path) -> None:
    root = repository(tmp_path / "my tree")
    (root / "file_1.py").write_text("new = 1\n")
    git(root, "commit", "-am", "second")
    url = f"file://{root}"
    first = read(url, tmp_path / "cache")
    assert len(names(first)) == 12
    commits = subprocess.run(
        ["git", "rev-list", "--count", "HEAD"], cwd=first.root, capture_output=True, check=True
    )
    assert commits.stdout.strip() == b"1"
    shutil.rmtree(root)  # as without a network
    assert read(url, tmp_path / "cache").identity == first.identity


def test_bare_repository_folder(tmp_path: Path) -> None:
    git(tmp_path, "clone", "--bare", str(repository(tmp_path / "tree")), "tree.git")
    assert len(names(read(tmp_path / "tree.git", tmp_path / "cache"))) == 12


@pytest.mark.parametrize(
    "url", ["file:///nowhere/at/all.git", "https://user@localhost:1/team/code.git"]
)
def test_failed_clone_leaves_nothing(tmp_path: Path, url: str) -> None:
    with pytest.raises(
        UserError, match=r"git clone failed: .+; check the URL, the network"
    ) as error:
        read(url, tmp_path / "cache")
    one_line(error)
    assert list((tmp_path / "cache" / "sources").iterdir()) == []


def test_a_url_with_a_password_is_not_cloned(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="https://host/a.git contains a password") as error:
        read("https://user:hunter2@host/a.git", tmp_path / "cache")
    assert "hunter2" not in one_line(error)
    assert not (tmp_path / "cache").exists()


def test_passwords_are_removed_from_older_clones(tmp_path: Path) -> None:
    url = f"file://{repository(tmp_path / 'tree')}"
    root = read(url, tmp_path / "cache").root
    git(root, "remote", "set-url", "origin", "https://me:hunter2@host/a.git")
    git(root, "remote", "add", "other", "ssh://git@host/a.git")
    read(url, tmp_path / "cache")
    text = (root / ".git" / "config").read_text()
    assert "https://host/a.git" in text and "ssh://git@host/a.git" in text
    assert "hunter2" not in text
