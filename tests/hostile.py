"""A run with hostile contents: a folder or a bucket that no command trusts.

Whatever it contains, a command succeeds or fails in one line, reads and writes nothing outside
the run's folder, and runs no code that comes with it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pyarrow.fs import FileType
from safetensors.torch import save_file

from lwo_dist import storage
from lwo_dist.checkpoint.format import seal
from lwo_dist.checkpoint.resume import find_checkpoint
from lwo_dist.checkpoint.schema import STATE, check_record
from lwo_dist.cli import main
from lwo_dist.config import Config
from lwo_dist.errors import UserError
from lwo_dist.models import hub
from lwo_dist.storage import RunFolder

__all__ = [
    "CODE",
    "ESCAPE",
    "MARKER",
    "ODD_KEYS",
    "SECRET",
    "STEP",
    "Bucket",
    "Case",
    "bucket_of",
    "case",
    "commands",
    "no_hub",
    "resume",
    "time_limit",
    "try_all",
    "watch",
]

RUN = Path(__file__).parent / "data" / "round1" / "run"
STEP = "checkpoints/step_000011"
SECRET = b"a secret of this machine"
ESCAPE = "\x1b[2J\x1b]0;owned\x07"


class Case:
    """A copy of a valid run, and files beside it that no command may touch."""

    def __init__(self, folder: Path) -> None:
        self.run = folder / "runs" / "r"
        self.outside = folder / "outside"
        shutil.copytree(RUN, self.run)
        self.outside.mkdir()
        (self.outside / "secret").write_bytes(SECRET)
        (self.outside / "secret.json").write_bytes(b"{}")
        save_file({"secret": torch.ones(2)}, self.outside / "secret.safetensors")
        self.step = self.run / STEP
        self._before = self._contents()

    def state(self) -> dict[str, Any]:
        values: dict[str, Any] = json.loads((self.step / STATE).read_text())
        del values["digest"]
        return values

    def reseal(self, state: dict[str, Any]) -> None:
        """Anybody can recompute it: the digest has no key."""
        (self.step / STATE).write_bytes(seal(state))

    def put(self, name: str, data: bytes) -> None:
        """Add a file to the checkpoint, and its sha256 to state.json."""
        (self.step / name).write_bytes(data)
        state = self.state()
        state["sha256"][name] = hashlib.sha256(data).hexdigest()
        self.reseal(state)

    def put_json(self, name: str, change: Callable[[Any], Any]) -> None:
        values = json.loads((self.step / name).read_text())
        self.put(name, json.dumps(change(values) or values).encode())

    def check(self) -> None:
        assert self._contents() == self._before
        assert sorted(path.name for path in self.run.parents[1].iterdir()) == ["outside", "runs"]
        assert not MARKER.exists()

    def _contents(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.outside.iterdir()}


MARKER = Path(tempfile.gettempdir()) / f"lwo-dist-hostile-{os.getpid()}"
CODE = f"open({str(MARKER)!r}, 'w').close()\n".encode()


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("offline")

    monkeypatch.setattr(hub, "hf_hub_download", refuse)


@pytest.fixture
def case(tmp_path: Path) -> Iterator[Case]:
    made = Case(tmp_path)
    yield made
    MARKER.unlink(missing_ok=True)


def commands(run: str, target: Path) -> list[list[str]]:
    return [
        ["checkpoints", "list", run],
        ["checkpoints", "verify", run],
        ["export", run, "--to", str(target), "--overwrite"],
        ["checkpoints", "prune", run],
    ]


def resume(run: RunFolder) -> None:
    """Read what a resume reads before it builds the model."""
    run.fetch_small()
    checkpoint = find_checkpoint(Config(), run)
    if checkpoint is not None:
        check_record(checkpoint.state, "run", "data", "results")
        checkpoint.hook_state()
        for _ in checkpoint.parked_moments():
            pass
        for tensors in checkpoint.weights():
            assert "secret" not in tensors


def try_all(run: str, target: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Run every command, and resume. Each must succeed or fail in one line. Returns the output."""
    said = []
    for command in commands(run, target):
        code = main(command)
        out, err = capsys.readouterr()
        assert (code, err.count("\n")) in ((0, 0), (2, 1)), err
        said += [*out.splitlines(), err.removesuffix("\n")]
    refusal = []
    try:
        resume(RunFolder.at(run))
    except UserError as error:
        refusal = [" ".join(str(error).split())]  # `main` makes it printable
    said += capsys.readouterr().out.splitlines()
    assert all(line.isprintable() for line in said)
    assert all(len(line) < 3000 for line in said + refusal)
    return said + refusal


