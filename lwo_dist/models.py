"""A folder or a Hugging Face id becomes a tokenizer and a model; under `fsdp` no rank ever holds the whole model.

Weights are fp32 whatever the checkpoint holds: they are the masters that the optimizer steps on, and compute has
its own dtype. What one rank refuses all refuse: the others would wait for it until the collectives time out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from huggingface_hub import errors as hub
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.initialization import no_init_weights

from . import distributed
from .config import ModelConfig, TrainConfig, UserError
from .strategies import fsdp

__all__ = ["load_model", "load_tokenizer"]

_SETTINGS = ["*.json", "*.jinja", "*.model", "*.py", "*.tiktoken", "*.txt"]
_NOT_NEEDED = ["*/*", "consolidated*", "training_args*"]
_SAVE_TOKENIZER = "save one there with tokenizer.save_pretrained(folder)"
_AGAIN = "download or save the folder again"
# Pages of a mapped file count as this process's memory while it is open: a tensor is read in pieces of this size.
_PIECE_BYTES = 16 * 2**20


def load_tokenizer(config: ModelConfig) -> Any:
    """The model's tokenizer, a `PreTrainedTokenizerBase`, as it was saved. No collective: any process may call it.

    Raises:
        UserError: no such folder or id, the hub cannot be reached, or it has no tokenizer.
    """
    folder = _resolve(config, _SETTINGS)
    if not any(folder.glob("tokenizer*")) and not any(folder.glob("vocab*")):
        # transformers would make an empty one.
        raise UserError(f"model.name {config.name!r} has no tokenizer; {_SAVE_TOKENIZER}")
    with _one_line(config, "tokenizer", _SAVE_TOKENIZER):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=config.trust_remote_code)


def load_model(
    config: ModelConfig,
    train: TrainConfig,
    *,
    strategy: str,
    device: torch.device,
    partition: Callable[[nn.Parameter], None] | None = None,
) -> nn.Module:
    """The model with fp32 weights on `device`, in eval mode as `from_pretrained` leaves it. Every rank calls this.

    Args:
        train: `precision` is the compute dtype of the sharded model; `gradient_checkpointing` is turned on here.
        strategy: "fsdp" shards the model and reads only this rank's rows of each tensor; "replicate" holds it whole.
        partition: DeepSpeed's stage 3; every rank calls it with a whole parameter in turn, of which it keeps its part
            of what rank 0 has there. Without it "deepspeed" holds the model whole.

    Raises:
        UserError: on every rank alike. No such folder or id, the hub cannot be reached, a damaged or quantised
            checkpoint, weights that do not fit config.json, an encoder-decoder; under fsdp no stack of layers.
    """
    with _on_all_ranks():
        folder = _resolve(config, [*_SETTINGS, "*.safetensors"])
        if not Path(config.name).exists() and not any(folder.glob("*.safetensors")):
            folder = _resolve(config, [*_SETTINGS, "*.bin"])
        settings = _read_settings(config, folder)
        if strategy == "fsdp" or partition is not None:
            model = _empty_model(config, folder, settings)
            files = _locate(config, folder)
            direct = _is_direct(model, files)  # Before it is sharded, which changes its classes' names.
        else:
            model = _whole_model(config, folder, torch.float32).to(device)
            if (
                train.precision == "bf16" and strategy == "replicate"
            ):  # as FSDP2 does by its policy: fp32 weights and gradients, bf16 compute
                model.forward = torch.autocast(device.type, torch.bfloat16)(model.forward)
        if train.gradient_checkpointing:
            _enable_checkpointing(model)
    if strategy == "fsdp":
        _shard(model, train.precision, device)
        if direct:
            _read(model, config, files)
        else:
            _receive(model, config, folder, files, device)
    elif partition is not None:
        _partition(model, config, folder, files if direct else {}, device, partition)
    # A cache of keys and values only costs memory in training; generate() asks for one by itself.
    model.config.get_text_config().use_cache = False
    return model.eval()


def _resolve(config: ModelConfig, patterns: list[str]) -> Path:
    """The folder with the model's files; those of a Hugging Face id are downloaded, or found in its cache."""
    folder, name = Path(config.name).expanduser(), f"model.name {config.name!r}"
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"{name} is a folder without config.json; save a model there with save_pretrained(folder)")
        return folder
    if folder.exists() or config.name.count("/") > 1 or config.name.startswith((".", "~", "/")):
        raise UserError(f"{name} is not a folder; give a folder written by save_pretrained, or a Hugging Face id")
    try:
        found = snapshot_download(
            config.name, revision=config.revision, allow_patterns=patterns, ignore_patterns=_NOT_NEEDED
        )
        return Path(found)
    except hub.HFValidationError:
        why = "is no folder and cannot be a Hugging Face id; give a folder, or an id such as Qwen/Qwen2.5-Coder-0.5B"
    except hub.GatedRepoError:
        why = "is gated; ask for access on its page at huggingface.co and set HF_TOKEN to a token that has it"
    except hub.RepositoryNotFoundError:
        why = "is no folder, and no model on the Hugging Face hub that this HF_TOKEN may read; mind the spelling"
    except hub.RevisionNotFoundError:
        why = f"has no revision {config.revision!r}; give one of its branches, tags or commits, or none"
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled):
        why = (
            "is no folder, is not in the cache (HF_HOME), and the Hugging Face hub cannot be reached; "
            "give a folder, go online (HF_HUB_OFFLINE unset), or use model.name: tiny-code"
        )
    except (hub.HfHubHTTPError, OSError) as error:
        why = f"could not be downloaded ({_first_line(error)}); try again, or give a folder"
    raise UserError(f"{name} {why}")


