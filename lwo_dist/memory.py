"""Memory in bytes: what the formulas predict and what a rank actually holds."""

from __future__ import annotations

import resource
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor

__all__ = [
    "DecoderSize",
    "deepspeed_bytes",
    "fsdp_bytes",
    "full_fine_tuning_bytes",
    "local_bytes",
    "lora_bytes",
    "lora_numel",
    "optimizer_state_bytes",
    "padded_numel",
    "park_bytes",
    "peak_bytes",
    "replicate_bytes",
    "step_bytes",
]


def padded_numel(numel: int, multiple: int) -> int:
    """`numel` rounded up to a multiple, for a buffer that is split evenly across ranks."""
    return -(-numel // multiple) * multiple


def optimizer_state_bytes(numel: int, world_size: int, *, master: bool = False) -> int:
    """AdamW's two fp32 moments of a layer of `numel` parameters on one of `world_size` ranks.

    Includes padding. With `master`, adds 4 bytes per element for an fp32 copy of the weights;
    without it, the fp32 weights are the shards themselves. The optimizer's step scalars, 4 bytes
    per tensor, are not counted.
    """
    return (12 if master else 8) * padded_numel(numel, world_size) // world_size


def park_bytes(numel: int, *, moments: bool, masters: bool) -> int:
    """Host memory of the parks of layers with `numel` elements on this rank, in bytes.

    Args:
        moments: with `state: keep`, AdamW's two fp32 moments: 8 bytes per element.
        masters: with 16-bit storage and `inactive_master: host`, the bits lost in rounding to bf16:
            2 bytes per element. Not counted: 8 bytes for each element halfway between two bf16
            numbers, about one in 65,536.
    """
    return (8 * moments + 2 * masters) * numel


# ---- what a rank holds, by the keys of `LWO.memory`


def replicate_bytes(numel: int, active_numel: int, world_size: int) -> dict[str, int]:
    """`strategy: replicate`, in every precision: all `numel` weights in fp32; for the active layer
    its whole gradient, this rank's part of the reduced one, and the moments of that part.

    bf16 is autocast: a layer's weights are cast when it runs, and the copies that backward needs
    stay until then (not counted here).
    """
    part = padded_numel(active_numel, world_size) // world_size
    return {
        "parameter_bytes": 4 * numel,
        "gradient_bytes": 4 * active_numel + (4 * part if world_size > 1 else 0),
        "optimizer_state_bytes": optimizer_state_bytes(active_numel, world_size),
    }


def fsdp_bytes(
    numel: int, active_numel: int, world_size: int, *, storage_bytes: int = 4
) -> dict[str, int]:
    """`strategy: fsdp`: 1/W of all weights, and of the active layer's gradient and moments.

    The shards are the fp32 masters (`storage_bytes` 4). With `fsdp.storage: bf16` (2) only the
    active layer's are fp32. Weights that are gathered for compute are not counted here.
    """
    return {
        "parameter_bytes": (storage_bytes * numel + (4 - storage_bytes) * active_numel)
        // world_size,
        "gradient_bytes": 4 * active_numel // world_size,
        "optimizer_state_bytes": optimizer_state_bytes(active_numel, world_size),
    }


def deepspeed_bytes(
    numel: int, active_numel: int, world_size: int, *, stage: int, weight_bytes: int
) -> dict[str, int]:
    """`strategy: deepspeed`, whose optimizer has masters of its own: 12 bytes per element of state.

    Stages 1 and 2 keep all weights on every rank; stage 3 keeps 1/W, and the active layer whole
    since its update gathered it. The gradient is summed in fp32: whole under stage 1, 1/W under
    stage 2, and under stage 3 1/W and a bucket of the layer's size. Further weights that stage 3
    has gathered (`stage3_max_live_parameters`) are not counted.

    Args:
        stage: 1, 2 or 3.
        weight_bytes: 2 in bf16, else 4.
    """
    weights = weight_bytes * numel
    gradients = {1: 4 * active_numel, 2: 4 * active_numel // world_size}
    if stage == 3:
        weights = weight_bytes * numel // world_size + weight_bytes * active_numel
        gradients[3] = 4 * active_numel // world_size + 4 * active_numel
    return {
        "parameter_bytes": weights,
        "gradient_bytes": gradients[stage],
        "optimizer_state_bytes": optimizer_state_bytes(active_numel, world_size, master=True),
    }


def lora_bytes(numel: int, adapter_numel: int, world_size: int) -> dict[str, int]:
    """LoRA, the usual way: the base frozen in bf16 and sharded, fp32 adapters with AdamW."""
    return {
        "parameter_bytes": (2 * numel + 4 * adapter_numel) // world_size,
        "gradient_bytes": 4 * adapter_numel // world_size,
        "optimizer_state_bytes": optimizer_state_bytes(adapter_numel, world_size),
    }


# ---- what a step needs besides


@dataclass(frozen=True, kw_only=True)
class DecoderSize:
    """The sizes of a decoder that its memory depends on. A tied matrix counts once."""

    parameters: int
    stack_layers: int
    """Transformer layers."""
    stack_layer_parameters: int
    """Of one transformer layer."""
    hidden: int
    intermediate: int
    vocabulary: int

    @property
    def outside_parameters(self) -> int:
        """Of embedding, final norm and head."""
        return self.parameters - self.stack_layers * self.stack_layer_parameters


def step_bytes(
    size: DecoderSize,
    *,
    sequences: int,
    length: int,
    gradient_numel: int,
    compute_bytes: int = 2,
    checkpointing: bool = True,
    gathers: bool = True,
) -> dict[str, int]:
    """Device memory of a training step beyond what is held between steps; an upper estimate.

    It is counted from the operations of a Llama or Qwen2 layer with fused attention and of our
    loss, not measured on a GPU. The visit that needs most is assumed: the one of the lowest layer,
    whose backward passes all others.

    Args:
        sequences, length: a rank's micro-batch: sequences, and tokens of each.
        gradient_numel: parameters whose gradients are whole at one time: of the active layer, or
            under full fine-tuning of the largest sharded module.
        compute_bytes: 2 in bf16, else 4.
        checkpointing: as `train.gradient_checkpointing`.
        gathers: whether sharded weights are gathered for compute, as by FSDP2.

    Returns:
        `gathered_bytes`: embedding and head from the forward on, and three transformer layers: one
        in use, the next one, and the buffer that it arrives in. `activation_bytes`: the larger of
        what is there when the loss is computed and when the gradients are.
    """
    tokens = sequences * length
    gathered = size.outside_parameters + 3 * size.stack_layer_parameters
    row = tokens * compute_bytes * size.hidden
    layer = 15 * row + 4 * tokens * compute_bytes * size.intermediate
    stored = 3 * row  # of the final norm
    recomputed = 0
    if checkpointing:
        stored += size.stack_layers * row
        recomputed = layer
    else:
        stored += size.stack_layers * layer
    # Logits as computed and as cut, in fp32, and their log-softmax; in backward, two gradients of
    # it. Before they are reduced gradients are cast to fp32.
    logits = 12 * tokens * size.vocabulary
    gradients = (compute_bytes + 4) * gradient_numel
    return {
        "gathered_bytes": compute_bytes * gathered if gathers else 0,
        "activation_bytes": stored + max(logits, recomputed + gradients),
    }


# ---- what full fine-tuning would need, and what is measured


def full_fine_tuning_bytes(
    peak: float, gradient: float, state: float, active_numel: int, numel: int
) -> float:
    """Lower bound for full fine-tuning of `numel` parameters, derived from a rank's `peak`.

    Gradients and optimizer state, measured for the active layer of `active_numel` parameters, scale
    with the number of parameters under any strategy. Activations, which full fine-tuning keeps for
    all layers, are counted as measured.
    """
    return peak + (gradient + state) * (numel / active_numel - 1)


def lora_numel(shapes: Iterable[Sequence[int]], rank: int) -> int:
    """Parameters of LoRA adapters of `rank` (Hu et al., 2022) on every matrix of these shapes."""
    return sum(rank * sum(shape) for shape in shapes if len(shape) == 2)


def local_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages behind `tensors` on this rank, each once; for a DTensor, its local
    shard.
    """
    sizes: dict[int, int] = {}
    for tensor in tensors:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        storage = local.detach().untyped_storage()
        if storage.data_ptr():
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def peak_bytes(device: torch.device) -> int:
    """Peak memory so far: allocated on the GPU, or resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
