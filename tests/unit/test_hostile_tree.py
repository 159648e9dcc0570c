"""Source trees that somebody made up: reading and packing them leads nowhere else, runs nothing of
theirs, and ends.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import struct
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from lwo_dist.cli import main
from lwo_dist.cluster.packing import CONFIG_NAME, pack
from lwo_dist.config import DataConfig
from lwo_dist.data.source_tree import read_source_tree, read_text
from lwo_dist.errors import UserError
from tests.code_samples import code
from tests.hostile import ESCAPE, MARKER, time_limit, watch
from tests.unit.test_git import git, repository

CANARY = "canary_of_another_folder"
PROGRAM = f"#!/bin/sh\ntouch {MARKER}\n"
EXAMPLES = 120


def index_of(names: Iterable[bytes], mode: int = 0o100644) -> bytes:
    """Git's index with any names, which git itself would refuse to add."""
    entries = b""
    names = sorted(set(names))
    for name in names:
        entry = struct.pack(">10L", *(0,) * 6, mode, 0, 0, 0) + bytes(20)
        entry += struct.pack(">H", min(len(name), 0xFFF)) + name
        entries += entry + b"\0" * (8 - len(entry) % 8)
    data = b"DIRC" + struct.pack(">2L", 2, len(names)) + entries
    return data + hashlib.sha1(data).digest()


class Tree:
    """A small tree, and beside it what nobody may touch."""

    def __init__(self, folder: Path) -> None:
        self.inside = folder / "inside"
        self.root = self.inside / "tree"
        self.outside = folder / "outside"
        for number in range(4):
            self.put(f"{'sub/' * (number % 2)}file_{number}.py", code(number))
        self.put(".env", f"PASSWORD={CANARY}\n")
        self.outside.mkdir()
        (self.outside / "secret.py").write_text(f"{CANARY} = 1\n" * 9)
        (self.outside / "program").write_text(PROGRAM)
        (self.outside / "program").chmod(0o755)
        (self.outside / "pack").mkdir()
        for name in ("target", "temporary"):
            (self.inside / name).mkdir()
        config = {"data": {"source": str(self.root)}, "storage": str(self.inside / "runs")}
        self.config = self.inside / "config.yaml"
        self.config.write_text(json.dumps(config))

    def put(self, name: str, text: str | bytes) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode() if isinstance(text, str) else text)

    def add_git(self, names: Iterable[bytes] | None = None) -> None:
        """A repository whose index has all files, or `names`."""
        if names is None:
            names = [
                os.fsencode((Path(folder) / name).relative_to(self.root))
                for folder, _, files in os.walk(self.root)
                for name in files
            ]
        for name in ("objects/info", "refs/heads", "info", "hooks"):
            (self.root / ".git" / name).mkdir(parents=True, exist_ok=True)
        self.put(".git/HEAD", "ref: refs/heads/main\n")
        self.put(".git/config", "[core]\n\trepositoryformatversion = 0\n")
        self.put(".git/index", index_of(name for name in names if not name.startswith(b".git/")))

    def snapshot(self) -> dict[str, tuple[int, int]]:
        found = {}
        for top in (self.root, self.outside):
            for folder, folders, files in os.walk(top):
                for name in folders + files:
                    path = f"{folder}/{name}"
                    with suppress(OSError):  # a path too long
                        status = os.lstat(path)
                        found[path] = (status.st_mtime_ns, status.st_size)
        return found


