"""Loads weights from safetensors files into a model, this rank's share of one tensor at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from lwo_dist import distributed
from lwo_dist.config import ModelConfig
from lwo_dist.errors import UserError

from .hub import AGAIN, check_indexes, one_line, whole_model

__all__ = [
    "are_fused",
    "digest",
    "direct",
    "is_direct",
    "locate",
    "read",
    "receive",
    "receive_partitioned",
    "write",
]

# Pages of a mapped file count as this process's memory while it is open, so tensors are read in
# pieces of this size.
_PIECE_BYTES = 16 * 2**20
_DIGEST_ROWS = 4


def locate(config: ModelConfig, folder: Path) -> dict[str, Path]:
    """Tensor name -> safetensors file; empty if the weights are in another format."""
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    with one_line(config, "weights", AGAIN):
        check_indexes(folder)
        if index.is_file():
            return {
                name: folder / file
                for name, file in json.loads(index.read_text())["weight_map"].items()
            }
        if not single.is_file():
            return {}
        with safe_open(single, "pt") as file:
            return dict.fromkeys(file.keys(), single)


def is_direct(model: Any, files: Mapping[str, Path]) -> bool:
    """Whether each tensor of the model is in the checkpoint under the same name.

    False if transformers fuses weights while loading (the experts of a mixture) or renames them
    (GPT-2 as first published, without "transformer."), and if both names of a tied tensor were
    saved.
    """
    if are_fused(model):
        return False
    targets = _targets(model)
    known = {name for target in targets for name in target.names}
    # Old checkpoints contain buffers that models now compute, such as each layer's
    # rotary_emb.inv_freq.
    computed = {_ending(name) for name, _ in model.named_buffers() if name not in known}
    saved = {name for name in files if name in known or _ending(name) not in computed}
    return saved <= known and all(len(saved.intersection(target.names)) == 1 for target in targets)


def are_fused(model: Any) -> bool:
    """Whether transformers fuses weights (experts) that published checkpoints store separately."""
    return any(isinstance(step, WeightConverter) for step in get_model_conversion_mapping(model))


def direct(
    model: nn.Module, config: ModelConfig, files: Mapping[str, Path]
) -> tuple[tuple[str, ...], Callable[[str], Tensor]]:
    """The names of a model's tensors in `files` (`is_direct`), and what reads one of them."""

    def read_one(name: str) -> Tensor:
        with one_line(config, "weights", AGAIN), safe_open(files[name], "pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    return tuple(target.stored_in(files) for target in _targets(model)), read_one


def digest(config: ModelConfig, files: Mapping[str, Path]) -> str:
    """A sha256 of names, dtypes, shapes and the first rows of the tensors: tuning changes every
    matrix that it trains, and a whole model takes long to read.
    """
    found = hashlib.sha256()
    with one_line(config, "weights", AGAIN):
        for name, path in sorted(files.items()):
            with safe_open(path, "pt") as file:
                part = file.get_slice(name)
                shape = part.get_shape()
                rows = part[:_DIGEST_ROWS] if shape else file.get_tensor(name)
            found.update(f"{name} {part.get_dtype()} {shape} ".encode())
            found.update(rows.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@torch.no_grad()
def read(
    model: Any, config: ModelConfig, files: Mapping[str, Path], stored: Mapping[str, str]
) -> None:
    """Copy this rank's rows of each tensor from its file.

    Args:
        files: stored name -> file (`locate`).
        stored: name in the model -> name in the checkpoint; other tensors are left as they are.
    """
    with distributed.errors_on_all_ranks(), one_line(config, "weights", AGAIN):
        for target in _targets(model, stored):
            name = target.stored_in(files)
            with safe_open(files[name], "pt") as file:
                shape = tuple(file.get_slice(name).get_shape())
            if shape != tuple(target.tensor.shape):
                raise UserError(
                    f"model.name {config.name!r}: {name} has the shape {shape} in "
                    f"{files[name].name} and {tuple(target.tensor.shape)} by config.json; its "
                    "files must belong to the same model"
                )
            local, first = _local_rows(target.tensor)
            for start, stop in _pieces(local):
                with safe_open(files[name], "pt") as file:
                    if shape:
                        rows = file.get_slice(name)[first + start : first + stop]
                    else:
                        rows = file.get_tensor(name)
                    local[start:stop].copy_(rows)


@torch.no_grad()
def write(model: nn.Module, whole: Mapping[str, Tensor]) -> None:
    """Copy this rank's rows of whole tensors, the same on all ranks, into a sharded model."""
    own = model.state_dict(keep_vars=True)
    for name, tensor in whole.items():
        local, first = _local_rows(own[name])
        local.copy_(tensor.view(own[name].shape or (1,))[first : first + len(local)])


@torch.no_grad()
def receive(
    model: Any,
    config: ModelConfig,
    folder: Path,
    stored: Mapping[str, str],
    device: torch.device,
) -> None:
    """Rank 0 loads the whole model on its host, in its stored dtype, and sends it in pieces."""
    targets = _targets(model, stored)
    whole: dict[str, Tensor] = {}
    with distributed.errors_on_all_ranks():
        if distributed.rank() == 0:
            dtype = _stored_dtype(config, locate(config, folder))
            whole = whole_model(config, folder, dtype).state_dict(keep_vars=True)
    for target in targets:
        local, first = _local_rows(target.tensor)
        every_row = torch.empty(
            target.tensor.shape or (1,), dtype=target.tensor.dtype, device="meta"
        )
        for start, stop in _pieces(every_row):
            rows = torch.empty_like(every_row[start:stop], device=device)
            if whole:
                rows.copy_(whole[target.stored[0]].view(every_row.shape)[start:stop])
            if distributed.world_size() > 1:
                dist.broadcast(rows, src=0)
            low = max(start, first)
            high = min(stop, first + len(local))
            if low < high:
                local[low - first : high - first].copy_(rows[low - start : high - start])


@torch.no_grad()
def receive_partitioned(
    model: Any,
    config: ModelConfig,
    folder: Path,
    files: Mapping[str, Path],
    stored: Mapping[str, str],
    added: Mapping[str, Tensor],
    device: torch.device,
    partition: Callable[[nn.Parameter], None],
) -> None:
    """Materialise the parameters one at a time: each is briefly whole on every rank, from rank 0.

    Args:
        files: empty if the weights are not stored as the model has them.
        added: whole tensors that are not in the checkpoint.
    """
    whole: dict[str, Tensor] = {}
    with distributed.errors_on_all_ranks():
        if distributed.rank() == 0 and not files:
            whole = whole_model(config, folder, torch.float32).state_dict(keep_vars=True)
    model._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(device))
    for target in _targets(model, {**stored, **{name: name for name in added}}):
        own = target.tensor
        tensor = torch.empty(own.shape, dtype=own.dtype, device=device)
        with distributed.errors_on_all_ranks(), one_line(config, "weights", AGAIN):
            if distributed.rank() == 0:
                tensor.copy_(_whole_tensor(target, files, whole, added))
        if isinstance(own, nn.Parameter):
            parameter = nn.Parameter(tensor)
            partition(parameter)
            for name in target.names:
                module, _, last = name.rpartition(".")
                model.get_submodule(module)._parameters[last] = parameter
        else:
            if distributed.world_size() > 1:
                dist.broadcast(tensor, src=0)
            own.copy_(tensor)


def _whole_tensor(
    target: _Target,
    files: Mapping[str, Path],
    whole: Mapping[str, Tensor],
    added: Mapping[str, Tensor],
) -> Tensor:
    if target.names[0] in added:
        return added[target.names[0]]
    if not files:
        return whole[target.stored[0]]
    name = target.stored_in(files)
    with safe_open(files[name], "pt") as file:
        tensor: Tensor = file.get_tensor(name)
    return tensor


@dataclass(frozen=True)
class _Target:
    """A tensor that a checkpoint holds; a tied one has several names."""

    names: tuple[str, ...]
    """In the model."""
    stored: tuple[str, ...]
    """In the checkpoint."""
    tensor: Tensor

    def stored_in(self, files: Mapping[str, Path]) -> str:
        return next(name for name in self.stored if name in files)


def _targets(model: Any, stored: Mapping[str, str] | None = None) -> list[_Target]:
    """The model's tensors that are in `stored`; None: all, under their own names."""
    tensors = model.state_dict(keep_vars=True)
    names: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        if stored is None or name in stored:
            names.setdefault(id(tensor), []).append(name)
    found = []
    for group in names.values():
        known = tuple(name if stored is None else stored[name] for name in group)
        found.append(_Target(tuple(group), known, tensors[group[0]]))
    return found


def _ending(name: str) -> str:
    return ".".join(name.split(".")[-2:])


def _stored_dtype(config: ModelConfig, files: Mapping[str, Path]) -> torch.dtype:
    """The half precision of all stored weights, else fp32: loading must not round."""
    found = set()
    with one_line(config, "weights", AGAIN):
        for name, path in files.items():
            with safe_open(path, "pt") as file:
                found.add(file.get_slice(name).get_dtype())
    half = {"BF16": torch.bfloat16, "F16": torch.float16}
    return half.get(found.pop(), torch.float32) if len(found) == 1 else torch.float32


def _local_rows(tensor: Tensor) -> tuple[Tensor, int]:
    """This rank's rows, writable, and the index of the first one in the whole tensor."""
    if isinstance(tensor, DTensor):
        _, offsets = compute_local_shape_and_global_offset(
            tensor.shape, tensor.device_mesh, tensor.placements
        )
        return tensor.to_local(), offsets[0]
    return tensor if tensor.ndim else tensor.view(1), 0


def _pieces(tensor: Tensor) -> Iterator[tuple[int, int]]:
    """Row ranges of at most `_PIECE_BYTES` each, or a single row."""
    step = max(1, _PIECE_BYTES // max(1, tensor[:1].numel() * tensor.element_size()))
    for start in range(0, len(tensor), step):
        yield start, min(start + step, len(tensor))
