"""Several hosts on this machine: network namespaces on a bridge, each with a host name and folders
of its own.

Needs root and Debian's iproute2. What runs on a host shares files and cores with this machine, but
no network, no processes, no /dev/shm and no temporary folder of Ray.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["Host", "bridge", "hosts", "why_not"]

# $1: host name, $2: its hosts file, $3: its own folder, $4: where that is seen; then the command.
_ON_HOST = """
set -e
hostname "$1"; mount --bind "$2" /etc/hosts; mount --bind "$3" "$4"; mount -t tmpfs tmpfs /dev/shm
shift 4
exec "$@"
"""


class Host:
    """A host `name` at `address`. RAY_TMPDIR must be `ray_folder` there: one path, another folder
    on each host.
    """

    def __init__(self, net: int, number: int, folder: Path, ray_folder: Path):
        self.name, self.address, self.ray_folder = (
            f"host{number}",
            f"10.77.{net}.{number}",
            ray_folder,
        )
        self.namespace, self._link, self._bridge = (
            f"lwo{net}h{number}",
            f"lwo{net}v{number}",
            _bridge_name(net),
        )
        self._folder = folder

    def command(self, *words: str) -> list[str]:
        """The command `words`, run on this host; what is started, and the command, end with SIGKILL
        to it.
        """
        own = self._folder / self.name
        own.mkdir(exist_ok=True)
        arguments = [self.name, str(self._folder / "hosts"), str(own), str(self.ray_folder)]
        # Processes of their own: Ray looks for other Rays among those that it sees.
        inside = [
            "unshare",
            "--uts",
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
            "bash",
            "-c",
            _ON_HOST,
            "on-host",
            *arguments,
        ]
        return ["ip", "netns", "exec", self.namespace, *inside, *words]

    def start(self, *words: str, **popen: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(self.command(*words), text=True, **popen)

    def cut(self) -> None:
        """No packet comes or goes; nobody is told, as with a cable that is pulled out further
        away.
        """
        _ip("link", "set", self._link, "nomaster")

    def mend(self) -> None:
        _ip("link", "set", self._link, "master", self._bridge)

    def limit(self, rate: str) -> None:
        """Let no more than `rate`, as `tc` spells it, pass in each direction."""
        bucket = ["root", "tbf", "rate", rate, "burst", "256kb", "latency", "50ms"]
        inside = ["ip", "netns", "exec", self.namespace]
        for words in (["dev", self._link], ["dev", "eth0"]):
            where = inside if "eth0" in words else []
            command = [*where, "tc", "qdisc", "replace", *words, *bucket]
            subprocess.run(command, check=True, capture_output=True, text=True)

    def bytes_received(self) -> int:
        """Of all that came over the link so far, headers included."""
        return int(Path(f"/sys/class/net/{self._link}/statistics/tx_bytes").read_text())

    def nft(self, rules: str) -> None:
        """Load `rules` into this host's nftables (Debian: nftables)."""
        command = ["ip", "netns", "exec", self.namespace, "nft", "-f", "-"]
        done = subprocess.run(command, input=rules, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{done.stderr}\n{rules}")

    def kill(self) -> None:
        """The power is gone: SIGKILL to all that runs here."""
        while pids := _ip("netns", "pids", self.namespace).split():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)

    @contextlib.contextmanager
    def linked(self, gateway: str) -> Iterator[None]:
        _ip("netns", "add", self.namespace)
        try:
            _ip(
                "link",
                "add",
                self._link,
                "type",
                "veth",
                "peer",
                "name",
                "eth0",
                "netns",
                self.namespace,
            )
            _ip("link", "set", self._link, "master", self._bridge, "up")
            for words in (
                ["address", "add", f"{self.address}/24", "dev", "eth0"],
                ["link", "set", "eth0", "up"],
                ["link", "set", "lo", "up"],
                # Nobody answers there; but Ray asks which address it would use.
                ["route", "add", "default", "via", gateway],
            ):
                _ip("-netns", self.namespace, *words)
            yield
        finally:
            self.kill()
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip(
                    "link", "delete", self._link
                )  # A namespace goes at its leisure, and would keep the name taken.
            _ip("netns", "delete", self.namespace)


def why_not() -> str | None:
    """Why there can be no hosts here; None if there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    try:
        with hosts(1) as (host,):
            done = subprocess.run(host.command("true"), capture_output=True, text=True)
    except FileNotFoundError:
        return "network namespaces need the command `ip` (Debian: iproute2)"
    except subprocess.CalledProcessError as error:
        return f"no network namespaces here: {error.stderr.strip()}"
    return f"no mount namespaces here: {done.stderr.strip()}" if done.returncode else None


@contextlib.contextmanager
def hosts(number: int) -> Iterator[list[Host]]:
    """`host1`, `host2`, ..., which find each other by name. All that runs on them is killed at the
    end.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hosts-")))
        # Ray's sockets do not fit below a longer path.
        ray_folder = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="ray", dir="/tmp"))
        )
        net = stack.enter_context(bridge())
        made = [Host(net, i, folder, ray_folder) for i in range(1, number + 1)]
        for host in made:
            stack.enter_context(host.linked(f"10.77.{net}.254"))
        names = "".join(f"{host.address} {host.name}\n" for host in made)
        (folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
        yield made


@contextlib.contextmanager
def bridge() -> Iterator[int]:
    """The number of a network that nobody else has: its bridge's name is the lock."""
    for net in range(256):
        name = _bridge_name(net)
        with contextlib.suppress(FileExistsError):
            _ip("link", "add", name, "type", "bridge")
            break
    else:
        raise RuntimeError(
            "256 networks of these tests are there; `ip link delete` what an interrupted one left"
        )
    try:
        _ip("address", "add", f"10.77.{net}.254/24", "dev", name)
        _ip("link", "set", name, "up")
        yield net
    finally:
        _ip("link", "delete", name)


def _bridge_name(net: int) -> str:
    return f"lwob{net}"


def _ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if "File exists" in done.stderr:
        raise FileExistsError(done.stderr.strip())
    done.check_returncode()
    return done.stdout
