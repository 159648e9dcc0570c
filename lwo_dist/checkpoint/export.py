"""Export a checkpoint as a plain Hugging Face folder with a model card, a few tensors at a time, or
its adapters alone.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, GenerationConfig

from lwo_dist.access import share_as_made
from lwo_dist.config import ModelConfig
from lwo_dist.errors import DamagedError, UserError, first_line
from lwo_dist.files import put_in_place
from lwo_dist.methods import Method, Saved
from lwo_dist.models import base_digest, base_weights, model_class, weights
from lwo_dist.registry import METHODS

from .card import Comparison, model_card
from .format import Checkpoint
from .schema import ADAPTERS_INDEX, INDEX, check_record, read_json, reading

__all__ = ["Dtype", "export_adapter", "export_model"]

Dtype = Literal["fp32", "bf16"]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_INDEXES = (INDEX, ADAPTERS_INDEX)
_SHARD_BYTES = 2 * 2**30
"""Size of an export file, which bounds memory; a larger tensor gets its own file."""


def export_model(
    checkpoint: Checkpoint,
    target: Path,
    *,
    dtype: Dtype = "fp32",
    method: Method | None = None,
    base: ModelConfig | None = None,
    comparison: Comparison | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Write a checkpoint's model, tokenizer and model card to `target`, completely or not at all.

    Weights are the fp32 masters, adapters merged into the base model's, and rounded to bf16 if
    requested. If transformers fuses them (the experts of a mixture), it writes the files and
    restores their published names; the whole model is then in memory.

    Args:
        method: the method of the run; None: the one named in the checkpoint, if it is built in.
        base: the base model, if the checkpoint holds adapters only; None: the one named in the
            checkpoint, if it has the digest that is recorded there.
        comparison: of this checkpoint's scores with the base model's, for the card.
        trust_remote_code: run the Python code that comes with the model, if any.

    Raises:
        DamagedError: no model can be built from the checkpoint's files.
        UserError: the checkpoint's method is a custom class, which a file must not import; the
            base model cannot be read, is another one, or is not needed; or the model needs code
            of its own, and `trust_remote_code` is not set.
        OSError: `target` cannot be written.
    """
    about = _record_of(checkpoint)
    method = method or _method_of(about)
    if base is not None and not method.trains_adapters:
        raise UserError(
            f"--base = {base.name} has no effect: the checkpoint, of method: {method.name}, holds"
            " the whole model; drop it"
        )
    with _in_place(target) as temporary:
        for name in checkpoint.state["sha256"]:
            if "/" not in name and name not in _INDEXES and not name.endswith(".safetensors"):
                shutil.copyfile(checkpoint.folder / name, temporary / name)
        saved = _saved(checkpoint, about, trust_remote_code)
        if method.trains_adapters:
            saved = _with_base(saved, base, trust_remote_code)
        tensors = method.export(saved)
        if weights.are_fused(saved.model):
            _save_fused(saved.model, tensors, temporary, _DTYPES[dtype])
        else:
            _write_shards(tensors, temporary, _DTYPES[dtype])
        _set_dtype(temporary / "config.json", _DTYPES[dtype])
        if about:
            card = model_card(
                checkpoint.state,
                dtype,
                comparison or {},
                has_code=bool(_code_of(checkpoint.folder)),
                encodes=_is_encoder_decoder(saved),
            )
            card.save(temporary / "README.md")
    return target