class Bucket:
    """An object store that allows any key."""

    def __init__(self, keys: dict[str, bytes]) -> None:
        self.keys = keys

    def get_file_info(self, selector: Any) -> list[Any]:
        prefix = f"{selector.base_dir}/"
        found = [key for key in self.keys if key.startswith(prefix)]
        return [SimpleNamespace(path=key, type=FileType.File) for key in found]

    def open_input_stream(self, key: str) -> io.BytesIO:
        if key not in self.keys:
            raise FileNotFoundError(key)
        return io.BytesIO(self.keys[key])

    def delete_file(self, key: str) -> None:
        if self.keys.pop(key, None) is None:
            raise FileNotFoundError(key)


ODD_KEYS = [
    "../escaped",
    "../../outside/secret",
    "checkpoints/../../escaped",
    "checkpoints/step_000011/../../../escaped",
    "/absolute",
    "a//b",
    "./a",
    "marker/",
    "..",
    "a\nb",
    f"a{ESCAPE}",
    "a\\b",
    "\udc80",
    "run.json/below",
    "checkpoints/step_²²²²²²/state.json",
    "checkpoints/step_00000000000000000000000000000000012/state.json",
    "checkpoints/step_000012/state.json/below",
    f"layers/{'x' * 300}",
    "/".join("a" * 40),
    "y" * 2000,
]


@contextmanager
def bucket_of(
    case: Case, odd: list[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[str, Bucket]]:
    sound = {
        f"bucket/runs/r/{path.relative_to(case.run).as_posix()}": path.read_bytes()
        for path in case.run.rglob("*")
        if path.is_file()
    }
    bucket = Bucket(sound | {f"bucket/runs/r/{key}": b"odd" for key in odd})
    with monkeypatch.context() as patch:
        patch.setenv("LWO_SCRATCH_DIR", str(case.run.parent / "scratch"))
        patch.setattr(storage, "_open", lambda url, name: (bucket, f"bucket/runs/{name}"))
        yield "s3://bucket/runs/r", bucket


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise AssertionError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class Watch:
    """Records what this process opens, changes or starts outside one folder."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.seen: list[str] = []
        sys.addaudithook(self._note)

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        if event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork"):
            self.seen.append(f"{event} {arguments}")
        elif event == "open":
            path, _, flags = arguments
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if isinstance(path, str | bytes) and self._is_bad(path, bool(writes)):
                self.seen.append(f"{event} {path!r}")
        elif event in ("os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.chmod"):
            is_relative = len(arguments) > 1 and arguments[-1] not in (-1, None)  # to a descriptor
            if not (is_relative and event in ("os.remove", "os.rmdir")) and self._is_bad(
                arguments[0], True
            ):
                self.seen.append(f"{event} {arguments}")
        elif event in ("os.rename", "os.link", "os.symlink") and any(
            self._is_bad(path, True) for path in arguments[:2]
        ):
            self.seen.append(f"{event} {arguments}")

    def _is_bad(self, path: Any, writes: bool) -> bool:
        assert self.folder is not None
        real = os.path.realpath(os.fsdecode(path))
        if real.startswith(("/dev/null", "/dev/tty", "/proc/", "/sys/")):
            return False
        inside = real.startswith(f"{self.folder}/")
        if writes:
            return not inside
        # Libraries read their own files; a run must not lead to the user's.
        return real.startswith((f"{self.folder.parent}/outside", "/etc/passwd", "/etc/hostname"))


watch = Watch()
