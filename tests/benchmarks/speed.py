"""What a training step costs: LWO, its levers, LoRA, full fine-tuning, BAdam and LISA side by side.

    python tests/benchmarks/speed.py [--models 46M SmolLM2-135M] [--methods lwo lora full ...]
        [--steps 3] [--threads 1] [--device cuda] [--json FILE]

All methods of a model are in one process and take turns, a step each, on the same tokens: what
disturbs the machine disturbs all of them. A method that changes what it trains goes through one
whole cycle. Its step time is the mean over the visits of the median in each visit, in process time
on a CPU; floating-point operations and peak memory are counted. `of floor` is the step time over
the time of its operations at the rate of a plain matrix product of the model's size, measured in
the same turns.

Models have random weights. With --device cuda: Qwen2.5-Coder's sizes, under bf16.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import inspect
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import Tensor

import lwo_dist
from lwo_dist.config import LWOConfig
from lwo_dist.models.flops import flops_per_sequence
from lwo_dist.registry import METHODS as OURS
from tests.benchmarks.counting import count_flops, count_peak_bytes
from tests.benchmarks.rivals import METHODS, SHAPES, Contender, Job, make_model, why_not

CPU_MODELS = ("46M", "SmolLM2-135M")
PRODUCTS = 5
"""Matrix products in a turn that measures the rate."""
BY_FORMULA = {"lwo": "lwo", "plain_lwo": "lwo", "full": "full", "plain_full": "full"}
"""Methods whose operations `models/flops.py` predicts -> its method."""
# The lowest layers keep most activations: the peak of a cycle is in its first visits.
PEAK_VISITS, PEAK_STEPS = 3, 2


# ---- one model


@dataclass
class Turns:
    """What one method's turns brought."""

    contender: Contender
    held: int
    """Bytes on the GPU that are this method's."""
    seconds: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Visit -> its steps."""
    bytes: list[int] = field(default_factory=list)
    peak: int = 0

    @property
    def step_seconds(self) -> float:
        return statistics.fmean(map(statistics.median, self.seconds.values()))


def measure(model: str, job: Job, names: Sequence[str]) -> tuple[list[Any], list[Any]]:
    """The cases of a model, with or without checkpointing, and the methods that were skipped."""
    skipped = [
        {"model": model, "method": name, "reason": reason}
        for name in names
        if (reason := why_not(METHODS[name])) is not None
    ]
    names = [name for name in names if why_not(METHODS[name]) is None]
    counted = {name: count(name, job) for name in names}
    groups = [names] if job.shape.together else [[name] for name in names]
    cases = []
    for group in groups:
        turns, rate, lacking = take_turns(job, group)
        skipped += [{"model": model, "method": name, "reason": "out of memory"} for name in lacking]
        for name, found in turns.items():
            flops, peak = counted[name]
            cases.append(case_of(model, job, name, found, rate, flops, peak or found.peak))
    return cases, skipped


def case_of(
    model: str, job: Job, name: str, found: Turns, rate: float, flops: float, peak: int
) -> dict[str, Any]:
    switches = found.contender.switches
    return {
        "model": model,
        "checkpointing": job.checkpointing,
        "method": name,
        "sequences": job.shape.sequences,
        "length": job.shape.length,
        "loss": job.loss,
        "visits": found.contender.visits,
        "steps": sum(map(len, found.seconds.values())),
        "step_seconds": found.step_seconds,
        "flops": flops,
        "matmul_flops_per_second": rate,
        "floor_ratio": found.step_seconds * rate / flops,
        "peak_memory_bytes": peak,
        "bytes_per_step": statistics.fmean(found.bytes),
        "switch_seconds": statistics.median(switches) if switches else None,
    }


def count(name: str, job: Job) -> tuple[float, int]:
    """(operations of a step, peak memory of the CPU in bytes; 0 on a GPU)."""
    make = METHODS[name].make
    one = torch.zeros((1, job.shape.length), dtype=torch.int64, device=job.device)
    flops = count_flops(make(replace(job, steps_per_visit=1)), one) * job.shape.sequences
    if name in BY_FORMULA:
        expected = formula(BY_FORMULA[name], job)
        assert flops == expected, (
            f"{name}: {flops:,.0f} operations counted on real steps, but models/flops.py says"
            f" {expected:,.0f}"
        )
    if job.on_gpu:
        return flops, 0
    job = replace(job, steps_per_visit=PEAK_STEPS)
    steps = PEAK_STEPS * min(PEAK_VISITS, make(job).visits)
    return flops, count_peak_bytes(lambda: make(job), tokens_of(job, 1)[0], steps)


def formula(method: str, job: Job) -> float:
    how = OURS.get(method)
    model = make_model(replace(job, device="meta"))
    visits = how.visits(how.layers(model, LWOConfig()))
    length = job.shape.length
    predict: Any = flops_per_sequence
    if "label_tokens" in inspect.signature(predict).parameters:
        # The model's own loss computes the logits of the last token too, which predicts nothing.
        predict = partial(predict, label_tokens=length if job.loss == "own" else length - 1)
    flops: float = predict(model, visits, length)
    return flops * job.shape.sequences


def take_turns(job: Job, names: Sequence[str]) -> tuple[dict[str, Turns], float, list[str]]:
    """Each method's turns, the rate of a plain matrix product in operations a second, and the
    methods that the GPU's memory did not suffice for.
    """
    turns: dict[str, Turns] = {}
    lacking = []
    for name in names:
        before = allocated(job)
        try:
            contender = METHODS[name].make(job)
            turns[name] = Turns(contender, allocated(job) - before)
        except torch.OutOfMemoryError:
            lacking.append(name)
    rates: list[float] = []
    visits = max((found.contender.visits for found in turns.values()), default=0)
    batches = tokens_of(job, job.steps_per_visit)
    # Collections leave what is there alone, also BAdam's, which makes one at every switch.
    gc.collect()
    gc.freeze()
    # One visit more: the first warms up.
    for turn in range((visits + 1) * job.steps_per_visit):
        visit, in_visit = divmod(turn, job.steps_per_visit)
        rates.append(rate_of_product(job))
        for name in sorted(turns, reverse=bool(turn % 2)):
            try:
                take_turn(job, turns[name], batches[in_visit], visit)
            except torch.OutOfMemoryError:
                del turns[name]
                lacking.append(name)
    gc.unfreeze()
    return turns, statistics.median(rates), lacking


def take_turn(job: Job, found: Turns, tokens: Tensor, visit: int) -> None:
    contender = found.contender
    sent = sum(
        2 * parameter.numel() * parameter.element_size()
        for parameter in contender.model.parameters()
        if parameter.requires_grad
    )
    before = allocated(job)
    if job.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    started = clock(job)
    contender.step(tokens)
    seconds = clock(job) - started
    if job.on_gpu:
        peak = torch.cuda.max_memory_allocated() - before + found.held
        found.peak = max(found.peak, peak)
        found.held += allocated(job) - before
    if visit > 0:
        found.seconds[visit % contender.visits if contender.visits > 1 else visit].append(seconds)
        found.bytes.append(sent)


def tokens_of(job: Job, number: int) -> list[Tensor]:
    """Batches: the same at every call."""
    generator = torch.Generator().manual_seed(0)
    shape = (job.shape.sequences, job.shape.length)
    vocabulary = job.shape.config().vocab_size
    return [
        torch.randint(vocabulary, shape, generator=generator).to(job.device) for _ in range(number)
    ]


def rate_of_product(job: Job) -> float:
    """Operations a second of tokens x (hidden, intermediate), the model's commonest product."""
    config = job.shape.config()
    tokens = job.shape.sequences * job.shape.length
    dtype = torch.bfloat16 if job.on_gpu else torch.float32
    left = torch.ones((tokens, config.hidden_size), dtype=dtype, device=job.device)
    right = torch.ones(
        (config.hidden_size, config.intermediate_size), dtype=dtype, device=job.device
    )
    left @ right
    started = clock(job)
    for _ in range(PRODUCTS):
        left @ right
    seconds = clock(job) - started
    return PRODUCTS * 2 * tokens * config.hidden_size * config.intermediate_size / seconds


