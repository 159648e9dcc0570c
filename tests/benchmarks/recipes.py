"""Which recipe learns most from the same tokens: held-out loss of short runs through the hook.

    python tests/benchmarks/recipes.py prepare --model MODEL --data FILE.pt SOURCE...
    python tests/benchmarks/recipes.py run --model MODEL --data FILE.pt --list RUNS.jsonl \
        --results FILE.jsonl
    python tests/benchmarks/recipes.py table --model MODEL --results FILE.jsonl
    python tests/benchmarks/recipes.py intervals --results FILE.jsonl
    python tests/benchmarks/recipes.py tokens --results FILE.jsonl
    python tests/benchmarks/recipes.py picture --model MODEL --results FILE.jsonl
    python tests/benchmarks/recipes.py time --model MODEL --data FILE.pt --list RUNS.jsonl

MODEL is a folder or a GGUF file; a SOURCE is a folder whose name names it, split by file. A line of
the list is a run:

    {"source": "forgelm", "method": "lwo", "lwo": {"lr": 1e-3}, "steps": 93, "seed": 0}

besides `rank` of lora, `points` of the curve, and `"write": false` to write no lines.
Several processes may work on one list: each takes the next run. A finished run is never repeated.
Runs of a source and seed see the same sequences in the same order. `tokens` shows the loss by how
often a run has trained on a token. `time` takes 24 steps of each run, in turn, and prints the
median. Keep the device free of other work.
"""

from __future__ import annotations

import argparse
import copy
import fcntl
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import compress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from lwo_dist.config import Config, LWOConfig
from lwo_dist.models.flops import flops_per_sequence, update_flops
from lwo_dist.orthogonal import ITERATIONS
from lwo_dist.registry import METHODS
from lwo_dist.tasks.intervals import paired_interval
from tests.benchmarks import recipe_runs
from tests.benchmarks.recipe_runs import Training, load, lora_settings, prepare, train

MUON = 5
"""Iterations of the runs that do not say how many."""
TURNS = 24
"""Steps of each run that `time` takes."""
UNTIMED = 4
"""Of these, the first ones, which warm up."""
OF_SEQUENCES = ("losses", "hits")
"""Keys of a result that hold one value per held-out sequence."""


# ---- runs


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
    sources = torch.load(data)
    known = {_key(json.loads(line)) for line in _lines(results)}
    todo = []
    for run in map(json.loads, _lines(runs)):
        length = sources[run["source"]]["train"].shape[1]
        if _key({**run, "iterations": ITERATIONS, "length": length}) not in known:
            todo.append(run)
    base, tokenizer = load(model)
    for run in taken(results, todo, until):
        found = train(run, base, sources[run["source"]], device, tokenizer)
        with results.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(json.dumps(found) + "\n")
        shown = {key: value for key, value in found.items() if key not in OF_SEQUENCES}
        print(json.dumps(shown), flush=True)


def time_all(model: Path, data: Path, runs: Path, device: str) -> None:
    """Print the median step time of each run. They take turns, so that what disturbs the machine
    disturbs all.
    """
    sources = torch.load(data)
    base, _ = load(model)
    contenders = [
        (run, Training({**run, "steps": TURNS}, base, sources[run["source"]]["train"], device))
        for run in map(json.loads, _lines(runs))
    ]
    for turn in range(TURNS):
        for _, training in contenders[:: -1 if turn % 2 else 1]:
            training.step()
    medians = [statistics.median(t.seconds[UNTIMED:]) for _, t in contenders]
    print("| recipe | ms a step | of the first | fastest, slowest |")
    print("|---|---|---|---|")
    for (run, training), own in zip(contenders, medians, strict=True):
        low, high = (1000 * pick(training.seconds[UNTIMED:]) for pick in (min, max))
        print(
            f"| {_recipe({**run, 'iterations': ITERATIONS})} | {1000 * own:.1f} |"
            f" {own / medians[0]:.2f} | {low:.1f}, {high:.1f} |"
        )


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line] if path.exists() else []


def _key(run: dict[str, Any]) -> str:
    named = {key: run.get(key) for key in ("source", "method", "rank", "lwo", "steps", "seed")}
    if "precision" in run:
        named["precision"] = run["precision"]
    return json.dumps(
        {**named, "length": _length(run), "iterations": _iterations(run)}, sort_keys=True
    )


