"""DeepSpeed's private parts that a switch relies on; most are checked when this is imported.

A DeepSpeed engine has one ZeRO optimizer for its whole life. A switch replaces that optimizer and
keeps the engine: its counters, its scheduler, and under stage 3 the object that partitions and
gathers the weights.
"""

from __future__ import annotations

import gc
import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from deepspeed.comm import comm
from deepspeed.runtime import bf16_optimizer
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from lwo_dist import distributed
from lwo_dist.errors import UserError

__all__ = [
    "SentBytes",
    "ZERO_OPTIMIZERS",
    "adopt",
    "flat_weights",
    "forget_order",
    "fragment",
    "forget_gradients",
    "gradient_buffers",
    "groups_of_masters",
    "inner_optimizer",
    "link_moments",
    "masters",
    "partition_function",
    "release",
    "stored",
    "trained_parameters",
]

TESTED_VERSIONS = ("0.19.8",)
_NAMES = {
    DeepSpeedEngine: [
        "_configure_optimizer",
        "_backward_post_hook",
        "_support_torch_style_backward",
        "_config",
    ],
    DeepSpeedZeroOptimizer: [
        "averaged_gradients",
        "bit16_groups",
        "bit16_groups_flat",
        "check_grad_overflow",
        "clip_grad",
        "ipg_buckets",
        "overflow",
        "single_partition_of_fp32_groups",
        "_global_grad_norm",
        "_hp_optimizer_states_linked",
        "_lazy_init_hp_params_optimizer_state",
    ],
    BF16_Optimizer: [
        "bf16_groups",
        "bf16_groups_flat",
        "clip_grad",
        "fp32_groups_flat_partition",
        "fp32_groups_gradients_flat",
        "overflow",
        "_global_grad_norm",
        "_hp_optimizer_states_linked",
        "_lazy_init_hp_params_optimizer_state",
    ],
    DeepSpeedZeroOptimizer_Stage3: [
        "clip_grad",
        "fp16_groups",
        "fp32_partitioned_groups_flat",
        "grad_partitions_flat_buffer",
        "initialize_ds_offload",
        "ipg_buckets",
        "overflow",
        "parameter_offload",
        "persistent_parameters",
        "_get_fp32_opt_state_partition",
        "_global_grad_norm",
    ],
    DeepSpeedZeRoOffload: ["destroy", "get_param_coordinator", "persistent_parameters"],
    deepspeed.zero.Init: ["_convert_to_zero_parameters"],
    PartitionedParameterCoordinator: ["is_invalid_trace", "_invalidate_trace"],
}
ZERO_OPTIMIZERS = (DeepSpeedZeroOptimizer, BF16_Optimizer, DeepSpeedZeroOptimizer_Stage3)
_COLLECTIVES = (
    "all_gather",
    "all_gather_coalesced",
    "all_gather_into_tensor",
    "all_reduce",
    "all_reduce_coalesced",
    "all_to_all_single",
    "broadcast",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
)


def check_version(version: str, names: dict[type, list[str]]) -> None:
    """Refuse a DeepSpeed whose internals may differ from the tested version.

    Raises:
        UserError: another version, or a private name that is missing.
    """
    remedy = f"install one of the versions that work: deepspeed=={', '.join(TESTED_VERSIONS)}"
    if version.partition("+")[0] not in TESTED_VERSIONS:
        raise UserError(f"deepspeed {version} has not been tested with lwo_dist; {remedy}")
    for kind, wanted in names.items():
        missing = [name for name in wanted if not _has(kind, name)]
        if missing:
            raise UserError(f"deepspeed {version} lacks {kind.__name__}.{missing[0]}; {remedy}")


def _has(kind: type, name: str) -> bool:
    """Whether the class has the attribute, or one of its functions sets or reads it."""
    codes = [
        getattr(inspect.unwrap(value), "__code__", None)
        for value in vars(kind).values()
        if callable(value)
    ]
    return hasattr(kind, name) or any(code is not None and name in code.co_names for code in codes)


check_version(deepspeed.__version__, _NAMES)
# torch 2.13 renames two collectives that 0.19.8 calls, and warns at every call.
warnings.filterwarnings("ignore", r"`torch\.distributed\.", FutureWarning, r"torch\.distributed\.")


