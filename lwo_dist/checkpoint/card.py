"""The model card of an exported folder, README.md: what the model is, how to use it, its scores."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from pydantic import BaseModel, ConfigDict

from lwo_dist.errors import DamagedError, printable
from lwo_dist.files import is_plain
from lwo_dist.models import licence_of
from lwo_dist.run_info import base_name
from lwo_dist.storage import RunFolder
from lwo_dist.tasks.comparison import score_rows
from lwo_dist.tasks.scores import ScoreSheet
from lwo_dist.units import human_seconds

from .schema import STATE, reading

__all__ = ["Comparison", "model_card", "read_comparison"]

Comparison = Mapping[str, Any]
"""What summary.json says of a step's scores and the base model's: `gain_95` and `changed`."""

_MAX_SUMMARY_BYTES = 2**20
_MAX_TEXT = 200

_USAGE = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # the folder with this file, or the model's id on the Hugging Face Hub
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
prompt = tokenizer("def add(a, b):\\n", return_tensors="pt")
output = model.generate(**prompt, max_new_tokens=32, do_sample=False)
print(tokenizer.decode(output[0], skip_special_tokens=True))
```"""
_ADAPTER_USAGE = """\
```python
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

folder = "."  # the folder with this file, or its id on the Hugging Face Hub
model = AutoPeftModelForCausalLM.from_pretrained(folder)  # loads the base model too
tokenizer = AutoTokenizer.from_pretrained(model.peft_config["default"].base_model_name_or_path)
prompt = tokenizer("def add(a, b):\\n", return_tensors="pt")
output = model.generate(**prompt, max_new_tokens=32, do_sample=False)
print(tokenizer.decode(output[0], skip_special_tokens=True))
```"""
_CODE = """
The model comes with Python code of its own. Review it, then pass `trust_remote_code=True` to both
`from_pretrained` calls."""

_LIMITS = """\
Intended use: to complete text of the kind that it was tuned on, for people who may read that text,
or as a start for more tuning.

- The scores are of held-out files of the same source. Expect lower ones on other text.
- Review what it writes: it may look right and be wrong or insecure. Tuning adds no safety measures,
  and the limits of the base model remain.
- It may repeat passages of its training data. Keep it as private as that data, and respect the
  licences of what it repeats."""


def model_card(
    state: Mapping[str, Any],
    dtype: str,
    comparison: Comparison,
    *,
    has_code: bool = False,
    adapter: bool = False,
    encodes: bool = False,
) -> ModelCard:
    """The card of a checkpoint's model, or of its adapters.

    Args:
        state: the values in state.json, checked (`check_record`); its texts are not trusted.
        dtype: of the exported weights: fp32 or bf16.
        comparison: of this step; empty if unknown.
        has_code: the model needs Python code of its own.
        adapter: of the adapters, in peft's format.
        encodes: the model is an encoder-decoder.
    """
    usage = _ADAPTER_USAGE if adapter else _USAGE
    if encodes:
        usage = usage.replace("ForCausalLM", "ForSeq2SeqLM")
    about = state["run"]
    base = about.get("base_name") or base_name(about["base_model"])
    licence = about["licence"] if "licence" in about else _hub_licence(about)
    data = ModelCardData(
        base_model=base,
        license=licence,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text2text-generation" if encodes else "text-generation",
        tags=["code", "lwo_dist", about["method"]],
    )
    sections = [
        f"# {_safe(about['run_name'])}",
        f"`{_safe(base)}`, tuned on `{_safe(about['source'])}` with lwo_dist"
        f" ({_method(about['method'])}).",
        "## Usage",
        usage + (_CODE if has_code else ""),
        "## Scores",
        "\n".join(_scores(state, comparison)),
        "## Training",
        "\n".join(_training(state, base, dtype, adapter=adapter)),
        "## Intended use and limits",
        _LIMITS,
        "## Licence",
        _licence(licence),
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")


def read_comparison(run: RunFolder, step: int) -> Comparison:
    """The comparison at `step` from the run's summary.json; empty if that is missing, malformed or
    of another step.
    """
    try:
        data = run.read("summary.json", limit=_MAX_SUMMARY_BYTES)
        if data is None:
            return {}
        with reading("summary.json"):
            scores = _Summary.model_validate(json.loads(data)).eval
    except (OSError, DamagedError):
        return {}
    return scores.model_dump() if scores.best_step == step else {}


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True)


class _Gain(_Strict):
    mean: float
    low: float
    high: float


class _Change(_Strict):
    gained: int
    lost: int


class _Scores(_Strict):
    best_step: int
    gain_95: dict[str, _Gain]
    changed: dict[str, _Change] = {}