def clock(job: Job) -> float:
    if not job.on_gpu:
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def allocated(job: Job) -> int:
    return torch.cuda.memory_allocated() if job.on_gpu else 0


# ---- what is told


def ratios_of(cases: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each way of LWO in each model; None where the other method was not measured."""
    rows = []
    for case in cases:
        if not case["method"].startswith("lwo"):
            continue
        others = {
            other["method"]: other
            for other in cases
            if all(other[key] == case[key] for key in ("model", "checkpointing"))
        }

        def over(name: str, key: str, case: Any = case, others: Any = others) -> float | None:
            return case[key] / others[name][key] if name in others else None

        is_plain = case["method"] == "lwo"
        rows.append(
            {
                "model": case["model"],
                "checkpointing": case["checkpointing"],
                "method": case["method"],
                "lwo_over_lora": over("lora", "step_seconds"),
                "lwo_over_full": over("plain_full", "step_seconds"),
                "lwo_over_badam": over("badam", "step_seconds"),
                "lwo_over_lisa": over("lisa", "step_seconds"),
                "memory_lwo_over_lora": over("lora", "peak_memory_bytes"),
                "memory_lwo_over_full": over("plain_full", "peak_memory_bytes"),
                "floor_lwo_over_full": over("plain_full", "floor_ratio"),
                "hook_overhead": over("plain_lwo", "step_seconds") if is_plain else None,
                "switch_over_step": case["switch_seconds"] / case["step_seconds"],
            }
        )
    return rows


def tell(cases: Sequence[dict[str, Any]]) -> None:
    first = cases[0]
    loss = "the model's loss" if first["loss"] == "own" else "the loss in chunks"
    recomputes = "with" if first["checkpointing"] else "without"
    print(
        f"\n{first['model']}, {first['sequences']} x {first['length']} tokens, {loss}, {recomputes}"
        f" activation checkpointing; a plain product: "
        f"{first['matmul_flops_per_second'] / 1e9:,.0f} GFLOP/s"
    )
    seconds = {case["method"]: case["step_seconds"] for case in cases}
    columns = (
        "step, s",
        "/ LoRA",
        "/ full",
        "GFLOP",
        "/ floor",
        "peak, MB",
        "sent, MB",
        "switch, ms",
    )
    print(f"{'':18}" + "".join(f"{column:>11}" for column in columns))
    for case in cases:
        step = case["step_seconds"]
        cells = [
            f"{step:.4f}",
            f"{step / seconds['lora']:.2f}" if "lora" in seconds else "",
            f"{step / seconds['plain_full']:.2f}" if "plain_full" in seconds else "",
            f"{case['flops'] / 1e9:,.1f}",
            f"{case['floor_ratio']:.2f}",
            f"{case['peak_memory_bytes'] / 1e6:,.1f}",
            f"{case['bytes_per_step'] / 1e6:,.1f}",
            "" if case["switch_seconds"] is None else f"{case['switch_seconds'] * 1e3:.1f}",
        ]
        print(f"{case['method']:18}" + "".join(f"{cell:>11}" for cell in cells), flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), metavar="MODEL")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), metavar="METHOD")
    parser.add_argument(
        "--checkpointing", choices=("off", "on", "both"), default="both", help="default: both"
    )
    parser.add_argument("--steps", type=int, default=3, help="of a visit; default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    usual = "cuda" if on_gpu else "cpu"
    parser.add_argument("--device", default=usual, help="default: %(default)s")
    losses = ("own", "chunked") if hasattr(lwo_dist, "causal_lm_loss") else ("own",)
    parser.add_argument(
        "--loss",
        choices=losses,
        default=losses[-1],
        help="of all methods: the model's, or lwo_dist.causal_lm_loss; default: %(default)s",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    arguments = parser.parse_args(argv)
    if arguments.device != "cpu" and not on_gpu:
        parser.error(f"--device {arguments.device}: torch finds no GPU here; use --device cpu")
    torch.set_num_threads(arguments.threads)
    models = arguments.models or [
        name
        for name in SHAPES
        if (name in CPU_MODELS if arguments.device == "cpu" else name.startswith("Qwen"))
    ]
    cases: list[dict[str, Any]] = []
    skipped: list[dict[str, Any]] = []
    for model in models:
        shape = SHAPES[model]
        names = arguments.methods or shape.methods or list(METHODS)
        for checkpointing in shape.checkpointing:
            if arguments.checkpointing == ("off" if checkpointing else "on"):
                continue
            job = Job(shape, checkpointing, arguments.device, arguments.steps, arguments.loss)
            found, left_out = measure(model, job, names)
            cases += found
            skipped += [row for row in left_out if row not in skipped]
            if found:
                tell(found)
    for row in skipped:
        print(f"skipped: {row['method']} of {row['model']}: {row['reason']}")
    if arguments.json:
        found = {
            "device": torch.cuda.get_device_name() if arguments.device != "cpu" else "cpu",
            "threads": arguments.threads,
            "versions": {
                name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")
            },
            "cases": cases,
            "ratios": ratios_of(cases),
            "skipped": skipped,
        }
        arguments.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
