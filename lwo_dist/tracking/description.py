"""The description of a run on its page in MLflow, in Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lwo_dist.redaction import redact
from lwo_dist.run_info import RunInfo, model_name, source_name
from lwo_dist.tasks.scores import ScoreSheet
from lwo_dist.units import human_seconds

__all__ = ["RUN_ID", "describe_result", "describe_start", "is_encoder_decoder"]

RUN_ID = "<run id>"
"""Stands for MLflow's id of the run, which only the store knows."""


def describe_start(info: RunInfo) -> str:
    """What is tuned, on what and how."""
    config = info.config
    sheet = ScoreSheet.read(info.task_record, ())
    part = (
        "all"
        if info.trained_parameters == info.parameters
        else f"{info.trained_parameters:,} of its"
    )
    layers = f"{len(info.layers)} layers" if len(info.layers) > 1 else "one layer"
    text = (
        f"Tunes **{model_name(config)}** on **{source_name(config)}** (task `{config.task}`) with"
        f" method `{config.method}` and strategy `{config.strategy}` on {info.world_size} x"
        f" {info.device}: {part} {info.parameters:,} parameters in {layers},"
        f" {config.train.steps:,} steps of {config.train.global_batch_size} sequences, scored on"
        f" {info.held_out_examples:,} held-out {sheet.example[1]}."
    )
    return redact(text)


def describe_result(
    info: RunInfo, summary: Mapping[str, Any], store: str, model: str | None
) -> str:
    """The scores, `describe_start`, how to load the model, and the model card if there is one.

    MLflow shows the first lines and hides the rest, so the scores come first.

    Args:
        store: MLflow's tracking URI, without credentials.
        model: the name of the exported model among the run's models; None: it is not logged.
    """
    parts = [describe_start(info)]
    if scores := summary.get("eval"):
        parts = [
            _scores(info, scores),
            f"{parts[0]} Trained in {human_seconds(summary['training_seconds'])}, at"
            f" {summary['tokens_per_second']:,.0f} tokens/s.",
        ]
    if model is not None:
        # transformers 5 has no pipeline from text to text.
        encodes = is_encoder_decoder(info.run_dir / "model")
        name, more = ("parts", ', return_type="components"') if encodes else ("pipeline", "")
        parts.append(
            "```python\nimport mlflow\n\n"
            f'mlflow.set_tracking_uri("{store}")\n'
            f'{name} = mlflow.transformers.load_model("runs:/{RUN_ID}/{model}"{more})\n```'
        )
    card = info.run_dir / "model" / "README.md"
    if card.is_file():
        parts.append(f"---\n\n{_body(card)}")
    return redact("\n\n".join(parts))


def is_encoder_decoder(folder: Path) -> bool:
    """Whether an exported model is one; False without its config.json."""
    path = folder / "config.json"
    return path.is_file() and bool(json.loads(path.read_text()).get("is_encoder_decoder"))


def _scores(info: RunInfo, scores: Mapping[str, Any]) -> str:
    """A list, as MLflow sets the columns of a table without a space between them."""
    before, after, gains = scores["before"], scores["after"], scores["gain_95"]
    sheet = ScoreSheet.read(scores, after).within(before, after)
    many = sheet.example[1]
    lines = [
        f"**{model_name(info.config)}** before and after step {scores['best_step']}, on"
        f" {after[sheet.count_key]:.0f} held-out {many} of **{source_name(info.config)}**:",
        "",
    ]
    for score in sorted(sheet.scores, key=lambda score: not score.headline):
        start, end = (score.show(values[score.key]) for values in (before, after))
        line = f"- {score.label}: {start} to **{end}** {score.unit}".rstrip()
        if score.name in gains:
            mean, low, high = (
                score.show(gains[score.name][name], sign="+") for name in ("mean", "low", "high")
            )
            line += f", gain {mean} (95 % interval {low} to {high})"
        lines.append(line)
    return "\n".join(lines)


def _body(card: Path) -> str:
    """A model card without its YAML header."""
    text = card.read_text(errors="replace")
    if text.startswith("---\n"):
        _, _, text = text.removeprefix("---\n").partition("\n---\n")
    return text.strip()
