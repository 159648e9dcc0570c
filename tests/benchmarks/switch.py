"""What a switch costs beside a training step, under DeepSpeed's ZeRO on this machine's CPUs.

    python tests/benchmarks/switch.py [--stages 1 2 3] [--visits N] [--json FILE]

Medians of one run, on rank 0: a step without its switch, the first step of a visit (after a switch
stage 3 records anew in which order to gather), and the switch itself.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

import lwo_dist
from lwo_dist.methods.lwo import LayerWise
from lwo_dist.strategies.deepspeed.builder import make_engine
from tests.ranks import run_ranks


def measure(
    stage: int, hidden: int, layers: int, vocabulary: int, visits: int, steps: int
) -> dict[str, Any]:
    """One case, on one rank of a process group."""
    torch.manual_seed(0)
    sizes = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=False,
        use_cache=False,
    )
    model = LlamaForCausalLM(sizes)
    parameters = sum(p.numel() for p in model.parameters())
    config = lwo_dist.LWOConfig(lr=1e-4, steps_per_layer=steps)
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 1.0,
        "steps_per_print": 2**31,
        "zero_optimization": {"stage": stage},
    }
    lwo = lwo_dist.attach(make_engine(model, config, settings, LayerWise()), config)
    tokens = torch.randint(
        vocabulary, (2, 128), generator=torch.Generator().manual_seed(dist.get_rank())
    )
    first, others, switches = [], [], []
    for step in range(visits * steps):
        before, started = lwo.switch_seconds, time.perf_counter()
        lwo.backward(lwo.model(input_ids=tokens, labels=tokens).loss)
        report = lwo.step()
        switch, whole = lwo.switch_seconds - before, time.perf_counter() - started
        if report.switched:
            switches.append(switch)
        if step:  # the very first one allocates
            (others if step % steps else first).append(whole - switch)
    step_seconds, switch_seconds = statistics.median(others), statistics.median(switches)
    return {
        "stage": stage,
        "parameters": parameters,
        "steps": visits * steps,
        "switches": len(switches),
        "step_seconds": step_seconds,
        "first_step_seconds": statistics.median(first),
        "switch_seconds": switch_seconds,
        "switch_over_step": switch_seconds / step_seconds,
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3], choices=[1, 2, 3])
    parser.add_argument("--hidden", type=int, default=512, help="default: %(default)s")
    parser.add_argument("--layers", type=int, default=7, help="default: %(default)s")
    parser.add_argument("--vocabulary", type=int, default=8192, help="default: %(default)s")
    parser.add_argument(
        "--visits", type=int, default=10, help="default: %(default)s, a cycle and one more"
    )
    parser.add_argument(
        "--steps", type=int, default=3, help="steps of a visit; default: %(default)s"
    )
    parser.add_argument("--ranks", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    arguments = parser.parse_args(argv)
    sizes = (
        arguments.hidden,
        arguments.layers,
        arguments.vocabulary,
        arguments.visits,
        arguments.steps,
    )
    cases = []
    print("stage  parameters   step, s  first of a visit, s  switch, s  switch/step")
    for stage in arguments.stages:
        case = run_ranks(measure, arguments.ranks, stage, *sizes, timeout=1800, deepspeed=True)[0]
        cases.append(case)
        print(
            f"{stage:5}  {case['parameters'] / 1e6:9.1f}M  {case['step_seconds']:8.3f} "
            f" {case['first_step_seconds']:19.3f}  {case['switch_seconds']:9.4f} "
            f" {case['switch_over_step']:11.3f}",
            flush=True,
        )
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"ranks": arguments.ranks, "device": "cpu", "cases": cases}, indent=1)
        )


if __name__ == "__main__":
    main()
