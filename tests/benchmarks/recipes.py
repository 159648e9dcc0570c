"""Which recipe learns most from the same tokens: held-out loss of short runs through the hook.

    python tests/benchmarks/recipes.py prepare --model MODEL --data FILE.pt SOURCE...
    python tests/benchmarks/recipes.py run --model MODEL --data FILE.pt --list RUNS.jsonl \
        --results FILE.jsonl
    python tests/benchmarks/recipes.py table --model MODEL --results FILE.jsonl
    python tests/benchmarks/recipes.py picture --model MODEL --results FILE.jsonl

MODEL is a folder or a GGUF file; a SOURCE is a folder whose name names it, split by file. A line of
the list is a run:

    {"source": "forgelm", "method": "lwo", "lwo": {"lr": 1e-3}, "steps": 93, "seed": 0}

besides `rank` of lora. Several processes may work on one list: each takes the next run. A finished
run is never repeated. Runs of a source and seed see the same sequences in the same order.
"""

from __future__ import annotations

import argparse
import copy
import fcntl
import json
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import lwo_dist
from lwo_dist.config import Config, LWOConfig
from lwo_dist.models.flops import flops_per_sequence, update_flops
from lwo_dist.orthogonal import ITERATIONS
from lwo_dist.registry import METHODS

LENGTH = 512
SEQUENCES = 8
"""Of a step."""
WARMUP = 4
SCORED = 96
"""Held-out sequences."""
TAKEN_FROM = 128
"""Lines are scored that begin at this token of their sequence or later."""
RANK = 16
MUON = 5
"""Iterations of the runs that do not say how many."""


# ---- data


