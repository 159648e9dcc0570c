"""Git runs no program that a repository names, never blocks forever, and recognises URLs."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from lwo_dist import git as git_module
from lwo_dist.cluster.packing import pack
from lwo_dist.config import DataConfig
from lwo_dist.data.source_tree import read_source_tree
from lwo_dist.errors import UserError
from lwo_dist.git import GitError, Repository, clone, is_repository_url
from lwo_dist.run_info import git_commit
from tests.code_samples import write_tree


def git(folder: Path, *arguments: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    command = ["git", *who, *arguments]
    done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def repository(root: Path) -> Path:
    write_tree(root)
    git(root, "init", "-q", "-b", "main")
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "first")
    return root


@pytest.fixture
def program(tmp_path: Path) -> tuple[Path, Path]:
    """A program, and the file that it creates when it runs."""
    ran = tmp_path / "ran"
    script = tmp_path / "program"
    script.write_text(f"#!/bin/sh\ntouch {ran}\n")
    script.chmod(0o755)
    return script, ran


def _monitor(root: Path, script: Path) -> None:
    git(root, "config", "core.fsmonitor", str(script))


def _included(root: Path, script: Path) -> None:
    (root / "innocent.cfg").write_text(f"[core]\n\tfsmonitor = {script}\n")
    git(root, "config", "include.path", "../innocent.cfg")


def _filter(root: Path, script: Path) -> None:
    git(root, "config", "filter.x.clean", str(script))
    git(root, "config", "filter.x.required", "true")
    (root / ".gitattributes").write_text("* filter=x\n")
    for file in root.glob("*.py"):  # so that git has to compare the contents
        os.utime(file, (1, 1))


def _hooks(root: Path, script: Path) -> None:
    for name in ("post-index-change", "fsmonitor-watchman", "reference-transaction"):
        (root / ".git" / "hooks" / name).write_bytes(script.read_bytes())
        (root / ".git" / "hooks" / name).chmod(0o755)
    git(root, "config", "core.fsmonitor", ".git/hooks/fsmonitor-watchman")


def _lazy_fetch(root: Path, script: Path) -> None:
    git(root, "sparse-checkout", "set", "--cone", "--sparse-index", "nothing")
    git(root, "config", "extensions.partialClone", "origin")
    git(root, "config", "remote.origin.url", str(root))
    git(root, "config", "remote.origin.promisor", "true")
    git(root, "config", "remote.origin.uploadpack", str(script))
    tree = git(root, "rev-parse", "HEAD:sub")
    (root / ".git" / "objects" / tree[:2] / tree[2:]).unlink()


def _submodule(root: Path, script: Path) -> None:
    inner = repository(root / "inner")
    git(root, "add", "inner")
    git(root, "commit", "-q", "-m", "second")
    _monitor(inner, script)
    _filter(inner, script)


def _differ(root: Path, script: Path) -> None:
    git(root, "config", "diff.external", str(script))
    git(root, "config", "diff.x.textconv", str(script))
    git(root, "config", "log.showSignature", "true")
    git(root, "config", "gpg.program", str(script))
    (root / ".gitattributes").write_text("* diff=x\n")


HOSTILE = [_monitor, _included, _filter, _hooks, _lazy_fetch, _submodule, _differ]


def _read_history(root: Path) -> None:
    found = Repository.around(root)
    assert found is not None
    assert len(found.last_changes(root)) >= 12
    [*_, first] = found.commits(root, 10)
    assert first.subject == "first"
    blob = git(root, "rev-parse", "HEAD:file_1.py")
    assert found.contents([blob, "0" * 40], 10**6) == {blob: (root / "file_1.py").read_bytes()}
    assert found.contents([blob], 10) == {}


@pytest.mark.parametrize("spoil", HOSTILE)
def test_no_program_named_by_a_repository_runs(
    tmp_path: Path, program: tuple[Path, Path], spoil: Callable[[Path, Path], None]
) -> None:
    script, ran = program
    root = repository(tmp_path / "tree")
    spoil(root, script)
    ran.unlink(missing_ok=True)
    (tmp_path / "target").mkdir()
    try:
        tree = read_source_tree(DataConfig(source=str(root)), tmp_path / "cache")
        assert len(tree.train) + len(tree.held_out) >= 8
        pack(root, "", tmp_path / "target")
    except UserError:  # where a tree of the repository is missing
        assert spoil is _lazy_fetch
    git_commit(root)
    with suppress(GitError):  # a tree is missing
        _read_history(root)
    assert not ran.exists()
    # Plain git does run it.
    diff = ["log", "-p", "--ext-diff"]
    for command in (["status"], ["describe", "--always", "--dirty"], ["ls-files"], diff):
        subprocess.run(["git", *command], cwd=root, capture_output=True, timeout=60)
    assert ran.exists()


@pytest.mark.parametrize("bare", [True, False])
def test_no_program_runs_when_a_local_repository_is_cloned(
    tmp_path: Path, program: tuple[Path, Path], bare: bool
) -> None:
    script, ran = program
    root = repository(tmp_path / "tree")
    if bare:
        git(tmp_path, "clone", "-q", "--bare", str(root), "bare.git")
        root = tmp_path / "bare.git"
    for key in ("core.fsmonitor", "uploadpack.packObjectsHook", "core.sshCommand"):
        git(root, "config", key, str(script))
    source = str(root) if bare else f"file://{root}"
    tree = read_source_tree(DataConfig(source=source), tmp_path / "cache")
    assert len(tree.train) + len(tree.held_out) == 12
    assert not ran.exists()


@pytest.mark.parametrize("url", ["ext::sh -c 'touch ran'", "ext://sh", "fd::17", "-upload-pack=x"])
def test_no_transport_helper_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "config"))
    (tmp_path / "config").write_text("[protocol]\n\tallow = always\n")
    with pytest.raises((GitError, UserError)):
        clone(url, tmp_path / "folder")
    assert not (tmp_path / "ran").exists()


def test_names_and_commit_of_a_work_tree(tmp_path: Path) -> None:
    root = repository(tmp_path / "tree")
    (root / ".gitignore").write_text("*.log\n")
    (root / "new.py").write_text("")
    (root / "new.log").write_text("")
    (root / ".git" / "info" / "exclude").write_text("new.txt\n")
    (root / "new.txt").write_text("")
    found = Repository.around(root / "sub")
    assert found is not None and found.top == root
    assert len(found.names(root)) == 12
    assert set(found.names(root, untracked=True)) - set(found.names(root)) == {
        ".gitignore",
        "new.py",
    }
    assert found.names(root / "sub") == ["file_0.py", "file_3.py", "file_6.py", "file_9.py"]
    assert Repository.around(tmp_path) is None


def test_when_files_were_last_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A merge counts where it changed a file itself; odd names are names."""
    root = repository(tmp_path / "tree")

    def commit(date: int, *arguments: str) -> None:
        monkeypatch.setenv("GIT_COMMITTER_DATE", f"{2_000_000_000 + date} +0000")
        git(root, *arguments)

    git(root, "switch", "-q", "-c", "side")
    odd = os.fsdecode(b"odd\n :\xff.py")
    (root / odd).write_text("x = 1\n")
    git(root, "add", ".")
    commit(1, "commit", "-q", "-m", "odd")
    git(root, "switch", "-q", "main")
    (root / "file_1.py").write_text("x = 1\n")
    commit(2, "commit", "-q", "-a", "-m", "two")
    git(root, "merge", "-q", "--no-ff", "--no-commit", "side")
    (root / "file_2.py").write_text("x = 2\n")
    git(root, "add", ".")
    commit(3, "commit", "-q", "-m", "merge")
    found = Repository.at(root).last_changes(root)
    late = {name: when - 2_000_000_000 for name, when in found.items() if when >= 2_000_000_000}
    assert late == {odd: 1, "file_1.py": 2, "file_2.py": 3}
    assert len(found) == 13


