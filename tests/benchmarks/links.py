"""What a step costs on slow links: LWO beside DDP and FSDP2, 1, 2 and 4 ranks, a host each.

    python tests/benchmarks/links.py [--ranks 1 2 4] [--rates 1gbit 100mbit] [--methods ddp ...]
        [--model 46M] [--steps 2] [--json FILE]

Hosts are network namespaces of this machine (root; Debian: iproute2), their links are limited by
`tc` in both directions. All methods are in one process of a rank and take turns, a step each; a
method that changes what it trains goes through one whole cycle. Times are wall times, from one
barrier of all ranks to the next. `counted` is what the strategies say, or the collectives of the
plain loops: whole tensors, an all-reduce as a reduce-scatter and an all-gather. `sent` is what has
left rank 0's network interface, headers included.

The ranks share this machine's cores: compare times only with each other.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import peft
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lwo_dist.strategies.fsdp.builder import shard_model
from tests import hosts
from tests.benchmarks.rivals import (
    PREFIX,
    RANK,
    SHAPES,
    Contender,
    Job,
    Rival,
    hooked,
    make_model,
    plain_step,
    why_not,
)
from tests.distributed.collectives import CountCollectives

PORT = 29_500
INTERFACE = "eth0"
PLAIN_STEPS = 3
"""Of the methods whose steps are all alike."""


# ---- methods


def lwo(job: Job, sharded: bool, **levers: Any) -> Contender:
    model = make_model(job)
    if sharded:
        shard_model(model, precision="fp32", device_type="cpu")
    return hooked(job, model, "lwo", **levers)


def ddp(job: Job) -> Contender:
    """Full fine-tuning."""
    return in_ddp(job, make_model(job))


def lora(job: Job) -> Contender:
    settings = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    return in_ddp(job, peft.get_peft_model(make_model(job), settings))


def in_ddp(job: Job, model: Any) -> Contender:
    wrapped = DistributedDataParallel(model) if dist.get_world_size() > 1 else model
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Contender(model, plain_step(job, wrapped, trained))


def fsdp2(job: Job) -> Contender:
    """Full fine-tuning."""
    model = make_model(job)
    shard_model(model, precision="fp32", device_type="cpu")
    return Contender(model, plain_step(job, model, list(model.parameters())))


METHODS = {
    "lwo_replicate": Rival(partial(lwo, sharded=False)),
    "lwo_replicate+prefix": Rival(partial(lwo, sharded=False, **PREFIX), tuple(PREFIX)),
    "lwo_fsdp": Rival(partial(lwo, sharded=True)),
    "lwo_fsdp+prefix": Rival(partial(lwo, sharded=True, **PREFIX), tuple(PREFIX)),
    "ddp": Rival(ddp),
    "fsdp2": Rival(fsdp2),
    "lora": Rival(lora),
}


# ---- on a rank


def run_rank(names: Sequence[str], job: Job) -> list[dict[str, Any]]:
    """The figures of each method; a collective."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    shape = (job.shape.sequences, job.shape.length)
    vocabulary = job.shape.config().vocab_size
    batches = [
        torch.randint(vocabulary, shape, generator=generator) for _ in range(job.steps_per_visit)
    ]
    contenders = {name: METHODS[name].make(job) for name in names}
    counted = {name: count(contender, batches) for name, contender in contenders.items()}
    seconds: dict[str, Any] = {name: defaultdict(list) for name in names}
    sent: dict[str, list[int]] = {name: [] for name in names}
    visits = max(contender.visits for contender in contenders.values())
    turns = visits * job.steps_per_visit
    for turn in range(turns):
        visit, in_visit = divmod(turn, job.steps_per_visit)
        for name in sorted(names, reverse=bool(turn % 2)):
            contender = contenders[name]
            if contender.visits == 1 and turn % max(1, turns // PLAIN_STEPS):
                continue
            taken, left, report = take_turn(contender.step, batches[in_visit])
            if contender.visits > 1:
                counted[name].append(report.bytes_sent)
            seconds[name][visit if contender.visits > 1 else 0].append(taken)
            sent[name].append(left)
    return [
        {
            "method": name,
            "steps": len(sent[name]),
            "step_seconds": statistics.fmean(map(statistics.median, seconds[name].values())),
            "counted_bytes": statistics.fmean(counted[name]),
            "sent_bytes": statistics.fmean(sent[name]),
        }
        for name in names
    ]


def count(contender: Contender, batches: Sequence[Tensor]) -> list[int]:
    """Warm up: a whole visit; of a method whose steps are all alike, return what one sends."""
    for batch in batches:
        contender.step(batch)
    if contender.visits > 1:
        return []  # its reports say so, step by step
    with CountCollectives() as collectives:
        contender.step(batches[0])
    once = collectives.bytes("all_gather", "reduce_scatter", "broadcast")
    return [once + 2 * collectives.bytes("all_reduce")]


def take_turn(step: Callable[[Tensor], Any], tokens: Tensor) -> tuple[float, int, Any]:
    """(seconds, bytes that this rank has sent, what the step returned)."""
    dist.barrier()
    before = bytes_sent()
    started = time.perf_counter()
    report = step(tokens)
    dist.barrier()  # what is still in a queue is sent, and counted, by the end of it
    return time.perf_counter() - started, bytes_sent() - before, report


def bytes_sent() -> int:
    return int(Path(f"/sys/class/net/{INTERFACE}/statistics/tx_bytes").read_text())


def be_rank(names: Sequence[str], job: Job, file: Path) -> None:
    dist.init_process_group("gloo")
    found = run_rank(names, job)
    if dist.get_rank() == 0:
        file.write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


# ---- this machine


def on_hosts(
    made: Sequence[hosts.Host], rate: str | None, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Start a rank on each host; return what rank 0 found.

    Raises:
        RuntimeError: a rank failed.
    """
    for host in made if rate is not None else ():
        host.limit(rate)
    with tempfile.TemporaryDirectory(prefix="links-") as name:
        file = Path(name) / "found.json"
        environment = {
            "WORLD_SIZE": str(len(made)),
            "MASTER_ADDR": made[0].address,
            "MASTER_PORT": str(PORT),
            "GLOO_SOCKET_IFNAME": INTERFACE,
            "OMP_NUM_THREADS": str(arguments.threads),
        }
        words = [sys.executable, str(Path(__file__).resolve()), "--rank-file", str(file)]
        words += ["--model", arguments.model, "--steps", str(arguments.steps)]
        words += ["--threads", str(arguments.threads), "--methods", *arguments.methods]
        ranks = [
            host.start(
                *words,
                env={**os.environ, **environment, "RANK": str(rank)},
                stderr=(Path(name) / f"{rank}.stderr").open("w"),
            )
            for rank, host in enumerate(made)
        ]
        try:
            failed = wait(ranks)
        finally:
            for host in made:
                host.kill()
        if failed is not None:
            stderr = (Path(name) / f"{failed}.stderr").read_text()
            raise RuntimeError(f"rank {failed} of {len(made)} failed:\n{stderr[-4000:]}")
        found: list[dict[str, Any]] = json.loads(file.read_text())
        return found


def wait(ranks: Sequence[subprocess.Popen[str]]) -> int | None:
    """Until all have ended, or one has failed: that one."""
    running = dict(enumerate(ranks))
    while running:
        for rank, process in list(running.items()):
            code = process.poll()
            if code == 0:
                del running[rank]
            elif code is not None:
                return rank
        time.sleep(0.05)
    return None


def ratios_of(cases: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each way of LWO on each link: DDP's and FSDP2's step, and their bytes, over its."""
    rows = []
    for case in cases:
        if not case["method"].startswith("lwo"):
            continue
        row = {key: case[key] for key in ("model", "ranks", "rate", "method")}
        for other in cases:
            alike = all(other[key] == case[key] for key in ("model", "ranks", "rate"))
            if not alike or other["method"].startswith("lwo"):
                continue
            row[f"{other['method']}_over_lwo"] = other["step_seconds"] / case["step_seconds"]
            if case["sent_bytes"]:
                row[f"bytes_{other['method']}_over_lwo"] = other["sent_bytes"] / case["sent_bytes"]
        rows.append(row)
    return rows


def tell(cases: Sequence[dict[str, Any]]) -> None:
    first = cases[0]
    link = f"links of {first['rate']}" if first["rate"] else "no link"
    print(f"\n{first['model']}, {first['ranks']} rank(s), {link}")
    print(f"{'':22}{'step, s':>10}{'/ DDP':>9}{'counted, MB':>13}{'sent, MB':>11}")
    seconds = {case["method"]: case["step_seconds"] for case in cases}
    for case in cases:
        over = f"{case['step_seconds'] / seconds['ddp']:.3f}" if "ddp" in seconds else ""
        print(
            f"{case['method']:22}{case['step_seconds']:10.3f}{over:>9}"
            f"{case['counted_bytes'] / 1e6:13.2f}{case['sent_bytes'] / 1e6:11.2f}",
            flush=True,
        )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rates", nargs="+", default=["1gbit", "100mbit"], help="as of tc")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--model", choices=list(SHAPES), default="46M")
    parser.add_argument("--steps", type=int, default=2, help="of a visit; default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="of a rank; default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--rank-file", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.rank_file:
        torch.set_num_threads(arguments.threads)
        job = Job(SHAPES[arguments.model], steps_per_visit=arguments.steps)
        be_rank(arguments.methods, job, arguments.rank_file)
        return
    # Also then the hosts go, and what runs on them.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    found: dict[str, Any] = {"threads": arguments.threads, "cases": [], "ratios": [], "skipped": []}
    skipped = {name: reason for name in arguments.methods if (reason := why_not(METHODS[name]))}
    found["skipped"] = [{"method": name, "reason": reason} for name, reason in skipped.items()]
    arguments.methods = [name for name in arguments.methods if name not in skipped]
    reason = hosts.why_not()
    if reason is not None:
        found["skipped"].append({"method": "all", "reason": reason})
    for row in found["skipped"]:
        print(f"skipped: {row['method']}: {row['reason']}")
    for number in arguments.ranks if reason is None else ():
        with hosts.hosts(number) as made:
            for rate in arguments.rates if number > 1 else (None,):
                shared = {"model": arguments.model, "ranks": number, "rate": rate}
                cases = [shared | case for case in on_hosts(made, rate, arguments)]
                tell(cases)
                found["cases"] += cases
    found["ratios"] = ratios_of(found["cases"])
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