def export_adapter(
    checkpoint: Checkpoint,
    target: Path,
    *,
    method: Method | None = None,
    comparison: Comparison | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Write a checkpoint's adapters to `target` in peft's format, in fp32, with a model card.

    Args:
        method, comparison, trust_remote_code: as for `export_model`.

    Raises:
        DamagedError, UserError, OSError: as `export_model`; UserError also if the method has no
            adapters.
    """
    about = _record_of(checkpoint)
    method = method or _method_of(about)
    saved = _saved(checkpoint, about, trust_remote_code)
    tensors, settings = method.adapter(saved)
    with _in_place(target) as temporary:
        save_file(tensors, temporary / "adapter_model.safetensors", {"format": "pt"})
        text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
        (temporary / "adapter_config.json").write_text(text)
        card = model_card(
            checkpoint.state,
            "fp32",
            comparison or {},
            adapter=True,
            encodes=_is_encoder_decoder(saved),
        )
        card.save(temporary / "README.md")
    return target


@contextmanager
def _in_place(target: Path) -> Iterator[Path]:
    """A folder that becomes `target` if nothing fails."""
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        share_as_made(temporary)
        put_in_place(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _record_of(checkpoint: Checkpoint) -> dict[str, Any]:
    about: dict[str, Any] = checkpoint.state.get("run") or {}
    if about:
        check_record(checkpoint.state, "results")
    return about


def _is_encoder_decoder(saved: Saved) -> bool:
    settings: Any = saved.model.config
    return bool(settings.is_encoder_decoder)


def _saved(checkpoint: Checkpoint, about: Mapping[str, Any], trust_remote_code: bool) -> Saved:
    files = {name: checkpoint.folder / ref for name, ref in checkpoint.weight_map.items()}
    model = _empty_model(checkpoint.folder, trust_remote_code)
    return Saved(list(files), lambda name: _read(files[name], name), model, about)


def _with_base(saved: Saved, base: ModelConfig | None, trust_remote_code: bool) -> Saved:
    """`saved` with the tensors of the base model."""
    recorded = saved.record.get("base_digest")
    chosen = base or ModelConfig(
        name=saved.record["base_model"],
        revision=saved.record.get("revision"),
        trust_remote_code=trust_remote_code,
    )
    if base is None and recorded is None:
        # Otherwise a forged checkpoint could name any folder, and its weights would be exported.
        raise UserError(
            f"the checkpoint holds adapters only, and no digest of their base model {chosen.name};"
            " give that model with --base"
        )
    try:
        found = base_digest(chosen)
        stored = base_weights(chosen, saved.model)
    except UserError as error:
        raise UserError(
            f"the checkpoint holds adapters only, and their base model cannot be read ({error});"
            " give it with --base"
        ) from None
    if recorded is not None and found != recorded:
        raise UserError(
            f"{chosen.name} is not the model that the adapters were trained on: its weights"
            " differ; give that one with --base"
        )
    own = frozenset(saved.names)
    return replace(
        saved,
        names=[*stored.names, *saved.names],
        read=lambda name: saved.read(name) if name in own else stored.read(name),
    )


def _method_of(about: Mapping[str, Any]) -> Method:
    name = about.get("method", "lwo")
    if name not in METHODS.names:
        raise UserError(
            f"the checkpoint was made by the method {name}, which is not lwo_dist's own; code that "
            "a file names is not run: call lwo_dist.checkpoint.export.export_model(method=...)"
        )
    method: Method = METHODS.get(name)
    return method


def _empty_model(folder: Path, trust_remote_code: bool) -> Any:
    try:
        settings = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        with init_empty_weights(include_buffers=True):
            # The config could otherwise name an attention kernel on the hub, which is code.
            model = model_class(settings).from_config(
                settings, trust_remote_code=trust_remote_code, attn_implementation="eager"
            )
        model.tie_weights()
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
    except Exception as error:  # the files may hold anything
        if "trust_remote_code" in str(error):
            raise UserError(
                f"the model needs Python code that comes with it"
                f" ({_code_of(folder) or 'named in config.json'}); review it in"
                f" {folder}, then pass --trust-remote-code to run it"
            ) from None
        raise DamagedError(
            f"{folder}: transformers cannot build a model from config.json ({first_line(error)})"
        ) from error
    return model


def _code_of(folder: Path) -> str:
    """The model's own classes that config.json names."""
    settings = read_json(folder / "config.json")
    classes = settings.get("auto_map") if isinstance(settings, dict) else None
    named = classes.values() if isinstance(classes, dict) else []
    return ", ".join(sorted({str(name) for name in named}))[:300]


def _save_fused(
    model: Any, tensors: Iterable[tuple[str, Tensor]], folder: Path, dtype: torch.dtype
) -> None:
    model.load_state_dict({name: _cast(t, dtype) for name, t in tensors}, strict=False, assign=True)
    model.tie_weights()
    model.save_pretrained(folder)


def _write_shards(tensors: Iterable[tuple[str, Tensor]], folder: Path, dtype: torch.dtype) -> None:
    """Write files of at most `_SHARD_BYTES`, or one larger tensor, like `save_pretrained`."""
    shards: list[list[str]] = []
    waiting: dict[str, Tensor] = {}
    filled = total = 0

    def write() -> None:
        shards.append(list(waiting))
        save_file(waiting, folder / f"shard-{len(shards)}", {"format": "pt"})
        waiting.clear()

    for name, tensor in tensors:
        tensor = _cast(tensor, dtype)
        size = tensor.numel() * tensor.element_size()
        if waiting and filled + size > _SHARD_BYTES:
            write()
            filled = 0
        waiting[name] = tensor.contiguous()
        filled += size
        total += size
    write()
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        if len(shards) == 1:
            file_name = "model.safetensors"
        (folder / f"shard-{number}").rename(folder / file_name)
        weight_map |= dict.fromkeys(names, file_name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=1))


def _read(path: Path, name: str) -> Tensor:
    with reading(f"{path.name}, {name}"), safe_open(path, "pt") as file:
        tensor: Tensor = file.get_tensor(name)
    return tensor


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _set_dtype(path: Path, dtype: torch.dtype) -> None:
    settings = json.loads(path.read_text())
    settings.pop("torch_dtype", None)  # the key used by transformers 4
    path.write_text(
        json.dumps(settings | {"dtype": str(dtype).removeprefix("torch.")}, indent=2) + "\n"
    )