def partition_function(settings: dict[str, Any]) -> Callable[[list[nn.Parameter]], None]:
    """What `deepspeed.zero.Init` does to each new parameter: partition rank 0's values."""
    convert: Callable[[list[nn.Parameter]], None] = deepspeed.zero.Init(
        config_dict_or_path=settings
    )._convert_to_zero_parameters
    return convert


# ---- the swap


def release(engine: Any) -> Any:
    """Take the ZeRO optimizer out of the engine and free all its memory, even if still referenced.

    Returns:
        The argument for `adopt`: stage 3's manager of the partitioned weights, else None.
    """
    old = engine.optimizer
    inner = engine.basic_optimizer
    offload = getattr(old, "parameter_offload", None)
    with _quiet():
        if offload is not None:
            offload.destroy = lambda: None  # the old optimizer must not destroy it
        old.destroy()
        if offload is not None:
            del offload.destroy
    for parameter in engine.module.parameters():
        parameter.grad = None
        # Each of these references the old optimizer's buffers, which would otherwise coexist with
        # the new ones.
        for name in ("_z3_optimizer", "_hp_mapping", "_hp_grad", "grad_accum"):
            if name in vars(parameter):
                setattr(parameter, name, None)
    vars(old).clear()
    for group in inner.param_groups:
        group["params"] = []
    inner.state.clear()
    engine.optimizer = engine.basic_optimizer = engine.client_optimizer = None
    return offload


def adopt(
    engine: Any, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], offload: Any
) -> None:
    """Build a ZeRO optimizer around `optimizer`, which holds the whole trainable `parameters`."""
    kind = DeepSpeedZeroOptimizer_Stage3
    original = DeepSpeedZeroOptimizer_Stage3.initialize_ds_offload
    with _quiet():
        if offload is not None:
            kind.initialize_ds_offload = lambda self, **_: offload
        try:
            engine._configure_optimizer(optimizer, list(parameters))
        finally:
            kind.initialize_ds_offload = original
    zero = engine.optimizer
    if offload is not None:
        forget_order(zero)
        # These are gathered again after each step; frozen ones have not changed.
        zero.persistent_parameters = [p for p in offload.persistent_parameters if p.requires_grad]
    if isinstance(zero, DeepSpeedZeroOptimizer):
        # Otherwise bf16 would step on a non-finite norm; with other dtypes ZeRO skips the step
        # itself.
        zero.check_grad_overflow = parameters[0].dtype == torch.bfloat16
    if engine._support_torch_style_backward:
        zero.register_grad_acc_post_hook(engine._backward_post_hook)


def forget_order(zero: Any) -> None:
    """Let stage 3 find out again which modules a step uses; until then it fetches none early."""
    coordinator = zero.parameter_offload.get_param_coordinator()
    if not coordinator.is_invalid_trace():  # raises on an invalid trace
        coordinator._invalidate_trace()


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress DeepSpeed's setup side effects: heap collection, memory printing, peak resets."""
    collect = gc.collect
    see_memory_usage = bf16_optimizer.see_memory_usage
    gc.collect = lambda generation=2: 0
    bf16_optimizer.see_memory_usage = lambda message, force=False: None
    try:
        yield
    finally:
        gc.collect = collect
        bf16_optimizer.see_memory_usage = see_memory_usage


# ---- what a ZeRO optimizer holds on this rank


def inner_optimizer(zero: Any) -> torch.optim.Optimizer:
    """The AdamW that steps on the flat masters."""
    inner: torch.optim.Optimizer = zero.optimizer
    return inner


def trained_parameters(zero: Any) -> list[nn.Parameter]:
    for name in ("bit16_groups", "bf16_groups", "fp16_groups"):
        if hasattr(zero, name):
            return [parameter for group in getattr(zero, name) for parameter in group]
    return []


def masters(zero: Any) -> list[Tensor]:
    """The flat fp32 weights that this rank updates."""
    for name in (
        "single_partition_of_fp32_groups",
        "fp32_groups_flat_partition",
        "fp32_partitioned_groups_flat",
    ):
        if hasattr(zero, name):
            return list(getattr(zero, name))
    return []


def groups_of_masters(zero: Any) -> list[int]:
    """For each of `masters`, the index of its parameter group in the inner optimizer."""
    numbers = getattr(zero, "sub_group_to_group_id", None)  # stage 3 splits large groups
    count = len(masters(zero))
    return [number if numbers is None else numbers[number] for number in range(count)]