def _read_settings(config: ModelConfig, folder: Path) -> Any:
    with _one_line(config, "config.json", "give a decoder that this version of transformers knows"):
        settings = AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    if settings.is_encoder_decoder:
        raise UserError(f"model.name {config.name!r} is an encoder-decoder; give a decoder, such as Qwen2")
    if getattr(settings, "quantization_config", None) is not None:
        raise UserError(
            f"model.name {config.name!r} is quantised and cannot be trained; give the model it was made from"
        )
    return settings


def _whole_model(config: ModelConfig, folder: Path, dtype: torch.dtype) -> Any:
    """`from_pretrained`, but what does not fit is an error: it would be left random, or out."""
    with _one_line(config, "weights", _AGAIN):
        model, found = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, trust_remote_code=config.trust_remote_code, output_loading_info=True
        )
    for problem in ("missing", "unexpected"):
        keys = sorted(found[f"{problem}_keys"])
        if keys:
            raise UserError(
                f"model.name {config.name!r}: {len(keys)} {problem} weights, first {keys[0]}; "
                f"its weights and its config.json must belong to the same {type(model).__name__}"
            )
    return model


def _empty_model(config: ModelConfig, folder: Path, settings: Any) -> Any:
    """The model with parameters on the meta device and real buffers."""
    with _one_line(config, "model", "give a decoder that this version of transformers knows"):
        with no_init_weights(), init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(
                settings, dtype=torch.float32, trust_remote_code=config.trust_remote_code
            )
        model.tie_weights()
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def _enable_checkpointing(model: Any) -> None:
    # transformers renames this and warns at the old name; 5.10 has only the old one.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except ValueError:
        raise UserError(
            f"{type(model).__name__} cannot recompute activations; set train.gradient_checkpointing: false"
        ) from None
    # Inputs that require gradients would drag backward through the layers below the active one.
    model.disable_input_require_grads()


def _locate(config: ModelConfig, folder: Path) -> dict[str, Path]:
    """Tensor name -> safetensors file; empty where the weights are in another format."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    with _one_line(config, "weights", _AGAIN):
        if index.is_file():
            return {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
        if not single.is_file():
            return {}
        with safe_open(single, "pt") as file:
            return dict.fromkeys(file.keys(), single)


def _targets(model: Any) -> dict[tuple[str, ...], Tensor]:
    """The tensors that a checkpoint holds, each under all of its names: a tied one has several."""
    tensors = model.state_dict(keep_vars=True)
    names: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    return {tuple(group): tensors[group[0]] for group in names.values()}


def _is_direct(model: Any, files: Mapping[str, Path]) -> bool:
    """Whether each tensor of the model is one of the checkpoint, under the same name.

    It is not where transformers fuses weights while it loads them (the experts of a mixture) or renames them (GPT-2
    as first published, without "transformer."), and where both names of a tied tensor were saved.
    """
    if any(isinstance(step, WeightConverter) for step in get_model_conversion_mapping(model)):
        return False
    targets = _targets(model)
    known = {name for group in targets for name in group}
    # Old checkpoints hold buffers that models now compute, such as each layer's rotary_emb.inv_freq.
    computed = {_ending(name) for name, _ in model.named_buffers() if name not in known}
    saved = {name for name in files if name in known or _ending(name) not in computed}
    return saved <= known and all(len(saved.intersection(group)) == 1 for group in targets)


def _ending(name: str) -> str:
    return ".".join(name.split(".")[-2:])


def _shard(model: Any, precision: str, device: torch.device) -> None:
    """Shard a model from the meta device and allocate this rank's shards, unfilled."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    fsdp.shard_model(model, precision=precision, device_type=device.type)
    model.to_empty(device=device)
    # No checkpoint holds the rotary frequencies, and to_empty left garbage in them. Ties survive it.
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])


@torch.no_grad()
def _read(model: Any, config: ModelConfig, files: Mapping[str, Path]) -> None:
    """Copy this rank's rows of each tensor from its file."""
    with _on_all_ranks(), _one_line(config, "weights", _AGAIN):
        for group, target in _targets(model).items():
            name = next(name for name in group if name in files)
            with safe_open(files[name], "pt") as file:
                shape = tuple(file.get_slice(name).get_shape())
            if shape != tuple(target.shape):
                raise UserError(
                    f"model.name {config.name!r}: {name} has the shape {shape} in {files[name].name} and "
                    f"{tuple(target.shape)} by config.json; its files must belong to the same model"
                )
            local, first = _local_rows(target)
            for start, stop in _pieces(local):
                with safe_open(files[name], "pt") as file:
                    rows = file.get_slice(name)[first + start : first + stop] if shape else file.get_tensor(name)
                    local[start:stop].copy_(rows)