def _length(run: dict[str, Any]) -> int:
    """Tokens of a sequence."""
    return int(run.get("length", recipe_runs.LENGTH))


def _iterations(run: dict[str, Any]) -> int:
    """Of orthogonalise; 0 where nothing is orthogonalised."""
    if run["lwo"].get("stateless", "none") == "none":
        return 0
    return int(run.get("iterations", MUON))


# ---- the table


def table(model: Path, results: Path) -> None:
    """A row for each source, recipe, length and rate; means over the seeds."""
    base, _ = load(model)
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for run in map(json.loads, _lines(results)):
        groups[_key({**run, "seed": None})].append(run)
    flops: dict[tuple[str, int], float] = {}
    print("| source | recipe | steps | TFLOP | seeds | loss | lines right, % | BLEU | ms a step |")
    print("|---|---|---|---|---|---|---|---|---|")
    for runs in groups.values():
        run = runs[0]
        recipe = _recipe(run)
        if (recipe, _length(run)) not in flops:
            flops[recipe, _length(run)] = flops_of_step(run, base)
        losses = [each["loss"] for each in runs]
        spread = f" ({min(losses):.3f} to {max(losses):.3f})" if len(losses) > 1 else ""
        print(
            f"| {run['source']} | {recipe} | {run['steps']} |"
            f" {run['steps'] * flops[recipe, _length(run)] / 1e12:,.0f} | {len(runs)} |"
            f" {statistics.fmean(losses):.3f}{spread} |"
            f" {statistics.fmean(each['exact'] for each in runs):.1f} |"
            f" {_mean_bleu(runs)} |"
            f" {statistics.median(each['ms'] for each in runs):.0f} |"
        )


def _mean_bleu(runs: Sequence[dict[str, Any]]) -> str:
    scores = [run["bleu"] for run in runs if "bleu" in run]
    return f"{statistics.fmean(scores):.1f}" if scores else ""


def intervals(results: Path) -> None:
    """Compare every other recipe with the best run (rate and length) of each LoRA rank: means over
    shared seeds, with paired 95 % intervals over the held-out sequences.
    """
    by_source: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for run in map(json.loads, _lines(results)):
        if all(name in run for name in OF_SEQUENCES):
            by_source[run["source"]][_key({**run, "seed": None})].append(run)
    print(
        "| source | recipe | steps | against | seeds | loss lower by | lines right, points more |"
    )
    print("|---|---|---|---|---|---|---|")
    for source, groups in by_source.items():
        best: dict[int, list[dict[str, Any]]] = {}
        for runs in groups.values():
            rank = runs[0].get("rank", recipe_runs.RANK)
            if runs[0]["method"] == "lora" and (
                rank not in best or _mean_loss(runs) < _mean_loss(best[rank])
            ):
                best[rank] = runs
        for runs in groups.values():
            for reference in best.values():
                if runs[0]["method"] != "lora":
                    _tell_interval(source, reference, runs)


def tokens(results: Path) -> None:
    """Held-out loss by how often the run has trained on a token; means over the seeds.

    The classes depend on the steps: compare runs of the same steps and seeds only.
    """
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for run in map(json.loads, _lines(results)):
        if "by_count" in run:
            groups[_key({**run, "seed": None})].append(run)
    classes = [f"from {least}" for least in recipe_runs.COUNTS]
    print(f"| source | recipe | steps | seeds | all | {' | '.join(classes)} |")
    print(f"|---|---|---|---|---|{'---|' * len(classes)}")
    for runs in groups.values():
        means = []
        for class_of_each in zip(*(run["by_count"] for run in runs), strict=True):
            losses = [loss for _, _, loss in class_of_each if loss is not None]
            means.append(f"{statistics.fmean(losses):.3f}" if losses else "")
        print(
            f"| {runs[0]['source']} | {_recipe(runs[0])} | {runs[0]['steps']} | {len(runs)} |"
            f" {_mean_loss(runs):.3f} | {' | '.join(means)} |"
        )


def _mean_loss(runs: Sequence[dict[str, Any]]) -> float:
    return statistics.fmean(run["loss"] for run in runs)