@pytest.mark.parametrize("how", ["worktree", "sha256", "split index", "packed", "submodule"])
def test_every_repository_layout_is_supported(tmp_path: Path, how: str) -> None:
    root = tmp_path / "tree"
    if how == "sha256":
        write_tree(root)
        git(root, "init", "-q", "--object-format=sha256")
        git(root, "add", ".")
        git(root, "commit", "-q", "-m", "first")
    else:
        repository(root)
    if how == "worktree":
        git(root, "worktree", "add", "-q", str(tmp_path / "other"))
        root = tmp_path / "other"
    elif how == "split index":
        git(root, "update-index", "--split-index")
    elif how == "packed":
        git(root, "gc", "-q")
    elif how == "submodule":
        command = ("-c", "protocol.file.allow=always", "submodule", "-q", "add", str(root), "inner")
        git(repository(tmp_path / "outer"), *command)
        root = tmp_path / "outer" / "inner"
    found = Repository.around(root)
    assert found is not None
    assert len(found.names(root)) == 12
    assert found.commit() == git(root, "rev-parse", "HEAD")
    (root / "file_1.py").write_text("changed = 1\n")
    assert found.commit() == git(root, "rev-parse", "HEAD") + "-dirty"


def test_nothing_is_written_into_the_repository(tmp_path: Path) -> None:
    root = repository(tmp_path / "tree")
    for file in root.glob("*.py"):
        os.utime(file, (1, 1))
    before = {path: path.stat().st_mtime_ns for path in (root / ".git").rglob("*")}
    found = Repository.around(root)
    assert found is not None
    found.names(root, untracked=True)
    found.commit()
    assert {path: path.stat().st_mtime_ns for path in (root / ".git").rglob("*")} == before