@torch.no_grad()
def _receive(model: Any, config: ModelConfig, folder: Path, files: Mapping[str, Path], device: torch.device) -> None:
    """Rank 0 loads the model whole, on its host and in the dtype it is stored in, and sends it piece by piece."""
    targets = _targets(model)
    whole: dict[str, Tensor] = {}
    with _on_all_ranks():
        if distributed.rank() == 0:
            whole = _whole_model(config, folder, _stored_dtype(config, files)).state_dict(keep_vars=True)
            for group in targets:
                if any(whole[name] is not whole[group[0]] for name in group):
                    raise UserError(
                        f"model.name {config.name!r}: config.json ties {' and '.join(group)}, but the saved weights "
                        "differ; set tie_word_embeddings to false there"
                    )
    for group, target in targets.items():
        local, first = _local_rows(target)
        every_row = torch.empty(target.shape or (1,), dtype=target.dtype, device="meta")
        for start, stop in _pieces(every_row):
            rows = torch.empty_like(every_row[start:stop], device=device)
            if whole:
                rows.copy_(whole[group[0]].view(every_row.shape)[start:stop])
            if distributed.world_size() > 1:
                dist.broadcast(rows, src=0)
            low, high = max(start, first), min(stop, first + len(local))
            if low < high:
                local[low - first : high - first].copy_(rows[low - start : high - start])


@torch.no_grad()
def _partition(
    model: Any,
    config: ModelConfig,
    folder: Path,
    files: Mapping[str, Path],
    device: torch.device,
    partition: Callable[[nn.Parameter], None],
) -> None:
    """Make the parameters real one after the other: whole on every rank for a moment, from rank 0's file."""
    whole: dict[str, Tensor] = {}
    with _on_all_ranks():
        if distributed.rank() == 0 and not files:
            whole = _whole_model(config, folder, torch.float32).state_dict(keep_vars=True)
    model._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(device))
    for group, target in _targets(model).items():
        tensor = torch.empty(target.shape, dtype=target.dtype, device=device)
        with _on_all_ranks(), _one_line(config, "weights", _AGAIN):
            if distributed.rank() == 0:
                name = next(name for name in group if name in files or not files)
                with safe_open(files[name], "pt") if files else nullcontext() as file:
                    tensor.copy_(file.get_tensor(name) if file is not None else whole[name])
        if isinstance(target, nn.Parameter):
            parameter = nn.Parameter(tensor)
            partition(parameter)
            for name in group:
                module, _, own = name.rpartition(".")
                model.get_submodule(module)._parameters[own] = parameter
        else:
            if distributed.world_size() > 1:
                dist.broadcast(tensor, src=0)
            target.copy_(tensor)


def _stored_dtype(config: ModelConfig, files: Mapping[str, Path]) -> torch.dtype:
    """The half precision that all weights are stored in, else fp32: loading must not round."""
    found = set()
    with _one_line(config, "weights", _AGAIN):
        for name, path in files.items():
            with safe_open(path, "pt") as file:
                found.add(file.get_slice(name).get_dtype())
    half = {"BF16": torch.bfloat16, "F16": torch.float16}
    return half.get(found.pop(), torch.float32) if len(found) == 1 else torch.float32


def _local_rows(tensor: Tensor) -> tuple[Tensor, int]:
    """This rank's rows, writable, and the number of the first one in the whole tensor."""
    if isinstance(tensor, DTensor):
        _, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        return tensor.to_local(), offsets[0]
    return tensor if tensor.ndim else tensor.view(1), 0


def _pieces(tensor: Tensor) -> Iterator[tuple[int, int]]:
    """Ranges of rows that hold at most `_PIECE_BYTES`, or one row."""
    step = max(1, _PIECE_BYTES // max(1, tensor[:1].numel() * tensor.element_size()))
    for start in range(0, len(tensor), step):
        yield start, min(start + step, len(tensor))


@contextmanager
def _on_all_ranks() -> Iterator[None]:
    """Raise a rank's `UserError` on every rank."""
    problem = None
    try:
        yield
    except UserError as error:
        problem = error
    problems: list[UserError | None] = [problem] * distributed.world_size()
    if len(problems) > 1:
        dist.all_gather_object(problems, problem)
    first = next((found for found in problems if found is not None), None)
    if first is not None:
        raise first


@contextmanager
def _one_line(config: ModelConfig, what: str, remedy: str) -> Iterator[None]:
    """Turn whatever a library raises about a model's files into one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if "trust_remote_code" in str(error):
            remedy = "read the code that comes with it, then set model.trust_remote_code: true"
        raise UserError(
            f"model.name {config.name!r}: its {what} cannot be read ({_first_line(error)}); {remedy}"
        ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
