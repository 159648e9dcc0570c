"""A run that is killed with SIGKILL at seeded random moments ends as the run that nobody touched:
bit for bit.

    python tests/benchmarks/kills.py --kills 5 --seed 0 --json kills.json [key=value ...]

One training run of two workers on a local Ray suffers all the kills: of a worker, of all workers,
of the driver; in a step, in a switch, in a save. It is started again by Ray or, where the driver
died, by the same command. `--json` gets `kills`: moment, recovered, steps_lost; `bitwise_equal`:
the loss of every step, as often as it was computed, and every weight at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
sys.path.insert(0, str(REPOSITORY))  # Where it is run as a file.

from tests.benchmarks import kill_points  # noqa: E402
from tests.benchmarks.kill_points import Moment  # noqa: E402
from tests.benchmarks.unbroken import losses_of  # noqa: E402
from tests.cluster.launching import command, environment, make_inputs, overrides  # noqa: E402
from tests.ranks import run_ranks  # noqa: E402

WORKERS, STEPS_PER_LAYER, SAVE_EVERY = 2, 4, 3


@dataclass(frozen=True)
class Kill:
    moment: str
    recovered: bool
    """Workers started afterwards and came past the step of the kill."""
    steps_lost: int | None
    """Optimizer steps that were done again; None if it never struck."""
    seconds: float | None
    """From the kill until training went on."""


def draw(kills: int, seed: int) -> list[Moment]:
    """Random moments, in their order; every kind comes before any comes twice."""
    rng = random.Random(seed)
    kinds: list[tuple[Any, Any]] = []
    while len(kinds) < kills:
        kinds += rng.sample(
            list(product(("worker", "workers", "driver"), ("step", "switch", "save"))), 9
        )
    # One in each stretch of steps, so that a kill finds the run that the one before it left.
    stretch = 2 * STEPS_PER_LAYER
    return [
        Moment(
            who,
            where,
            stretch * i + rng.randint(1, STEPS_PER_LAYER),
            rng.randrange(WORKERS),
            rng.randrange(6),
        )
        for i, (who, where) in enumerate(kinds[:kills])
    ]


def settings(kills: int) -> list[str]:
    return [
        f"train.steps={2 * STEPS_PER_LAYER * (kills + 1)}",
        "train.logging_steps=1",
        "lwo.order=random",
        "lwo.lr=1e-3",
        f"lwo.steps_per_layer={STEPS_PER_LAYER}",
        f"checkpoint.steps={SAVE_EVERY}",
        "eval.num_lines=2",
        "eval.max_new_tokens=1",
        f"cluster.num_workers={WORKERS}",
        "cluster.max_failures=-1",
    ]


def suffer(
    folder: Path, moments: list[Moment], more: Sequence[str]
) -> tuple[list[Kill], dict[int, str], float]:
    """Train under `moments`, however often it takes; the kills, the loss of each step, the seconds
    it took.
    """
    run_name = "killed"
    killing = folder / "killing"
    train = command(
        folder, run_name, *settings(len(moments)), *more, f"cluster.env.PYTHONPATH={REPOSITORY}"
    )
    arguments = [sys.executable, __file__, "--drive", str(killing), *train[4:]]
    log = folder / f"{run_name}.log"
    begun = time.time()
    for _ in range(len(moments) + 1):
        killing.mkdir(exist_ok=True)
        with log.open("a") as output:
            driver = subprocess.Popen(
                arguments,
                cwd=folder / "home",
                env=environment(folder, OMP_NUM_THREADS="1"),
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            kill_points.plan(killing, moments, driver.pid)
            driver.communicate(b"go")
        if driver.returncode != -9:
            break
    if driver.returncode != 0:
        raise RuntimeError(f"the run ended with {driver.returncode}:\n{log.read_text()[-5000:]}")
    losses: dict[int, str] = {}
    for step, loss in kill_points.losses(killing):
        if losses.setdefault(step, loss) != loss:
            raise RuntimeError(
                f"step {step}, done again, gave another loss: {losses[step]}, then {loss}"
            )
    return (
        [_outcome(killing, number, moment) for number, moment in enumerate(moments)],
        losses,
        time.time() - begun,
    )


def _outcome(killing: Path, number: int, moment: Moment) -> Kill:
    struck = kill_points.struck(killing, number)
    if struck is None:
        return Kill(f"{moment}: never came", False, None, None)
    again = next(
        (start for start in kill_points.starts(killing) if start["time"] > struck["time"]), None
    )
    if again is None:
        return Kill(str(moment), False, None, None)
    came_past = max(step for step, _ in kill_points.losses(killing)) > struck["step"]
    seconds = round(again["time"] - struck["time"], 1)
    return Kill(str(moment), came_past, max(0, struck["step"] - again["step"]), seconds)


def weights(folder: Path, run_name: str) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(folder / "runs" / run_name / "model" / "model.safetensors")


def measure(folder: Path, kills: int, seed: int, *more: str) -> dict[str, Any]:
    """Kill one run, leave another alone, and compare.

    Args:
        more: `key=value` for both configs.
    """
    import torch

    from lwo_dist.config.reading import load_config
    from lwo_dist.driver import prepare

    make_inputs(folder)
    _, file, *others = overrides(folder, "unbroken", *settings(kills), *more)
    unbroken = prepare(load_config(file, others))
    expected = run_ranks(losses_of, WORKERS, unbroken)[0]
    suffered, found, seconds = suffer(folder, draw(kills, seed), more)
    before, after = weights(folder, "unbroken"), weights(folder, "killed")
    equal = found == expected and before.keys() == after.keys()
    equal = equal and all(torch.equal(before[name], after[name]) for name in before)
    return {
        "kills": [vars(kill) for kill in suffered],
        "bitwise_equal": equal,
        "steps": len(expected),
        "seconds": round(seconds, 1),
    }


def drive(killing: Path, overrides: list[str]) -> int:
    """The driver of the killed run: `lwo-dist train`, with the moments on its workers."""
    from lwo_dist.cli import main
    from lwo_dist.cluster import ray_train

    sys.stdin.read()  # Until the moments are there, with the number of this process.
    train_loop = ray_train._train_loop

    def with_moments(*args: Any) -> Any:
        loop = train_loop(*args)

        def train_loop_per_worker() -> Any:
            from tests.benchmarks.kill_points import install

            install(killing)
            return loop()

        return train_loop_per_worker

    ray_train._train_loop = with_moments
    return main(["train", *overrides])


def main() -> int:
    if sys.argv[1:2] == ["--drive"]:
        return drive(Path(sys.argv[2]), sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("more", nargs="*", metavar="key=value", help="for the config")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="kills-"))
    try:
        result = measure(folder / "run", arguments.kills, arguments.seed, *arguments.more)
    finally:
        if not os.environ.get("KEEP"):
            shutil.rmtree(folder, ignore_errors=True)
    for kill in result["kills"]:
        outcome = (
            f"{kill['steps_lost']} steps lost, {kill['seconds']} s"
            if kill["recovered"]
            else "NOT RECOVERED"
        )
        print(f"{kill['moment']:<45} {outcome}")
    equal = "equal, bit for bit" if result["bitwise_equal"] else "NOT EQUAL"
    print(
        f"losses and weights after {result['steps']} steps: {equal}; {result['seconds']} s",
        flush=True,
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))
    return (
        0 if result["bitwise_equal"] and all(kill["recovered"] for kill in result["kills"]) else 1
    )


if __name__ == "__main__":
    sys.exit(main())