def flat_weights(zero: Any) -> list[Tensor]:
    """Stages 1 and 2: the active layer's whole flat weights; its parameters are views of them."""
    return [*getattr(zero, "bit16_groups_flat", []), *getattr(zero, "bf16_groups_flat", [])]


def forget_gradients(zero: Any) -> None:
    """Zero what stage 3 keeps of a step's gradients: a parameter without one would have the last.

    It writes a gradient over the one before, and leaves alone what gets none.
    """
    buffer = getattr(zero, "grad_partitions_flat_buffer", None)
    if buffer is not None:
        buffer.zero_()


def gradient_buffers(zero: Any) -> list[Tensor]:
    """Current gradients and the buffers they are reduced in."""
    found = [p.grad for p in trained_parameters(zero) if p.grad is not None]
    found += list(getattr(zero, "fp32_groups_gradients_flat", []))
    found += [m.grad for m in masters(zero) if m.grad is not None]
    for gradients in (getattr(zero, "averaged_gradients", None) or {}).values():
        found += [g for g in gradients or [] if g is not None]
    if getattr(zero, "grad_partitions_flat_buffer", None) is not None:
        found.append(zero.grad_partitions_flat_buffer)
    for bucket in getattr(zero, "ipg_buckets", {}).values():
        buffers = bucket.buffer if isinstance(bucket.buffer, list) else [bucket.buffer]
        found += [buffer for buffer in buffers if buffer is not None]
    return found


def fragment(zero: Any, parameter: Any, key: str | None = None) -> tuple[Tensor, int]:
    """This rank's part of an active parameter's master, or of its moment `key`.

    Returns:
        A flat view to read and write, possibly empty, and its offset in the flattened parameter.
    """
    if hasattr(parameter, "ds_id"):
        part, _ = zero._get_fp32_opt_state_partition(
            parameter, release_swap_buffers=True, optim_state_key=key
        )
        return _unpadded(part, parameter)
    mapping = parameter._hp_mapping
    if mapping is None:
        return torch.empty(0), 0
    return mapping.get_hp_fragment(key).detach(), mapping.lp_fragment_address.start


def stored(parameter: Any) -> tuple[Tensor, int]:
    """This rank's part of a stored weight, like `fragment`: stage 3's partition, else whole."""
    if hasattr(parameter, "ds_id"):
        return _unpadded(parameter.ds_tensor.data, parameter)
    return parameter.detach().view(-1), 0


def _unpadded(part: Tensor, parameter: Any) -> tuple[Tensor, int]:
    start = distributed.rank() * part.numel()
    return part.detach()[: max(0, parameter.ds_numel - start)], min(start, parameter.ds_numel)


def link_moments(zero: Any) -> None:
    """Let `fragment` find all current moments of the inner optimizer.

    Stages 1 and 2 link them only once, in their first step, when only the first group has any.
    """
    if not isinstance(zero, DeepSpeedZeroOptimizer_Stage3):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


# ---- communication volume


class SentBytes:
    """Counts the payload of DeepSpeed's collectives since `reset`, each as its whole tensor.

    Scalars (norms) and integers (checks) are left out. All engines of a process share one count.
    """

    def __init__(self) -> None:
        backend = comm.cdb
        if not hasattr(backend, "_lwo_sent"):
            backend._lwo_sent = [0]
            for name in _COLLECTIVES:
                if hasattr(backend, name):
                    setattr(backend, name, _counted(getattr(backend, name), backend._lwo_sent))
        self._count = backend._lwo_sent

    @property
    def total(self) -> int:
        return int(self._count[0])

    def reset(self) -> None:
        self._count[0] = 0


def _counted(collective: Any, count: list[int]) -> Any:
    def counted(*args: Any, **kwargs: Any) -> Any:
        count[0] += max(_payload(value) for value in (*args, *kwargs.values()))
        return collective(*args, **kwargs)

    return counted


def _payload(value: Any) -> int:
    if isinstance(value, Tensor):
        return (
            value.numel() * value.element_size()
            if value.is_floating_point() and value.numel() > 1
            else 0
        )
    return sum(_payload(item) for item in value) if isinstance(value, list | tuple) else 0
