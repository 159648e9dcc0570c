"""One writer per run: numbered claims, and a heartbeat from the process that holds the run.

    <run>/lease/000003.json          a claim; created once, never changed; the highest one is valid
    <run>/lease/<holder>.alive       heartbeat; renewed every few seconds, removed at the end

One attempt at a time writes a run. The process that the user started (the driver, or rank 0 under
torchrun) holds the run: it takes a claim, and renews its heartbeat until it ends. Rank 0 of each
group of workers takes a further claim in the holder's name. The claim's number is a fencing token:
a claim revokes all claims with lower numbers, and a process that finds a later claim stops before
it commits, prunes or ends anything. state.json of a checkpoint is created, never overwritten, so
that no step is committed twice.

Clocks of different machines are never compared. A holder is dead if its process has gone from this
machine, or if its heartbeat has not changed for EXPIRES_S on the observer's clock. On a file
system, a claim is a hard link, which is atomic on local disks and NFS; in an object store, it is a
conditional write.

This follows Gray and Cheriton, "Leases" (SOSP 1989), with the claims' numbers as fencing tokens
(sequencers in Burrows, "The Chubby lock service", OSDI 2006, section 2.4).
"""

from __future__ import annotations

import contextlib
import functools
import getpass
import hashlib
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from .errors import DamagedError, UserError, first_line, printable
from .storage import RunFolder

__all__ = [
    "Lease",
    "LostRunError",
    "is_ours",
    "join",
    "refuse_held",
    "renewed",
    "take",
    "this_process",
    "watched",
]

RENEW_S = 5.0
EXPIRES_S = 30.0
_LOOK_S = 0.5
_FOLDER = "lease"
_MAX_CLAIM_BYTES = 10_000
_MAX_BEAT_BYTES = 100
_CLAIM = re.compile(r"([0-9]{6}|[1-9][0-9]{6,8})\.json")
_MAX_NUMBER = 10**9 - 1
_ATTEMPTS = 20  # each one that fails is another process's success


class LostRunError(UserError):
    """Another process has taken over the run; this one must not write to it any more."""


@dataclass(frozen=True)
class Lease:
    """A claim to the run: the right to write it until there is a later claim."""

    run: RunFolder
    number: int
    holder: str
    """Id of the process in whose name the claim was made."""

    def check(self) -> None:
        """Check that the claim is still valid.

        Raises:
            LostRunError: there is a later claim.
            DamagedError: there is something else in its place.
            OSError: the storage cannot be reached.
        """
        if self.run.read(_claim_name(self.number + 1), limit=1) is not None:
            newest = _newest(self.run)
            raise _lost(self.run, newest[1] if newest else {})

    def is_lost(self) -> bool:
        """Whether there is a later claim; False if the storage cannot be reached."""
        try:
            self.check()
        except LostRunError:
            return True
        except (OSError, DamagedError):
            return False
        return False


@functools.cache
def this_process() -> dict[str, Any]:
    """Holder id, host, user, pid, start time, and `machine`: equal for processes that can see each
    other's pids.
    """
    import psutil

    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        machine = f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # not Linux
        machine = f"{socket.gethostname()} {psutil.boot_time():.0f}"
    return _process(psutil.Process(), machine)


def _process(process: Any, machine: str) -> dict[str, Any]:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's uid without a name
        user = str(os.getuid())
    known = {"pid": process.pid, "started": process.create_time(), "machine": machine}
    holder = hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]
    return {"holder": holder, "host": socket.gethostname(), "user": user, **known}


def take(run: RunFolder, *, force: bool = False) -> Lease:
    """Claim the run for this process, unless a live process holds it.

    Waits up to `EXPIRES_S` for the holder's heartbeat, and prints a line if it does.

    Args:
        force: take the run over from a live holder, and print a line that names it.

    Raises:
        UserError: the run is held by another process, or its storage takes no claim.
    """
    me = this_process()
    with _one_line(run):
        for _ in range(_ATTEMPTS):
            newest = _newest(run)
            number, claim = newest or (0, {})
            is_mine = claim.get("holder") in (None, me["holder"])
            is_held = not is_mine and _live_beat(run, claim) is not None
            if is_held and not force:
                _wait_until_dead(run, claim)
            run.write(_beat_name(me["holder"]), _beat())
            if (lease := _claim(run, number + 1, me)) is not None:
                if is_held and force:
                    print(
                        f"took over the run {run.local.name} from {_who(claim)}, which had been"
                        f" writing it since {_since(claim)}",
                        flush=True,
                    )
                return lease
            # Another process was faster; check whether it is alive.
    raise _no_claim(run)


def join(run: RunFolder, holder: str) -> Lease:
    """Take a further claim in the name of `holder` for a new group of workers. It revokes the claim
    of the previous group.

    Raises:
        LostRunError: another process has claimed the run since.
        UserError: the run's storage takes no claim.
    """
    with _one_line(run):
        for _ in range(_ATTEMPTS):
            newest = _newest(run)
            if newest is None or newest[1]["holder"] != holder:
                raise _lost(run, newest[1] if newest else {})
            number, claim = newest
            lease = _claim(run, number + 1, {**claim, "rank_0": this_process()})
            if lease is not None:
                return lease
    raise _no_claim(run)


@contextlib.contextmanager
def renewed(run: RunFolder) -> Iterator[None]:
    """Renew this process's heartbeat inside, and remove it at the end, which frees the run."""
    beat = _beat_name(this_process()["holder"])

    def renew() -> None:
        with contextlib.suppress(OSError, DamagedError):  # the storage may be back in time
            run.write(beat, _beat())

    try:
        with _repeated(renew):
            yield
    finally:
        with contextlib.suppress(OSError, DamagedError):
            run.remove([beat])