class _Summary(_Strict):
    eval: _Scores


def _scores(state: Mapping[str, Any], comparison: Comparison) -> Iterator[str]:
    """The lines of a Markdown table: before and after or, at a step without an evaluation, before
    alone.
    """
    evaluations = state["results"]["evaluations"]
    before = evaluations.get("0")
    after = evaluations.get(str(state["step"]))
    if before is None:
        yield "The base model was not evaluated."
        return
    sheet = ScoreSheet.read(state["run"], before)
    gains, changed = comparison.get("gain_95", {}), comparison.get("changed", {})
    with reading(STATE):
        rows = score_rows(sheet, before, after or before, gains, changed)
    columns = 4 if after else 2
    if not after:
        yield f"Step {state['step']} was not evaluated; these are the scores of the base model."
        yield ""
    yield _row(rows[0][:columns])
    yield _row(("---",) * columns)
    for row in rows[1:]:
        yield _row(row[:columns])
    better = [score.label for score in sheet.scores if not score.higher_is_better]
    if better:
        yield ""
        yield f"Lower is better: {', '.join(map(_safe, better))}. A positive gain is always better."


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_safe, cells))} |"


def _training(state: Mapping[str, Any], base: str, dtype: str, *, adapter: bool) -> Iterator[str]:
    about = state["run"]
    lwo = about["lwo"]
    train = about["train"]
    revision = f", revision `{_safe(about['revision'])}`" if about.get("revision") else ""
    counts = ", ".join(
        f"{value:,} {_safe(name).replace('_', ' ')}"
        for name, value in about["data"].items()
        if not name.endswith("_asked")
    )
    schedule = lwo["lr_scheduler_type"]
    if schedule == "auto":
        schedule = "linear"  # as the length of a run is known
    layers = ""
    if about["method"] == "lwo":
        layers = f", {lwo['steps_per_layer']} steps per layer, order {_safe(lwo['order'])}"
    versions = ", ".join(
        f"{_safe(name)} {_safe(version)}" for name, version in about["versions"].items()
    )
    yield f"- Base model: `{_safe(base)}`{revision}"
    yield f"- Data: task {_safe(about['task'])} on `{_safe(about['source'])}`: {counts}"
    yield (
        f"- Steps: {state['step']} of {train['global_batch_size']} sequences of up to"
        f" {train['sequence_length']} tokens, in"
        f" {human_seconds(state['results']['training_seconds'])}"
    )
    yield (
        f"- Optimizer: AdamW, learning rate {lwo['lr']:g} ({_safe(schedule)})"
        f"{layers}, compute in {_safe(train['precision'])}"
    )
    weights = "the fp32 masters"
    if about["method"] == "lora":
        lora = about["lora"]
        modules = lora["target_modules"]
        where = ", ".join(map(_safe, modules)) if modules else "all linear layers but the head"
        scale = " / sqrt(rank)" if lora["use_rslora"] else " / rank"
        yield (
            f"- Adapters: rank {lora['rank']} on {where}, scaled by {lora['alpha']:g}{scale},"
            f" dropout {lora['dropout']:g}"
        )
        weights = "the adapters in fp32"
        if not adapter:
            weights = "the base model's, with the adapters merged in fp32"
    yield f"- Weights: {weights}{', rounded to bf16' if dtype == 'bf16' else ''}"
    yield f"- Versions: {versions}"


def _method(name: str) -> str:
    if name == "lwo":
        return "layer-wise optimisation, LWO: one layer is trained at a time"
    if name == "lora":
        return "LoRA: adapters are trained, the base model is frozen"
    return f"method {_safe(name)}"


def _licence(licence: str | None) -> str:
    if licence is None:
        return (
            "The base model states no licence where it was loaded from; look there before you pass"
            " this model on."
        )
    return (
        f"That of the base model: `{_safe(licence)}`. The training data may add terms of its own."
    )


def _hub_licence(about: Mapping[str, Any]) -> str | None:
    """The licence on the hub, for checkpoints that do not record it.

    Only if the base model is a hub id: a checkpoint must not choose a local folder to read.
    """
    revision = about.get("revision")
    is_id = is_plain(about["base_model"]) and not Path(about["base_model"]).exists()
    if not is_id or (revision is not None and not is_plain(revision)):
        return None
    return licence_of(about["base_model"], revision)


def _safe(text: str) -> str:
    """`text` for a line of Markdown, where it can start no link, HTML or table cell."""
    text = printable(text[:_MAX_TEXT]).replace("`", "'")
    for character in "<|[":
        text = text.replace(character, f"&#{ord(character)};")
    return text
