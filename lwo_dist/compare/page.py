"""comparison.md: what a comparison found, for people, in Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lwo_dist.units import human_bytes, human_count, human_seconds

__all__ = ["comparison_page", "verdicts"]

_PURPOSES = {
    "equal_steps": "At equal steps",
    "equal_time": "At equal training time",
}
_DIGITS = 3


def comparison_page(found: Mapping[str, Any], pictures: Sequence[str]) -> str:
    """The page of a comparison (`compare.Comparison` as a mapping)."""
    design = found["design"]
    lines = [f"# {design['name']}: {', '.join(design['methods'])}", ""]
    if not found["complete"]:
        lines += ["**Not complete yet.** The same command resumes it.", ""]
    lines += [f"- {verdict}" for verdict in verdicts(found)]
    lines += ["", *_setup(found)]
    for task, readings in found["readings"].items():
        lines += ["", f"## {task}", ""]
        lines += [f"![{task}]({name})" for name in pictures if name == f"comparison-{task}.png"]
        if not readings["equal_steps"]:
            lines += ["No run has finished."]
        for purpose, title in _PURPOSES.items():
            if readings[purpose]:
                lines += ["", f"### {title}", ""]
                lines += _scores(found, task, purpose)
                lines += _differences(found, task, purpose)
                lines += ["", *_costs(found, task, purpose)]
                lines += _never_trained(readings[purpose])
        if readings["equal_steps"]:
            lines += _examples(found, task)
        lines += ["", "### Learning rates", "", *_sweep(found, task)]
    lines += ["", *_failures(found), *_how_to_read(found)]
    return "\n".join(lines).rstrip() + "\n"


def verdicts(found: Mapping[str, Any]) -> list[str]:
    """One sentence for each task, way of comparing, and method other than the reference."""
    reference = found["design"]["reference"]
    sentences = []
    for task, readings in found["readings"].items():
        base = readings["equal_steps"].get(reference)
        for purpose, title in _PURPOSES.items():
            for method, reading in readings[purpose].items():
                if base is None or method == reference:
                    continue
                labels = reading["mean"]["labels"]
                parts = [
                    f"{labels.get(name, name)} {_judged(gain)}"
                    for name, gain in reading["against"].items()
                ]
                share = reading["mean"]["training_seconds"] / base["mean"]["training_seconds"]
                sentences.append(
                    f"**{task}**, {title[0].lower()}{title[1:]}: {method} against {reference}:"
                    f" {', '.join(parts)}; in {100 * share:.0f} % of its training time."
                )
    return sentences


def _judged(gain: Mapping[str, float]) -> str:
    word = (
        "**better**"
        if gain["low"] > 0
        else "**worse**"
        if gain["high"] < 0
        else "no clear difference"
    )
    return f"{gain['mean']:+.3g} ({gain['low']:+.3g} to {gain['high']:+.3g}, {word})"


def _setup(found: Mapping[str, Any]) -> list[str]:
    design, config = found["design"], found["design"]["config"]
    train = config["train"]
    seeds, rates = design["seeds"], design["rates"]
    rate = (
        f" The learning rate was given: {rates[0]:g} for every method."
        if len(rates) == 1
        else f" Its learning rate is the best of the same search ({design['sweep_steps']} steps a"
        " try), on validation files that no score below uses."
    )
    return [
        "```bash",
        found["command"],
        "```",
        "",
        f"Model {str(config['model']['name']).rstrip('/').rpartition('/')[2]};"
        f" {train['steps']} steps of"
        f" {train['global_batch_size']} sequences of {train['sequence_length']} tokens; strategy"
        f" {config['strategy']}, {_workers(found)};"
        f" seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}."
        " Every method starts from the same weights and sees the same batches." + rate,
    ]


def _workers(found: Mapping[str, Any]) -> str:
    row = next((row for row in found["rows"] if row["status"] == "done"), None)
    return f"{row['world_size']} x {row['device']}" if row else "no finished run"


def _scores(found: Mapping[str, Any], task: str, purpose: str) -> list[str]:
    by_method = found["readings"][task][purpose]
    names = _names(by_method)
    first = next(iter(by_method.values()))["mean"]
    headings = first["headings"]
    table = [
        [
            f"{first['examples']} held-out {first['count']}",
            *(headings.get(name, name) for name in names),
        ]
    ]
    if purpose == "equal_steps":
        untuned = next(
            row["before"]
            for row in found["rows"]
            if row["task"] == task and row["status"] == "done"
        )
        table.append(["untuned", *(_number(untuned.get(name)) for name in names)])
    for method, reading in by_method.items():
        mean, low, high = (reading["mean"][key] for key in ("scores", "low", "high"))
        several = reading["mean"]["seeds"] > 1
        cells = [
            f"{_number(mean[name])} ({_number(low[name])} to {_number(high[name])})"
            if several
            else _number(mean[name])
            for name in names
        ]
        table.append([method, *cells])
    return _table(table)


def _differences(found: Mapping[str, Any], task: str, purpose: str) -> list[str]:
    reference = found["design"]["reference"]
    others = {
        method: reading["against"]
        for method, reading in found["readings"][task][purpose].items()
        if reading["against"]
    }
    if not others:
        return []
    names = list(next(iter(others.values())))
    headings = next(iter(found["readings"][task][purpose].values()))["mean"]["headings"]
    table = [[f"better than {reference} by", *(headings.get(name, name) for name in names)]]
    table += [
        [method, *(_judged(against[name]) for name in names)] for method, against in others.items()
    ]
    return ["", *_table(table)]


def _names(by_method: Mapping[str, Any]) -> list[str]:
    """The scores, without the number of examples."""
    mean = next(iter(by_method.values()))["mean"]
    return [name for name in mean["scores"] if name != mean["count"]]


def _costs(found: Mapping[str, Any], task: str, purpose: str) -> list[str]:
    readings = found["readings"][task]
    reference = found["design"]["reference"]
    base = readings["equal_steps"].get(reference, {}).get("mean")
    head = ["", "learning rate", "steps", "training time", "a step", "FLOPs a step", "peak memory"]
    head += ["optimizer state", "sent a step", "to serve", f"time to {reference}'s lowest loss"]
    table = [head]
    for method, reading in readings[purpose].items():
        mean = reading["mean"]

        def against(name: str, mean: Mapping[str, Any] = mean) -> str:
            if base is None or not base[name] or mean[name] is None:
                return ""
            return f" ({mean[name] / base[name]:.2f}x)"

        seconds = reading["time_to_loss"]
        table.append(
            [
                method,
                f"{mean['lr']:g}",
                str(mean["steps"]),
                human_seconds(mean["training_seconds"]) + against("training_seconds"),
                f"{1000 * mean['step_seconds']:.0f} ms" + against("step_seconds"),
                "not counted"
                if mean["flops_per_step"] is None
                else human_count(mean["flops_per_step"]) + against("flops_per_step"),
                human_bytes(mean["peak_memory_bytes"]),
                human_bytes(mean["optimizer_state_bytes"]),
                human_bytes(mean["bytes_sent_per_step"]),
                human_bytes(mean["serve_bytes"]),
                "not reached" if seconds is None else human_seconds(seconds),
            ]
        )
    return _table(table)


def _never_trained(by_method: Mapping[str, Any]) -> list[str]:
    return [
        f"\n{method}: {len(names)} of its layers never trained in {reading['mean']['steps']} steps;"
        " its scores are those of a run that is too short for it."
        for method, reading in by_method.items()
        if (names := reading["mean"]["never_trained"])
    ]


def _examples(found: Mapping[str, Any], task: str) -> list[str]:
    """What was read and what was left out, by reason."""
    row = next(row for row in found["rows"] if row["task"] == task and row["status"] == "done")
    numbers = [
        f"{count:,} {name.replace('_', ' ')}"
        for name, count in row["data"].items()
        if isinstance(count, int)
    ]
    skipped = [f"{count:,} {reason}" for reason, count in row["data"].get("skipped", {}).items()]
    left_out = f" Skipped: {', '.join(skipped)}." if skipped else ""
    return ["", f"Examples: {', '.join(numbers)}.{left_out}"]


def _sweep(found: Mapping[str, Any], task: str) -> list[str]:
    table = [["", "learning rate: validation loss", "chosen"]]
    for method, chosen in found["rates"].get(task, {}).items():
        tries = sorted(
            (row["lr"], row["scores"]["loss"] if row["status"] == "done" else math.nan)
            for row in found["sweep"]
            if row["task"] == task and row["method"] == method
        )
        shown = ", ".join(
            f"{lr:g}: {loss:.4f}" if math.isfinite(loss) else f"{lr:g}: failed"
            for lr, loss in tries
        )
        table.append(
            [method, shown or "given", "none" if chosen is None else f"{chosen:g}"],
        )
    return _table(table)


def _failures(found: Mapping[str, Any]) -> list[str]:
    failed = [row for row in (*found["sweep"], *found["rows"]) if row["status"] == "failed"]
    if not failed:
        return []
    table = [["run", "error"]]
    table += [[str(row["run_name"]), row["error"].replace("|", "/")] for row in failed]
    return ["## Failed runs", "", *_table(table), ""]


def _how_to_read(found: Mapping[str, Any]) -> list[str]:
    reference = found["design"]["reference"]
    equal_time = (
        f"- At equal training time a method has as many steps as fit into the time that {reference}"
        " took for its own."
    )
    return [
        "## How to read this",
        "",
        "- Scores are those of the last step on held-out files; in brackets the lowest and highest"
        " of the seeds.",
        f"- A difference is positive where the method is better than {reference}; its 95 % interval"
        " is a paired bootstrap over the held-out examples, with each example's mean over the"
        " seeds. It says nothing about other models or data.",
        *([equal_time] if found["design"]["equal_time"] else []),
        "- Training time leaves out evaluations and saves. FLOPs are counted, matrix products and"
        " attention of full sequences, not measured.",
        "- To serve: what has to be kept for each tuned model; for lora the adapter, without the"
        " base model.",
    ]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.{_DIGITS}f}"


def _table(rows: Iterable[Sequence[str]]) -> list[str]:
    head, *body = [f"| {' | '.join(row)} |" for row in rows]
    width = head.count("|") - 1
    return [head, "|" + "---|" * width, *body]
