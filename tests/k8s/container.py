"""One container as a runtime would start it: a root file system, mounts, processes, a user, and the
pod's network.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Container", "Image", "Mount"]

# $1: a folder to work in; $2: the image's root. What comes after this in the script is seen from
# the new root.
_ROOT = """
set -euo pipefail
ulimit -n "$(ulimit -Hn)"
mount -t tmpfs tmpfs "$1"
mkdir "$1"/{upper,work,root}
mount -t overlay overlay -o lowerdir="$2",upperdir="$1/upper",workdir="$1/work" "$1/root"
cd "$1/root"
mkdir -p proc sys dev etc tmp
mount -t proc proc proc
mount -t sysfs -o ro sysfs sys
mount -t tmpfs -o mode=755 tmpfs sys/fs/cgroup
mount -t tmpfs -o mode=755 tmpfs dev
for device in null zero full random urandom tty; do
  touch dev/$device; mount --bind /dev/$device dev/$device; done
ln -s /proc/self/fd dev/fd
for number in 0:stdin 1:stdout 2:stderr; do ln -s /proc/self/fd/${number%:*} dev/${number#*:}; done
mkdir dev/pts dev/shm
mount -t devpts -o newinstance,ptmxmode=666 devpts dev/pts
ln -s pts/ptmx dev/ptmx
mount -t tmpfs -o mode=1777,size=64m tmpfs dev/shm
"""
_ENTER = """
pivot_root . .
umount -l .
"""


@dataclass(frozen=True)
class Image:
    root: Path
    environment: Mapping[str, str]
    entrypoint: Sequence[str] = ()
    command: Sequence[str] = ()
    working_dir: str = "/"
    borrowed: Sequence[str] = ()
    """Folders of this machine that belong to it, read-only and under the same names."""


@dataclass(frozen=True)
class Mount:
    path: str
    source: Path | None
    """None: memory, of `size` bytes."""
    read_only: bool = False
    size: int = 0

    def script(self) -> str:
        target = shlex.quote(self.path.lstrip("/"))
        if self.source is None:
            return (
                f"mkdir -p {target}; mount -t tmpfs -o mode=1777,size={self.size} tmpfs {target}\n"
            )
        make = (
            f"mkdir -p {target}"
            if self.source.is_dir()
            else f'mkdir -p "$(dirname {target})"; touch {target}'
        )
        bind = f"{make}; mount --bind {shlex.quote(str(self.source))} {target}\n"
        return bind + (f"mount -o remount,bind,ro {target}\n" if self.read_only else "")


@dataclass
class Container:
    name: str
    image: Image
    command: Sequence[str]
    environment: Mapping[str, str]
    mounts: Sequence[Mount]
    security: Mapping[str, Any]
    """The pod's securityContext and the container's, merged."""
    namespace: str
    """The network namespace."""
    hostname: str
    folder: Path
    memory: int | None = None
    """Bytes; the kernel kills what takes more, if it has the first version of control groups."""
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    def start(self) -> None:
        self.folder.mkdir(parents=True)
        (self.folder / "root").mkdir()
        if (group := self._control_group) is not None:
            group.mkdir()
            (group / "memory.limit_in_bytes").write_text(str(self.memory))
        isolated = ["unshare", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child"]
        command = [
            "nsenter",
            f"--net=/run/netns/{self.namespace}",
            *isolated,
            "bash",
            "-c",
            self._script(),
            self.name,
        ]
        with (self.folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [*command, str(self.folder / "root"), str(self.image.root)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _script(self) -> str:
        script = _ROOT + f"hostname {shlex.quote(self.hostname)}\n"
        if (group := self._control_group) is not None:
            script += (
                f"echo 0 >{group}/cgroup.procs\n"
                + Mount("/sys/fs/cgroup/memory", group, read_only=True).script()
            )
        borrowed = [Mount(folder, Path(folder), read_only=True) for folder in self.image.borrowed]
        # A mount below another comes after it.
        script += "".join(
            mount.script()
            for mount in [*sorted(self.mounts, key=lambda mount: mount.path), *borrowed]
        )
        if self.security.get("readOnlyRootFilesystem"):
            script += "mount -o remount,ro .\n"
        return (
            script
            + _ENTER
            + f"cd {self.image.working_dir}\nexec {shlex.join(self._as_user(self.command))}\n"
        )

    def _as_user(self, command: Sequence[str]) -> list[str]:
        user, group = self.security["runAsUser"], self.security["runAsGroup"]
        words = [
            "setpriv",
            f"--reuid={user}",
            f"--regid={group}",
            f"--groups={self.security.get('fsGroup', group)}",
        ]
        if self.security.get("allowPrivilegeEscalation") is False:
            words.append("--no-new-privs")
        if "ALL" in self.security.get("capabilities", {}).get("drop", ()):
            words += ["--bounding-set=-all", "--inh-caps=-all"]
        pairs = [f"{name}={value}" for name, value in self.environment.items()]
        return [*words, "env", "-i", *pairs, *command]

    @property
    def _control_group(self) -> Path | None:
        parts = [line.split(":") for line in Path("/proc/self/cgroup").read_text().splitlines()]
        for _, controllers, path in parts:
            base = Path(f"/sys/fs/cgroup/memory{path}")
            if self.memory is not None and controllers == "memory" and base.is_dir():
                return base / f"{self.namespace}-{self.name}"
        return None

    def _init(self) -> int:
        """This machine's number for the container's process 1, which is the command."""
        assert self._process is not None
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError):
                for child in self._children():
                    # Root's until the command is what runs.
                    if Path(f"/proc/{child}").stat().st_uid == self.security["runAsUser"]:
                        return child
            if not self.runs or time.monotonic() > deadline:
                raise RuntimeError(
                    f"{self.hostname}: container {self.name} does not run; its log:\n{self.log}"
                )
            time.sleep(0.05)

    def _children(self) -> list[int]:
        assert self._process is not None
        me = self._process.pid
        with contextlib.suppress(OSError):
            return [
                int(word) for word in Path(f"/proc/{me}/task/{me}/children").read_text().split()
            ]
        return []

    def exec(self, *command: str, timeout: float | None = None) -> subprocess.CompletedProcess[str]:
        """As `kubectl exec` and hooks: in the container, as its user, with its environment."""
        enter = [
            "nsenter",
            f"--target={self._init()}",
            "--mount",
            "--uts",
            "--ipc",
            "--net",
            "--pid",
            "--wd",
        ]
        words = shlex.join([*enter, *self._as_user(command)])
        if (group := self._control_group) is not None:
            words = f"echo 0 >{group}/cgroup.procs; exec {words}"
        return subprocess.run(
            ["bash", "-c", words], capture_output=True, text=True, timeout=timeout
        )

    def terminate(self) -> None:
        os.kill(self._init(), signal.SIGTERM)

    def kill(self) -> None:
        with contextlib.suppress(RuntimeError, ProcessLookupError):
            os.kill(self._init(), signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        """The exit code. Raises subprocess.TimeoutExpired."""
        assert self._process is not None
        return self._process.wait(timeout)

    @property
    def runs(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    def remove(self) -> None:
        """Nothing of it is left, whatever state it is in."""
        if self._process is not None:
            while self.runs:
                # Process 1 takes all others of the container along. (The name of an exited one is
                # nobody else's yet.)
                for child in self._children():
                    os.kill(child, signal.SIGKILL)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(0.1)
        if (group := self._control_group) is not None:
            deadline = time.monotonic() + 30
            while group.is_dir():
                with contextlib.suppress(OSError):  # Its last process is just ending.
                    group.rmdir()
                if time.monotonic() > deadline:
                    raise RuntimeError(f"{group}: processes are left in it")