@pytest.mark.parametrize("pointer", ["", "gitdir: ", "gitdir: ../nowhere", "nonsense\n"])
def test_a_dangling_git_file_is_refused(tmp_path: Path, pointer: str) -> None:
    (tmp_path / ".git").write_text(pointer)
    with pytest.raises(GitError, match="git repository"):
        Repository.around(tmp_path)
    with pytest.raises(UserError, match="fix it, or read all files with data.use_git=false"):
        read_source_tree(DataConfig(source=str(tmp_path)), tmp_path)


@pytest.fixture
def silent_server() -> Iterator[int]:
    """Accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize("scheme", ["git", "http", "ssh"])
def test_a_silent_server_times_out(
    tmp_path: Path, silent_server: int, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    monkeypatch.setattr(git_module, "_SILENT_SECONDS", 1)
    monkeypatch.setenv("GIT_SSH_COMMAND", "sleep 1000; :")
    url = f"{scheme}://127.0.0.1:{silent_server}/code.git"
    with pytest.raises(UserError, match=r"git clone failed: no progress for 1 s; check the URL"):
        read_source_tree(DataConfig(source=url), tmp_path / "cache")
    assert list((tmp_path / "cache" / "sources").iterdir()) == []


def test_ssh_ends_with_a_clone_that_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(git_module, "_SILENT_SECONDS", 1)
    monkeypatch.setenv("GIT_SSH_COMMAND", f"echo $$ >{tmp_path}/pid; exec sleep 1000; :")
    with pytest.raises(GitError, match="no progress for 1 s"):
        clone("ssh://host/code.git", tmp_path / "code")
    with suppress(psutil.NoSuchProcess):
        psutil.Process(int((tmp_path / "pid").read_text())).wait(30)


def test_a_slow_server_hits_the_total_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(git_module, "_CLONE_SECONDS", 1)
    monkeypatch.setenv("GIT_SSH_COMMAND", "while echo still there >&2; do sleep 0.1; done; :")
    with pytest.raises(GitError, match="not finished after 1 s"):
        clone("ssh://host/code.git", tmp_path / "code")


def test_a_fifo_does_not_block_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(git_module, "_LOCAL_SECONDS", 1)
    root = repository(tmp_path / "tree")
    (root / ".git" / "index").unlink()
    os.mkfifo(root / ".git" / "index")
    with pytest.raises(UserError, match="git ls-files failed: no progress for 1 s"):
        read_source_tree(DataConfig(source=str(root)), tmp_path)
    (root / ".git" / "HEAD").unlink()
    os.mkfifo(root / ".git" / "HEAD")
    with pytest.raises(UserError, match="is not a git repository"):
        read_source_tree(DataConfig(source=str(root)), tmp_path)


def test_background_processes_of_ssh_are_not_awaited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_SSH_COMMAND", "sleep 100 </dev/null >/dev/null & exit 1; :")
    with pytest.raises(GitError, match="Could not read from remote"):
        clone("ssh://host/code.git", tmp_path / "code")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("https://host/a.git", True),
        ("ssh://git@host:22/a", True),
        ("git@host:a/b.git", True),
        ("first.last@host.example:a", True),
        ("me+x@host:a", True),
        ("DOMAIN\\me@host:a", True),
        ("me@[::1]:a", True),
        ("/shared/code", False),
        ("code", False),
        ("./me@host:a", False),
        ("a/me@host:b", False),
        ("me@host", False),
        ("C:\\code", False),
        ("-oProxyCommand=x@host:a", False),
    ],
)
def test_which_sources_are_urls(source: str, expected: bool) -> None:
    assert is_repository_url(source) is expected
