"""What a step through the hook costs beside the same step of a plain loop.

    python tests/benchmarks/overhead.py [--method lwo|full|lora] [--model FOLDER]
        [--device cuda --precision bf16] [--json FILE]

Both train the same parameters of the same model on the same tokens, with a fused AdamW and
clipping; with lwo the plain loop sets `requires_grad` by hand and makes an optimizer a visit. Their
steps alternate; the medians and their ratio are printed, in process time on a CPU. Without a folder
the model is a random Llama.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import peft
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import lwo_dist
from lwo_dist.config import Config, LoRAConfig
from lwo_dist.layers import find_layers
from lwo_dist.methods.lora import LoRA

LR = 1e-3


def load(arguments: argparse.Namespace) -> Any:
    if arguments.model:
        model: Any = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    else:
        torch.manual_seed(0)
        sizes = LlamaConfig(
            vocab_size=arguments.vocabulary,
            hidden_size=arguments.hidden,
            intermediate_size=arguments.hidden * 11 // 4,
            num_hidden_layers=arguments.layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            use_cache=False,
        )
        model = LlamaForCausalLM(sizes)
    model.config.use_cache = False
    model.train()
    return model.to(arguments.device)


def ours(model: Any, arguments: argparse.Namespace, autocast: Any) -> Callable[[Tensor], Any]:
    if arguments.method == "lora":
        LoRA().prepare(model, Config(lora=LoRAConfig(rank=arguments.rank)))
        model.to(model.device)  # adapters are made on the CPU
    visits = {"steps_per_layer": arguments.steps_per_layer, "order": "ascending"}
    config = lwo_dist.LWOConfig(lr=LR, max_grad_norm=1.0, **visits)
    lwo = lwo_dist.attach(model, config, arguments.method)

    def step(tokens: Tensor) -> Any:
        with autocast:
            loss = lwo.model(input_ids=tokens, labels=tokens).loss
        lwo.backward(loss)
        lwo.step()
        return loss.detach()

    return step


def plain(model: Any, arguments: argparse.Namespace, autocast: Any) -> Callable[[Tensor], Any]:
    if arguments.method == "lora":
        settings = peft.LoraConfig(r=arguments.rank, lora_alpha=32, target_modules="all-linear")
        model = peft.get_peft_model(model, settings)
    parameters = dict(model.named_parameters())
    groups = [[p for p in parameters.values() if p.requires_grad]]
    if arguments.method == "lwo":
        layers = find_layers(model)
        groups = [[parameters[name] for name in layer.parameter_names] for layer in layers]
    done = 0
    trained = groups[0]
    optimizer: torch.optim.Optimizer | None = None

    def step(tokens: Tensor) -> Any:
        nonlocal done, trained, optimizer
        if optimizer is None or (len(groups) > 1 and done % arguments.steps_per_layer == 0):
            trained = groups[done // arguments.steps_per_layer % len(groups)]
            for parameter in model.parameters():
                parameter.requires_grad_(False)
            for parameter in trained:
                parameter.requires_grad_(True)
            optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0, fused=True)
        done += 1
        with autocast:
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(arguments.device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=arguments.precision == "bf16")
    # On a CPU other processes of the machine then count less.
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    models = {"hook": load(arguments), "plain": load(arguments)}
    parameters = sum(p.numel() for p in models["plain"].parameters())
    vocabulary = models["plain"].config.vocab_size
    steps = {
        name: make(models[name], arguments, autocast)
        for name, make in (("hook", ours), ("plain", plain))
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    generator = torch.Generator().manual_seed(0)
    for number in range(arguments.warm_up + arguments.steps):
        shape = (arguments.sequences, arguments.length)
        tokens = torch.randint(vocabulary, shape, generator=generator).to(device)
        for name in sorted(steps, reverse=bool(number % 2)):
            if device.type == "cuda":
                torch.cuda.synchronize()
            started = clock()
            steps[name](tokens)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number >= arguments.warm_up:
                seconds[name].append(clock() - started)
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    return {
        "method": arguments.method,
        "parameters": parameters,
        "tokens": arguments.sequences * arguments.length,
        "precision": arguments.precision,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "steps": arguments.steps,
        "hook_step_seconds": medians["hook"],
        "plain_step_seconds": medians["plain"],
        "hook_overhead": medians["hook"] / medians["plain"],
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--method", choices=("lwo", "full", "lora"), default="lwo")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="default: a random Llama")
    parser.add_argument("--hidden", type=int, default=512, help="default: %(default)s")
    parser.add_argument("--layers", type=int, default=7, help="default: %(default)s")
    parser.add_argument("--vocabulary", type=int, default=8192, help="default: %(default)s")
    parser.add_argument("--rank", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--steps-per-layer", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--sequences", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--length", type=int, default=256, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=30, help="default: %(default)s")
    parser.add_argument("--warm-up", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    arguments = parser.parse_args(argv)
    case = measure(arguments)
    print("method  parameters  precision  hook, s  plain, s  hook/plain")
    seconds = f"{case['hook_step_seconds']:7.4f}  {case['plain_step_seconds']:8.4f}"
    print(
        f"{case['method']:>6}  {case['parameters'] / 1e6:9.1f}M  {case['precision']:>9}  {seconds}"
        f"  {case['hook_overhead']:10.3f}"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps({"cases": [case]}, indent=1))


if __name__ == "__main__":
    main()