def look(tree: Tree, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Give the tree to all that reads one; each ends well or in one line. Returns what was said."""
    code_ = main(["data", "-c", str(tree.config), "--explain"])
    out, err = capsys.readouterr()
    assert (code_, err.count("\n")) in ((0, 0), (2, 1)), err
    said = [*out.splitlines(), err.removesuffix("\n")]
    try:
        found = read_source_tree(DataConfig(source=str(tree.root)), tree.inside / "cache")
        for file in (*found.train, *found.held_out):
            text = read_text(file.path)
            assert text is not None and CANARY not in text
            file.name.encode()
    except UserError as error:
        said.append(" ".join(str(error).split()))
    try:
        said += [ascii(name) for name in pack(tree.root, "seed: 1\n", tree.inside / "target")]
    except UserError as error:
        said.append(" ".join(str(error).split()))
    else:
        assert (tree.inside / "target" / CONFIG_NAME).read_text() == "seed: 1\n"
    for path in (tree.inside / "target").rglob("*"):
        assert stat.S_ISDIR(path.lstat().st_mode) or stat.S_ISREG(path.lstat().st_mode)
        assert path.is_dir() or CANARY.encode() not in path.read_bytes()
    assert CANARY not in "".join(said)
    assert all(line.isprintable() for line in out.splitlines() + err.splitlines())
    return said


def guarded(
    tree: Tree, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """`look`, under watch."""
    before = tree.snapshot()
    with monkeypatch.context() as patch, time_limit(30):
        patch.setattr(tempfile, "tempdir", str(tree.inside / "temporary"))
        watch.seen.clear()
        watch.folder = tree.inside
        try:
            said = look(tree, capsys)
        finally:
            watch.folder = None
    started = "subprocess.Popen ('git', ['git', "
    assert [event for event in watch.seen if not event.startswith(started)] == []
    assert tree.snapshot() == before
    assert not MARKER.exists()
    assert list((tree.inside / "temporary").iterdir()) == []
    return said


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path.resolve())


# ---- one by one


def test_a_sound_tree_is_read_and_packed(
    tree: Tree, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tree.add_git()
    said = guarded(tree, capsys, monkeypatch)
    assert ".env: secret (file name)" in said and "skipped: 1 secret" in said
    packed = (path for path in (tree.inside / "target").rglob("*") if path.is_file())
    assert sorted(path.name for path in packed) == [
        *(f"file_{number}.py" for number in range(4)),
        CONFIG_NAME,
    ]


@pytest.mark.parametrize("target", [".env", ".git/config", "ignored.txt", "sub/../.env"])
def test_a_link_to_what_may_not_go_along_is_not_packed(
    tree: Tree, target: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tree.add_git()
    tree.put(".gitignore", "ignored.txt\n")
    tree.put("ignored.txt", f"{CANARY}\n")
    tree.put(".git/config", f"[remote]\n\turl = {CANARY}\n")
    (tree.root / "notes.txt").symlink_to(target)
    said = guarded(tree, capsys, monkeypatch)
    reason = "secret: file name" if ".env" in target else "external symlink"
    assert f"'notes.txt ({reason})'" in said


def test_names_too_long_for_the_system_and_a_folder_in_place_of_the_config(
    tree: Tree, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    long = [b"y" * 300, b"/".join([b"z" * 200] * 30) + b"/z.py", b"sub/" + b"y" * 300 + b"/a"]
    tree.put(f"{CONFIG_NAME}/inner.py", code(9))
    tree.add_git([b"file_0.py", b"file_2.py", f"{CONFIG_NAME}/inner.py".encode(), *long])
    said = guarded(tree, capsys, monkeypatch)
    assert "train: 2 files" in said
    shutil.rmtree(tree.root / ".git")
    put_deep(tree, lambda items: items[0])
    assert "train: 4 files" in guarded(tree, capsys, monkeypatch)


def test_git_writes_no_objects_into_a_repository(
    tree: Tree, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it does for an index that names a folder; through a link they would go elsewhere."""
    tree.add_git()
    tree.put(".git/index", index_of([b"file_0.py", b"sub"], 0o40000))
    guarded(tree, capsys, monkeypatch)
    shutil.rmtree(tree.root / ".git" / "objects")
    (tree.root / ".git" / "objects").symlink_to(tree.outside)
    assert "is a symlink" in guarded(tree, capsys, monkeypatch)[0]


@pytest.mark.parametrize("how", ["alternates", "objects", "pack"])
def test_no_repository_is_cloned_that_borrows_objects(
    tmp_path: Path, program_of_git: None, how: str
) -> None:
    """A clone would hold, and training learn, what another repository keeps to itself."""
    private = repository(tmp_path / "private")
    bare = tmp_path / "tree.git"
    git(tmp_path, "init", "-q", "--bare", "-b", "main", str(bare))
    commit = git(private, "rev-parse", "HEAD")
    (bare / "refs" / "heads" / "main").write_text(f"{commit}\n")
    objects = private / ".git" / "objects"
    if how == "alternates":
        (bare / "objects" / "info" / "alternates").write_text(f"{objects}\n")
    elif how == "objects":
        shutil.rmtree(bare / "objects")
        (bare / "objects").symlink_to(objects)
    else:
        git(private, "repack", "-q", "-a", "-d")
        shutil.rmtree(bare / "objects" / "pack")
        (bare / "objects" / "pack").symlink_to(objects / "pack")
    for source in (str(bare), f"file://{bare}"):
        with pytest.raises(
            UserError, match="git clone failed: .*objects (of another|is a symlink)"
        ):
            read_source_tree(DataConfig(source=source), tmp_path / "cache")


@pytest.fixture
def program_of_git() -> None:
    if shutil.which("git") is None:
        pytest.skip("needs git")


@pytest.mark.parametrize("name", ["HEAD", "commondir", "gitfile"])
def test_no_huge_file_of_a_repository_is_read(
    tree: Tree, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if name != "gitfile":
        tree.add_git()
    with (tree.root / ".git" / name if name != "gitfile" else tree.root / ".git").open(
        "wb"
    ) as file:
        file.truncate(2**42)  # sparse
    guarded(tree, capsys, monkeypatch)


# ---- anything

TARGETS = ["secret.py", "", "program", "nowhere"]
INNER = [".", "..", "../..", "link", "loop", "sub", "file_0.py", ".env", ".git", ".git/config"]
ABSOLUTE = ["/etc/passwd", "/etc/hostname", "/dev/zero", "/proc/self/environ", "/"]
NAMES = [
    b"\xff\xfe.py",
    b"caf\xe9/x.py",
    b"a\nb.py",
    ESCAPE.replace("/", "").encode() + b".py",
    b"-rf",
    b"--upload-pack=x",
    b" ",
    b"...",
    b"a\\b.py",
    "\u202egpj.py".encode(),
    b"x" * 252 + b".py",
    b"%s{0.__class__}.py",
    b"*.py",
    b":(top)x.py",
    CONFIG_NAME.encode() + b"/x.py",
    b".gitmodules",
    b"sub/.git",
]
INDEXED = [
    *NAMES,
    b"../../outside/secret.py",
    b"../outside/secret.py",
    b"/etc/passwd",
    b"//etc/passwd",
    b"./file_0.py",
    b"sub/../../../outside/secret.py",
    b".git/config",
    b".GIT/config",
    b"sub//file_1.py",
    b"link/secret.py",
    b"file_0.py/x",
    b"sub",
    b"",
    b"y" * 300,
    b"/".join([b"z" * 200] * 30),
    b"missing.py",
]
CONFIGS = [
    "[core]\n\tfsmonitor = {program}\n",
    "[core]\n\thooksPath = {outside}\n\tfsmonitor = true\n",
    "[include]\n\tpath = ../../../outside/secret.py\n",
    "[core]\n\tworktree = {outside}\n",
    "[core]\n\tsshCommand = {program}\n\tpager = {program}\n\teditor = {program}\n",
    '[filter "x"]\n\tclean = {program}\n\tprocess = {program}\n\trequired = true\n',
    "[core]\n\texcludesFile = {outside}/secret.py\n\tattributesFile = {outside}/secret.py\n",
    "[extensions]\n\tpartialClone = origin\n\tobjectFormat = sha256\n\tworktreeConfig = true\n",
    '[alias]\n\tls-files = "!{program}"\n[uploadpack]\n\tpackObjectsHook = {program}\n',
    "[" * 10_000,
    "[core",
    "\0",
]
Draw = Callable[..., Any]


def put_link(tree: Tree, draw: Draw) -> None:
    outside = st.sampled_from(TARGETS).map(lambda name: str(tree.outside / name))
    target = draw(outside | st.sampled_from(INNER) | st.sampled_from(ABSOLUTE))
    name = draw(st.sampled_from(["link", "loop", "sub/link.py", "notes.txt", "file_0.py", "sub"]))
    path = tree.root / name
    if name == "sub" and path.is_dir() and not path.is_symlink():
        shutil.move(path, tree.root / "moved")
    elif not path.parent.is_dir():
        return
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def put_name(tree: Tree, draw: Draw) -> None:
    random = st.binary(min_size=1, max_size=40).map(lambda name: name.translate(None, b"\0/"))
    name = draw(st.sampled_from(NAMES) | random.filter(lambda name: name not in (b"", b".", b"..")))
    path = tree.root / os.fsdecode(name)
    with suppress(OSError):
        path.parent.mkdir(exist_ok=True)
        if draw(st.booleans()):
            path.write_text(code(draw(st.integers(10, 99))))
        else:
            path.mkdir()


def put_odd(tree: Tree, draw: Draw) -> None:
    path = tree.root / draw(st.sampled_from(["odd.py", "sub/odd.py", "file_3.py", "file_2.py"]))
    if not path.parent.is_dir() or path.is_symlink():
        return
    path.unlink(missing_ok=True)
    how = draw(st.sampled_from(["pipe", "sparse", "binary", "line", "pointer", "unreadable"]))
    if how == "pipe":
        os.mkfifo(path)
    elif how == "sparse":
        with path.open("wb") as file:
            file.truncate(2**40)
    else:
        contents = {"binary": b"\0\xff", "line": b"x" * 10**5, "pointer": b"/annex/objects/x"}
        path.write_bytes(contents.get(how, b"x = 1\n"))
        path.chmod(0 if how == "unreadable" else 0o4755)


def put_deep(tree: Tree, draw: Draw) -> None:
    """Deeper than a path may be long."""
    descriptor = os.open(tree.root, os.O_RDONLY)
    for _ in range(22):
        with suppress(FileExistsError):
            os.mkdir("d" * 200, dir_fd=descriptor)
        below = os.open("d" * 200, os.O_RDONLY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = below
    os.close(descriptor)


def put_repository(tree: Tree, draw: Draw) -> None:
    """A repository, sound or not, with programs in its configuration and hooks."""
    if (tree.root / ".git").exists():
        return
    names = draw(st.none() | st.lists(st.sampled_from(INDEXED), max_size=8))
    tree.add_git(names if names is None else [b"file_0.py", b"sub/file_1.py", *names])
    if draw(st.integers(0, 3)) == 0:
        mode = draw(st.sampled_from([0o120000, 0o160000, 0o40000, 0]))
        tree.put(".git/index", index_of([b"file_0.py", b"sub"], mode))
    fill = {"program": tree.outside / "program", "outside": tree.outside}
    config = draw(st.sampled_from(CONFIGS))
    tree.put(".git/config", "".join(config.format(**fill)))
    tree.put(".gitattributes", "* filter=x\n")
    for hook in (
        "post-index-change",
        "fsmonitor-watchman",
        "post-checkout",
        "reference-transaction",
    ):
        tree.put(f".git/hooks/{hook}", PROGRAM)
        (tree.root / ".git" / "hooks" / hook).chmod(0o755)
    how = draw(st.sampled_from(["", "", "alternates", "link", "nested", "bytes", "commondir"]))
    if how == "alternates":
        tree.put(".git/objects/info/alternates", f"{tree.outside}\n../../..\n/\n")
    elif how == "link":
        name = draw(
            st.sampled_from(["HEAD", "index", "config", "refs", "objects", "info", "hooks"])
        )
        path = tree.root / ".git" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        path.symlink_to(draw(st.sampled_from([tree.outside, tree.outside / "secret.py", path])))
    elif how == "nested":
        (tree.root / "inner").mkdir(exist_ok=True)
        shutil.copytree(tree.root / ".git", tree.root / "inner" / ".git")
    elif how == "bytes":
        name = draw(st.sampled_from(["HEAD", "index", "config", "packed-refs", "sharedindex.0"]))
        tree.put(f".git/{name}", draw(st.binary(max_size=60)))
    elif how == "commondir":
        tree.put(".git/commondir", str(draw(st.sampled_from([tree.outside, "..", ".", "x\0y"]))))


def put_pointer(tree: Tree, draw: Draw) -> None:
    """A `.git` that is a file, a link or a pipe."""
    if (tree.root / ".git").exists():
        return
    how = draw(
        st.sampled_from(["gitdir: {}", "gitdir: ../../outside", "gitdir: .git", "link", "pipe"])
    )
    path = tree.root / ".git"
    if how == "link":
        path.unlink(missing_ok=True)
        path.symlink_to(tree.outside)
    elif how == "pipe":
        os.mkfifo(path)
    else:
        path.write_text(how.format(draw(st.text(max_size=20))), errors="surrogatepass")


KINDS = [put_link, put_link, put_name, put_name, put_odd, put_deep, put_repository, put_pointer]


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(st.data())
def test_random_hostile_trees_stay_in_their_place(
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    data: st.DataObject,
) -> None:
    folder = tmp_path_factory.mktemp("tree").resolve()
    tree = Tree(folder)
    try:
        for make in data.draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=5)):
            make(tree, data.draw)
        guarded(tree, capsys, monkeypatch)
    finally:
        MARKER.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