@contextlib.contextmanager
def watched(claim: Lease, on_loss: Callable[[], None]) -> Iterator[None]:
    """Inside, call `on_loss` once the claim is lost; in another thread, and perhaps repeatedly."""

    def watch() -> None:
        if claim.is_lost():
            on_loss()

    with _repeated(watch):
        yield


@contextlib.contextmanager
def _repeated(call: Callable[[], None]) -> Iterator[None]:
    """Inside, call `call` in a thread every `RENEW_S`."""
    over = threading.Event()

    def repeat() -> None:
        while not over.wait(RENEW_S):
            call()

    thread = threading.Thread(target=repeat, name="lwo-dist-lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def refuse_held(run: RunFolder) -> None:
    """Refuse a run that another live process holds. Waits like `take`.

    Raises:
        UserError: the run is held, or its storage cannot be read.
    """
    with _one_line(run):
        newest = _newest(run)
        if newest is not None and newest[1]["holder"] != this_process()["holder"]:
            _wait_until_dead(run, newest[1])


def is_ours(run: RunFolder) -> bool:
    """Whether the newest claim was made in this process's name; False if it cannot be read."""
    try:
        newest = _newest(run)
    except (OSError, DamagedError):
        return False
    return newest is not None and newest[1]["holder"] == this_process()["holder"]


def _claim(run: RunFolder, number: int, claimant: dict[str, Any]) -> Lease | None:
    if number > _MAX_NUMBER:
        raise UserError(
            f"{run}/{_claim_name(number - 1)} is the last claim that a run can have, and made up;"
            " remove it"
        )
    since = datetime.now().astimezone().isoformat(" ", "seconds")
    record = json.dumps({**claimant, "since": since}, indent=1).encode()
    made = run.create(_claim_name(number), record)
    return Lease(run, number, claimant["holder"]) if made else None


@contextlib.contextmanager
def _one_line(run: RunFolder) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{run}/{_FOLDER} cannot be used: {error.strerror or first_line(error)}; give a storage"
            " that can be written, or remove what is in the way"
        ) from None


def _no_claim(run: RunFolder) -> UserError:
    return UserError(
        f"{run}/{_FOLDER} takes no claim, but shows no newer one either; remove what is in the way"
        " there, or choose another run_name"
    )


def _newest(run: RunFolder) -> tuple[int, dict[str, Any]] | None:
    """Number and contents of the newest claim."""
    names = {name.removeprefix(f"{_FOLDER}/") for name in run.files(_FOLDER)}
    numbers = [int(name.removesuffix(".json")) for name in names if _CLAIM.fullmatch(name)]
    if not numbers:
        return None
    data = run.read(_claim_name(max(numbers)), limit=_MAX_CLAIM_BYTES) or b""
    try:
        claim = json.loads(data)
        sound = re.fullmatch(r"[0-9a-f]{16}", claim["holder"]) is not None
    except (ValueError, KeyError, TypeError, RecursionError):
        sound = False
    # A damaged claim has no live holder.
    return max(numbers), claim if sound else {"holder": "nobody"}


def _live_beat(run: RunFolder, claim: dict[str, Any]) -> bytes | None:
    """The holder's heartbeat; None if the holder has ended or is known to be dead."""
    beat = run.read(_beat_name(claim["holder"]), limit=_MAX_BEAT_BYTES)
    return None if _has_died(claim) else beat


def _wait_until_dead(run: RunFolder, claim: dict[str, Any]) -> None:
    last = _live_beat(run, claim)
    if last is None:
        return
    print(
        f"{_who(claim)} has claimed the run {run.local.name}; waiting up to {EXPIRES_S:.0f} s for"
        " its heartbeat",
        flush=True,
    )
    give_up = time.monotonic() + EXPIRES_S
    while time.monotonic() < give_up:
        time.sleep(_LOOK_S)
        now = run.read(_beat_name(claim["holder"]), limit=_MAX_BEAT_BYTES)
        if now is None:
            return
        if now != last:
            raise UserError(
                f"run_name = {run.local.name}: {_who(claim)} has been writing this run since"
                f" {_since(claim)}; wait until it ends, choose another"
                " run_name, or take over the run with checkpoint.take_over=true"
            )


def _has_died(claim: dict[str, Any]) -> bool:
    """Whether the holder ran on this machine and its process has gone.

    If another process has its pid now, the heartbeat decides: start times shift with the clock.
    """
    import psutil

    if claim.get("machine") != this_process()["machine"]:
        return False
    try:
        return bool(psutil.Process(claim["pid"]).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
    except (psutil.Error, KeyError, TypeError, ValueError, OverflowError):
        return False


def _lost(run: RunFolder, claim: dict[str, Any]) -> LostRunError:
    return LostRunError(
        f"run_name = {run.local.name}: {_who(claim)} took over this run at"
        f" {_since(claim)}; this process stops"
    )


def _who(claim: dict[str, Any]) -> str:
    user = claim.get("user", "unknown")
    who = f"process {claim.get('pid', '?')} of user {user} on {claim.get('host', '?')}"
    return printable(who[:200])


def _since(claim: dict[str, Any]) -> str:
    return printable(str(claim.get("since", "an unknown time"))[:40])


def _claim_name(number: int) -> str:
    return f"{_FOLDER}/{number:06d}.json"


def _beat_name(holder: str) -> str:
    return f"{_FOLDER}/{holder}.alive"


def _beat() -> bytes:
    return os.urandom(8).hex().encode()