def prepare(model: Path, target: Path, sources: Sequence[Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(*_place(model), **_gguf(model))
    data = {}
    for source in sources:
        files = sorted(source.rglob("*.py"))
        random.Random(0).shuffle(files)
        texts = dict.fromkeys(file.read_text(errors="replace") for file in files)
        usable = [text for text in texts if 200 < len(text) < 200_000]
        held = max(1, len(usable) // 8)
        generator = torch.Generator().manual_seed(0)
        scored, lines = _windows(tokenizer, usable[:held])
        chosen = torch.randperm(len(scored), generator=generator)[:SCORED]
        train, _ = _windows(tokenizer, usable[held:])
        data[source.name] = {"train": train, "held": scored[chosen], "lines": lines[chosen]}
        print(f"{source.name}: {len(train)} sequences to train on, {len(chosen)} held out")
    torch.save(data, target)


def _windows(tokenizer: Any, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Token ids, and of each token the number of the line that it is part of; -1: not scored."""
    ids: list[int] = []
    lines: list[int] = []
    for text in texts:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        starts = [0]
        for line in text.splitlines(keepends=True):
            starts.append(starts[-1] + len(line))
        number = 0
        for token, (start, end) in zip(encoded.input_ids, encoded.offset_mapping, strict=True):
            while number + 1 < len(starts) - 1 and starts[number + 1] <= start:
                number += 1
            content = text[start:end].strip() != ""
            full = sum(map(str.isalnum, text[starts[number] : starts[number + 1]])) >= 3
            ids.append(token)
            lines.append(number if content and full else -1)
        ids.append(tokenizer.eos_token_id)
        lines.append(-1)
    number = len(ids) // LENGTH
    shape = (number, LENGTH)
    return (
        torch.tensor(ids[: number * LENGTH], dtype=torch.int32).view(shape),
        torch.tensor(lines[: number * LENGTH], dtype=torch.int32).view(shape),
    )


def _place(model: Path) -> tuple[str]:
    return (str(model.parent if model.suffix == ".gguf" else model),)


def _gguf(model: Path) -> dict[str, str]:
    return {"gguf_file": model.name} if model.suffix == ".gguf" else {}


# ---- runs


def train(run: dict[str, Any], base: Any, data: dict[str, Tensor], device: str) -> dict[str, Any]:
    torch.manual_seed(run["seed"])
    model = copy.deepcopy(base)
    method = METHODS.get(run["method"])
    method.prepare(model, Config(lora=_lora(run)))
    model.to(device).train()
    settings = {"steps_per_layer": 1, "order": "random", "state": "keep"}
    if run["method"] != "lwo":
        settings = {}
    config = LWOConfig(
        **{**settings, "warmup_steps": WARMUP, **run["lwo"]},
        seed=run["seed"],
        max_steps=run["steps"],
    )
    lwo = lwo_dist.attach(model, config, method)
    order = _order(len(data["train"]), run["steps"] * SEQUENCES, run["seed"])
    curve, seconds = [], []
    for step in range(run["steps"]):
        began = time.perf_counter()
        ids = data["train"][order[step * SEQUENCES :][:SEQUENCES]].long().to(device)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = lwo_dist.causal_lm_loss(lwo.model, {"input_ids": ids, "labels": ids})
        lwo.backward(loss)
        lwo.step()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
        if (step + 1) % max(1, run["steps"] // 6) == 0 or step + 1 == run["steps"]:
            loss_now, exact = score(lwo.model, data, device)
            curve.append([step + 1, round(loss_now, 4), round(exact, 2)])
    memory = lwo.memory()
    return {
        **run,
        "loss": curve[-1][1],
        "exact": curve[-1][2],
        "curve": curve,
        "iterations": ITERATIONS,
        "ms": round(1000 * statistics.median(seconds), 1),
        "optimizer_state_bytes": memory["optimizer_state_bytes"],
        "gradient_bytes": memory["gradient_bytes"],
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    }


def _lora(run: dict[str, Any]) -> dict[str, Any]:
    rank = run.get("rank", RANK)
    return {"rank": rank, "alpha": 2 * rank}


def _order(number: int, wanted: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    epochs = [torch.randperm(number, generator=generator) for _ in range(-(-wanted // number))]
    return torch.cat(epochs)


@torch.no_grad()
def score(model: Any, data: dict[str, Tensor], device: str) -> tuple[float, float]:
    """(loss in nats a token, % of lines of which every token is the likeliest).

    Given the true tokens before it, a line of which each token is the likeliest is what greedy
    decoding writes.
    """
    model.eval()
    total, right, asked = 0.0, 0, 0
    for ids, lines in zip(data["held"].split(8), data["lines"].split(8), strict=True):
        tokens = ids.long().to(device)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            logits = model(input_ids=tokens).logits[:, :-1].float()
        targets = tokens[:, 1:]
        losses = torch.nn.functional.cross_entropy(logits.mT, targets, reduction="none")
        total += losses.mean(1).sum().item()
        hits = (logits.argmax(-1) == targets).cpu()
        for row, numbers in zip(hits, lines[:, 1:], strict=True):
            begun = {int(n) for n in numbers[: TAKEN_FROM - 1]} | {int(numbers[-1]), -1}
            by_line = defaultdict(list)
            for hit, number in zip(row.tolist(), numbers.tolist(), strict=True):
                if number not in begun:
                    by_line[number].append(hit)
            asked += len(by_line)
            right += sum(all(found) for found in by_line.values())
    model.train()
    return total / len(data["held"]), 100 * right / max(1, asked)


def taken(results: Path, runs: Sequence[dict[str, Any]], until: float) -> Iterator[dict[str, Any]]:
    """Runs that no other process has taken; at the end it says how many others have."""
    claims = results.with_suffix(".claims")
    elsewhere = 0
    for run in runs:
        key = json.dumps(run, sort_keys=True)
        if time.time() > until:
            return
        with claims.open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            if key in file.read().splitlines():
                elsewhere += 1
                continue
            file.write(key + "\n")
        yield run
    if elsewhere:
        print(
            f"{elsewhere} runs have no result yet and are another process's; if there is none,"
            f" remove {claims} and start again"
        )


def run_all(model: Path, data: Path, runs: Path, results: Path, device: str, until: float) -> None:
    known = {_key(json.loads(line)) for line in _lines(results)}
    todo = [
        run
        for run in map(json.loads, _lines(runs))
        if _key({**run, "iterations": ITERATIONS}) not in known
    ]
    sources = torch.load(data)
    base = AutoModelForCausalLM.from_pretrained(*_place(model), **_gguf(model), dtype=torch.float32)
    base.config.use_cache = False
    for run in taken(results, todo, until):
        found = train(run, base, sources[run["source"]], device)
        with results.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(json.dumps(found) + "\n")
        print(json.dumps(found), flush=True)


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line] if path.exists() else []


def _key(run: dict[str, Any]) -> str:
    named = {key: run.get(key) for key in ("source", "method", "rank", "lwo", "steps", "seed")}
    return json.dumps({**named, "iterations": _iterations(run)}, sort_keys=True)


def _iterations(run: dict[str, Any]) -> int:
    """Of orthogonalise; 0 where nothing is orthogonalised."""
    if run["lwo"].get("stateless", "none") == "none":
        return 0
    return int(run.get("iterations", MUON))


# ---- the table


def table(model: Path, results: Path) -> None:
    """A row for each source, recipe, length and rate; means over the seeds."""
    base = AutoModelForCausalLM.from_pretrained(*_place(model), **_gguf(model), dtype=torch.float32)
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for run in map(json.loads, _lines(results)):
        groups[_key({**run, "seed": None})].append(run)
    flops: dict[str, float] = {}
    print("| source | recipe | steps | TFLOP | seeds | loss | lines right, % | ms a step |")
    print("|---|---|---|---|---|---|---|---|")
    for runs in groups.values():
        run = runs[0]
        recipe = _recipe(run)
        if recipe not in flops:
            flops[recipe] = flops_of_step(run, base)
        losses = [each["loss"] for each in runs]
        spread = f" ({min(losses):.3f} to {max(losses):.3f})" if len(losses) > 1 else ""
        print(
            f"| {run['source']} | {recipe} | {run['steps']} |"
            f" {run['steps'] * flops[recipe] / 1e12:,.0f} | {len(runs)} |"
            f" {statistics.fmean(losses):.3f}{spread} |"
            f" {statistics.fmean(each['exact'] for each in runs):.1f} |"
            f" {statistics.median(each['ms'] for each in runs):.0f} |"
        )


def picture(model: Path, results: Path) -> None:
    """`recipes.png` beside the results: held-out loss over operations, a panel for each source."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    base = AutoModelForCausalLM.from_pretrained(*_place(model), **_gguf(model), dtype=torch.float32)
    runs = [json.loads(line) for line in _lines(results)]
    sources = [
        name for name in dict.fromkeys(run["source"] for run in runs) if _compares(name, runs)
    ]
    figure, panels = pyplot.subplots(1, len(sources), figsize=(6.5 * len(sources), 4.8))
    flops: dict[str, float] = {}
    colours = {"lora": "tab:orange", "full": "tab:grey", "lwo": "tab:blue"}
    styles = ("-", "--", ":", "-.")
    for panel, source in zip([panels] if len(sources) == 1 else panels, sources, strict=True):
        drawn: dict[str, int] = defaultdict(int)
        for run in sorted(runs, key=lambda run: -run["loss"]):
            if run["source"] != source:
                continue
            recipe = _recipe(run)
            if recipe not in flops:
                flops[recipe] = flops_of_step(run, base)
            steps, losses = zip(*((step, loss) for step, loss, _ in run["curve"]), strict=True)
            work = [step * flops[recipe] / 1e12 for step in steps]
            drawn[run["method"]] += 1
            panel.plot(
                work,
                losses,
                color=colours[run["method"]],
                linestyle=styles[drawn[run["method"]] % len(styles)],
                marker="o",
                markevery=[-1],
                label=f"{recipe}; {run['steps']} steps: {losses[-1]:.3f}",
            )
        panel.set(title=source, xlabel="TFLOP", ylabel="held-out loss, nats a token")
        panel.set_xlim(left=0)
        panel.legend(fontsize=7, frameon=False)
        panel.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(results.with_suffix(".png"), dpi=130)


def _compares(source: str, runs: Sequence[dict[str, Any]]) -> bool:
    return len({run["method"] for run in runs if run["source"] == source}) > 1


def _recipe(run: dict[str, Any]) -> str:
    rank = f" r {run['rank']}" if "rank" in run else ""
    settings = ", ".join(f"{key} {value}" for key, value in run["lwo"].items())
    if _iterations(run):
        settings += f", {_iterations(run)} iterations"
    return f"{run['method']}{rank}: {settings}"


def flops_of_step(run: dict[str, Any], base: Any) -> float:
    """Of a step's matrix products and attention; and of the orthogonalisation, by as many
    iterations as the run took.
    """
    model = copy.deepcopy(base).to("meta")
    method = METHODS.get(run["method"])
    method.prepare(model, Config(lora=_lora(run)))
    config = LWOConfig(**run["lwo"])
    visits = method.cycle(method.layers(model, config), config)
    forward_and_backward = flops_per_sequence(model, visits, LENGTH, LENGTH - 1)
    orthogonalised = update_flops(model, visits) * _iterations(run) / ITERATIONS
    return SEQUENCES * forward_and_backward + orthogonalised


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("command", choices=("prepare", "run", "table", "picture"))
    parser.add_argument("sources", type=Path, nargs="*", metavar="SOURCE")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--list", type=Path)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--until", type=float, default=float("inf"), help="start no run after it")
    given = parser.parse_intermixed_args(argv)
    if given.command == "prepare":
        prepare(given.model, given.data, given.sources)
    elif given.command == "run":
        run_all(given.model, given.data, given.list, given.results, given.device, given.until)
    elif given.command == "table":
        table(given.model, given.results)
    else:
        picture(given.model, given.results)


if __name__ == "__main__":
    main()
