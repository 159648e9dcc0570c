"""A checkpoint becomes a plain Hugging Face folder with a model card, a few tensors in memory at a
time.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import init_empty_weights
from huggingface_hub import ModelCard, ModelCardData, hf_hub_download
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from lwo_dist.models import weights
from lwo_dist.tasks.scores import ScoreSheet

from .format import INDEX, MOMENTS, STATE, Checkpoint

__all__ = ["Dtype", "export_model"]

Dtype = Literal["fp32", "bf16"]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_SHARD_BYTES = 2 * 2**30
"""A file of the export, and so what is in memory at once; a larger tensor has a file of its own."""
_NO_LICENCE = "not stated where it was loaded from; look there before you pass this model on"
_BYTES_OF = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1}


def export_model(checkpoint: Checkpoint, target: Path, *, dtype: Dtype = "fp32") -> Path:
    """Write the model of a checkpoint, with tokenizer and model card, to `target`: whole there, or
    not at all.

    Weights are the fp32 masters, rounded to bf16 if asked. Where transformers holds them fused (the
    experts of a mixture) it does the writing, and they get their published names back; the model is
    then in memory as a whole.

    Raises: OSError.
    """
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        for path in checkpoint.folder.iterdir():
            if path.name not in (STATE, INDEX, MOMENTS) and path.is_file():
                shutil.copyfile(path, temporary / path.name)
        about = checkpoint.state.get("run", {})
        files = {
            name: checkpoint.folder / reference for name, reference in checkpoint.weight_map.items()
        }
        if _is_plain(checkpoint.folder, files, about.get("trust_remote_code", False)):
            _write_shards(files, temporary, _DTYPES[dtype])
        else:
            model = AutoModelForCausalLM.from_pretrained(
                checkpoint.folder,
                dtype=_DTYPES[dtype],
                trust_remote_code=about.get("trust_remote_code", False),
            )
            model.save_pretrained(temporary)
        _set_dtype(temporary / "config.json", _DTYPES[dtype])
        if about:
            _card(checkpoint.state, about, dtype).save(temporary / "README.md")
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _is_plain(folder: Path, files: Mapping[str, Path], trust_remote_code: bool) -> bool:
    """Whether the model's tensors are published under the names that they have in memory."""
    settings = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(settings, trust_remote_code=trust_remote_code)
    model.tie_weights()
    return weights.is_direct(model, files)


def _write_shards(files: Mapping[str, Path], folder: Path, dtype: torch.dtype) -> None:
    shards, total = _plan(files, dtype)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        one = len(shards) == 1
        file_name = (
            "model.safetensors" if one else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        )
        save_file(
            {name: _read(files[name], name, dtype) for name in names},
            folder / file_name,
            {"format": "pt"},
        )
        weight_map |= dict.fromkeys(names, file_name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=1))


def _plan(files: Mapping[str, Path], dtype: torch.dtype) -> tuple[list[list[str]], int]:
    """Names by shard, and the bytes of all of them."""
    shards: list[list[str]] = [[]]
    filled, total = 0, 0
    for name, size in _sizes(files, dtype):
        if shards[-1] and filled + size > _SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled, total = filled + size, total + size
    return shards, total


def _sizes(files: Mapping[str, Path], dtype: torch.dtype) -> Iterator[tuple[str, int]]:
    for name, path in files.items():
        with safe_open(path, "pt") as file:
            view = file.get_slice(name)
            numel, kind = torch.Size(view.get_shape()).numel(), view.get_dtype()
        yield (
            name,
            numel
            * (dtype.itemsize if kind in ("F64", "F32", "F16", "BF16") else _BYTES_OF.get(kind, 8)),
        )


def _read(path: Path, name: str, dtype: torch.dtype) -> Tensor:
    with safe_open(path, "pt") as file:
        tensor = file.get_tensor(name)
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _set_dtype(path: Path, dtype: torch.dtype) -> None:
    settings = json.loads(path.read_text())
    settings.pop("torch_dtype", None)  # the key of transformers 4
    path.write_text(
        json.dumps(settings | {"dtype": str(dtype).removeprefix("torch.")}, indent=2) + "\n"
    )


def _card(state: Mapping[str, Any], about: Mapping[str, Any], dtype: Dtype) -> ModelCard:
    base, licence = about["base_model"], _licence(about["base_model"], about.get("revision"))
    data = ModelCardData(
        base_model=None if Path(base).is_absolute() else base,
        license=licence,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["code", "lwo_dist", about["method"]],
    )
    lwo, train = about["lwo"], about["train"]
    how = (
        " (layer-wise optimisation: one layer is trained at a time)"
        if about["method"] == "lwo"
        else ""
    )
    revision = f", revision {about['revision']}" if about.get("revision") else ""
    seconds = state["results"]["training_seconds"]
    counts = ", ".join(
        f"{name.replace('_', ' ')} {value:,}" for name, value in about["data"].items()
    )
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    evaluations = state["results"]["evaluations"]
    lines = [
        f"# {about['run_name']}",
        "",
        f"`{_short(base)}` fine-tuned with lwo_dist; method: {about['method']}{how}.",
        "",
        f"- **Base model**: `{_short(base)}`{revision}; its licence: {licence or _NO_LICENCE}",
        f"- **Data**: task {about['task']} on `{about['source']}`: {counts}",
        (
            f"- **Training**: {state['step']} steps of {train['global_batch_size']} sequences of up"
            f" to {train['sequence_length']} tokens, {seconds:.0f} s; AdamW, learning rate"
            f" {lwo['lr']:g} ({lwo['lr_scheduler_type']}), {lwo['steps_per_layer']} steps a layer,"
            f" order {lwo['order']}, compute in {train['precision']}"
        ),
        f"- **Weights**: the fp32 masters{', rounded to bf16' if dtype == 'bf16' else ''}",
        f"- **Versions**: {versions}",
        "",
        "Scores on held-out files:",
        "",
        *_scores_table(about, evaluations),
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines) + "\n")


def _scores_table(
    about: Mapping[str, Any], evaluations: Mapping[str, Mapping[str, float]]
) -> list[str]:
    """The lines of a Markdown table, a row per evaluation."""
    measured = dict.fromkeys(name for values in evaluations.values() for name in values)
    sheet = ScoreSheet.read(about, measured)
    columns = ["step", *(score.heading for score in sheet.scores), sheet.example[1]]
    rows = [columns, ["---"] * len(columns)]
    for step, values in evaluations.items():
        shown = [score.show(values[score.key]) for score in sheet.scores]
        rows.append([step, *shown, f"{values[sheet.count_key]:.0f}"])
    return [f"| {' | '.join(row)} |" for row in rows]


def _licence(base: str, revision: str | None) -> str | None:
    """What the base model's card says; None where it has none or says nothing."""
    try:
        folder = Path(base)
        if folder.is_dir():
            card = ModelCard.load(folder / "README.md")
        else:
            card = ModelCard.load(hf_hub_download(base, "README.md", revision=revision))
        return card.data.get("license")
    except Exception:  # no card, no network, a card that is no YAML: the model can do without
        return None


def _short(base: str) -> str:
    """A folder's own name: the path before it is nobody's business."""
    return Path(base).name if Path(base).is_absolute() else base
