"""Moments at which a worker dies, kills the others or the driver. Workers of tests import it; the
product never does.

A folder holds what is to happen (`moments.json`) and what did: `done_K.json` with the step at which
moment K struck, `starts.jsonl` with the step at which each group of workers began, `losses.jsonl`,
and the workers' process ids.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

__all__ = ["Moment", "install", "losses", "plan", "starts", "struck"]


@dataclass(frozen=True)
class Moment:
    """`signal` reaches `who` in the first `where` at or after optimizer step `step`."""

    who: Literal["worker", "workers", "driver"]
    where: Literal["step", "switch", "save"]
    step: int
    rank: int = 0
    """Which worker, for `who: worker`."""
    writes: int = 0
    """For `where: save`: how many of its files are written before."""
    signal: str = "SIGKILL"

    def __str__(self) -> str:
        who = f"worker {self.rank}" if self.who == "worker" else f"the {self.who}"
        return f"{who} in a {self.where} at step {self.step}"


def plan(folder: Path, moments: list[Moment], driver: int | None = None) -> None:
    """Say what is to happen. `driver`: its process id; what has happened before stays so."""
    folder.mkdir(exist_ok=True)
    plan = {"driver": driver, "moments": [asdict(moment) for moment in moments]}
    (folder / "moments.json").write_text(json.dumps(plan))


def struck(folder: Path, number: int) -> dict[str, Any] | None:
    """`step` and `time` of moment `number`; None: not yet."""
    path = folder / f"done_{number}.json"
    return json.loads(path.read_text()) if path.exists() else None


def starts(folder: Path) -> list[dict[str, Any]]:
    return _lines(folder / "starts.jsonl")


def losses(folder: Path) -> list[tuple[int, str]]:
    """(step, loss as a hexadecimal float), as often as each was computed."""
    return [(line["step"], line["loss"]) for line in _lines(folder / "losses.jsonl")]


def install(folder: Path) -> None:
    """Make this worker do what `moments.json` says."""
    from lwo_dist.hook import LWO
    from lwo_dist.training.trainer import Trainer

    plan = json.loads((folder / "moments.json").read_text())
    killer = _Killer(folder, [Moment(**moment) for moment in plan["moments"]], plan["driver"])
    killer.write_pid()

    @_around(LWO, "backward")
    def backward(original: Callable, lwo: Any, *args: Any) -> Any:
        killer.strike("step", lwo.step_count)
        return original(lwo, *args)

    @_around(LWO, "_follow_schedule")
    def follow_schedule(original: Callable, lwo: Any) -> Any:
        killer.now = lwo.step_count
        deactivate = lwo.strategy.deactivate

        def half_a_switch(*following: Any) -> None:
            deactivate(*following)
            killer.strike("switch", lwo.step_count)

        lwo.strategy.deactivate = half_a_switch
        try:
            return original(lwo)
        finally:
            lwo.strategy.deactivate = deactivate

    @_around(Trainer, "train")
    def train(original: Callable, trainer: Any) -> Any:
        killer.armed = True
        if os.environ.get("RANK", "0") == "0":
            _append(folder / "starts.jsonl", step=trainer.lwo.step_count, time=time.time())
        return original(trainer)

    @_around(Trainer, "_log")
    def log(original: Callable, trainer: Any, *args: Any) -> Any:
        original(trainer, *args)
        if os.environ.get("RANK", "0") == "0":
            _append(
                folder / "losses.jsonl",
                step=trainer.lwo.step_count,
                loss=trainer.results.losses[-1].hex(),
            )

    _patch_writer(killer)


def _patch_writer(killer: _Killer) -> None:
    from lwo_dist.checkpoint import writer
    from lwo_dist.checkpoint.store import LayerStore

    @_around(LayerStore, "save")
    def save(original: Callable, *args: Any, **more: Any) -> Any:
        killer.writes = 0
        return original(*args, **more)

    def write(original: Callable, path: Path, data: bytes) -> Any:
        killer.strike("save", killer.now)
        killer.writes += 1
        return original(path, data)

    for name in ("write_new", "write_whole"):
        _around(writer, name)(write)

    @_around(writer.RunFolder, "create")
    def create(original: Callable, run: Any, name: str, data: bytes) -> Any:
        if name.endswith("/state.json"):
            killer.strike("save", killer.now, last=True)
        return original(run, name, data)


class _Killer:
    def __init__(self, folder: Path, moments: list[Moment], driver: int | None):
        self.folder, self.moments, self.driver = folder, moments, driver
        self.rank = int(os.environ.get("RANK", "0"))
        self.armed = False
        self.now = self.writes = 0

    def write_pid(self) -> None:
        (self.folder / f"pid_{self.rank}").write_text(str(os.getpid()))

    def strike(self, where: str, step: int, *, last: bool = False) -> None:
        """Do what is due at step `step`; `last`: this is the last file of a save."""
        if not self.armed:
            return
        for number, moment in enumerate(self.moments):
            if moment.where != where or step < moment.step or self.rank != self._who_acts(moment):
                continue
            if where == "save" and self.writes < moment.writes and not last:
                continue
            try:  # Once: the run comes here again.
                with (self.folder / f"done_{number}.json").open("x") as file:
                    json.dump({"step": step, "time": time.time()}, file)
            except FileExistsError:
                continue
            for pid in self._victims(moment):
                os.kill(pid, signal.Signals[moment.signal])
            return

    def _who_acts(self, moment: Moment) -> int:
        # Only rank 0 saves.
        return moment.rank if moment.who == "worker" and moment.where != "save" else 0

    def _victims(self, moment: Moment) -> list[int]:
        if moment.who == "driver":
            return [self.driver] if self.driver else []
        ranks = (
            [moment.rank]
            if moment.who == "worker"
            else range(int(os.environ.get("WORLD_SIZE", "1")))
        )
        pids = [int((self.folder / f"pid_{rank}").read_text()) for rank in ranks]
        return sorted(pids, key=lambda pid: pid == os.getpid())  # Itself last.


def _around(owner: Any, name: str) -> Callable[[Callable], None]:
    original = getattr(owner, name)

    def replace(replacement: Callable) -> None:
        setattr(
            owner,
            name,
            functools.wraps(original)(lambda *args, **kw: replacement(original, *args, **kw)),
        )

    return replace


def _append(path: Path, **line: Any) -> None:
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


if __name__ == "__main__":  # `launch/train.py` with moments, for torchrun
    install(Path(os.environ["KILL_FOLDER"]))
    from lwo_dist.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))