def _tell_interval(
    source: str, reference: Sequence[dict[str, Any]], runs: Sequence[dict[str, Any]]
) -> None:
    seeds = {run["seed"] for run in reference} & {run["seed"] for run in runs}
    if not seeds:
        return
    theirs, ours = ([run for run in side if run["seed"] in seeds] for side in (reference, runs))
    better, low, high = paired_interval(_mean_losses(ours), _mean_losses(theirs))
    lines = list(map(len, ours[0]["hits"]))
    before, after = (list(compress(_lines_right(side), lines)) for side in (theirs, ours))
    more, least, most = paired_interval(before, after, list(filter(None, lines)))
    print(
        f"| {source} | {_recipe(runs[0])} | {runs[0]['steps']} |"
        f" {_recipe(reference[0])}; {reference[0]['steps']} steps | {len(seeds)} |"
        f" {better:+.3f} ({low:+.3f} to {high:+.3f}) | {more:+.2f} ({least:+.2f} to {most:+.2f}) |"
    )


def _mean_losses(runs: Sequence[dict[str, Any]]) -> list[float]:
    """Of each sequence."""
    return [statistics.fmean(losses) for losses in zip(*(r["losses"] for r in runs), strict=True)]


def _lines_right(runs: Sequence[dict[str, Any]]) -> list[float]:
    """Of each sequence, in %."""
    joined = map("".join, zip(*(run["hits"] for run in runs), strict=True))
    return [100 * hits.count("1") / max(1, len(hits)) for hits in joined]


def picture(model: Path, results: Path) -> None:
    """`recipes.png` beside the results: held-out loss over operations, a panel for each source."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    base, _ = load(model)
    runs = [json.loads(line) for line in _lines(results)]
    sources = [
        name for name in dict.fromkeys(run["source"] for run in runs) if _compares(name, runs)
    ]
    figure, panels = pyplot.subplots(1, len(sources), figsize=(6.5 * len(sources), 4.8))
    flops: dict[tuple[str, int], float] = {}
    colours = {"lora": "tab:orange", "full": "tab:grey", "lwo": "tab:blue"}
    styles = ("-", "--", ":", "-.")
    for panel, source in zip([panels] if len(sources) == 1 else panels, sources, strict=True):
        drawn: dict[str, int] = defaultdict(int)
        for run in sorted(runs, key=lambda run: -run["loss"]):
            if run["source"] != source:
                continue
            recipe = _recipe(run)
            if (recipe, _length(run)) not in flops:
                flops[recipe, _length(run)] = flops_of_step(run, base)
            steps, losses = zip(*((step, loss) for step, loss, _ in run["curve"]), strict=True)
            work = [step * flops[recipe, _length(run)] / 1e12 for step in steps]
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
    if "precision" in run:
        settings += f", {run['precision']}"
    return f"{run['method']}{rank}: {settings}"


def flops_of_step(run: dict[str, Any], base: Any) -> float:
    """Of a step's matrix products and attention; and of the orthogonalisation, by as many
    iterations as the run took.
    """
    model = copy.deepcopy(base).to("meta")
    method = METHODS.get(run["method"])
    method.prepare(model, Config(lora=lora_settings(run)))
    config = LWOConfig(**recipe_runs.settings_of(run))
    visits = method.cycle(method.layers(model, config), config)
    length = _length(run)
    forward_and_backward = flops_per_sequence(model, visits, length, length - 1)
    orthogonalised = update_flops(model, visits) * _iterations(run) / ITERATIONS
    return recipe_runs.SEQUENCES * forward_and_backward + orthogonalised


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = ("prepare", "run", "table", "intervals", "tokens", "picture", "time")
    parser.add_argument("command", choices=commands)
    parser.add_argument("sources", type=Path, nargs="*", metavar="SOURCE")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument(
        "--length", type=int, default=recipe_runs.LENGTH, help="prepare: tokens of a sequence"
    )
    parser.add_argument("--list", type=Path)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--until", type=float, default=float("inf"), help="start no run after it")
    given = parser.parse_intermixed_args(argv)
    if given.model is None and given.command not in ("intervals", "tokens"):
        parser.error(f"{given.command} needs --model")
    if given.command == "prepare":
        prepare(given.model, given.data, given.sources, given.length)
    elif given.command == "run":
        run_all(given.model, given.data, given.list, given.results, given.device, given.until)
    elif given.command == "time":
        time_all(given.model, given.data, given.list, given.device)
    elif given.command == "table":
        table(given.model, given.results)
    elif given.command == "intervals":
        intervals(given.results)
    elif given.command == "tokens":
        tokens(given.results)
    else:
        picture(given.model, given.results)


if __name__ == "__main__":
    main()
