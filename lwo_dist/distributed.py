"""The process group and the few collectives that the package calls directly.

Every function also works without a process group, as a world of one process.
"""

from __future__ import annotations

import os
import pickle
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from .errors import UserError

__all__ = [
    "all_gather",
    "all_reduce",
    "all_to_all",
    "assert_same_on_all_ranks",
    "barrier",
    "broadcast_object",
    "errors_on_all_ranks",
    "every_rank_computes_bf16",
    "first_reason",
    "gather_floats",
    "gather_objects",
    "init_process_group",
    "local_device",
    "loopback_only",
    "max_over_ranks",
    "on_rank_0",
    "rank",
    "reduce_scatter",
    "silent_ranks",
    "start_all_gather",
    "world_size",
]

T = TypeVar("T")

# torch 2.13 renames these two and warns about the old names; 2.11 has only the old ones.
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)

# World group -> gloo group of the same ranks. The first waits up to a day, the second for torch's
# default timeout.
_patient_groups: dict[Any, dist.ProcessGroup] = {}
_cpu_groups: dict[Any, dist.ProcessGroup] = {}


def rank(group: dist.ProcessGroup | None = None) -> int:
    """This process's number in `group`; None: among all ranks."""
    return dist.get_rank(group) if dist.is_initialized() else 0


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """The number of ranks in `group`; None: of all ranks."""
    return dist.get_world_size(group) if dist.is_initialized() else 1


def local_device() -> torch.device:
    """This worker's GPU, from LOCAL_RANK, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def every_rank_computes_bf16(device: torch.device) -> bool:
    """Whether the `device` of every rank is a GPU with bf16 arithmetic of its own. A collective."""
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return all(gather_objects(native))


def init_process_group(timeout_s: int) -> torch.device:
    """Join the group that torchrun's environment describes, or reuse the one Ray Train has created.

    gloo on CPUs; nccl, bound to this worker's GPU, on GPUs. Without RANK in the environment, create
    a group of one, because FSDP2 needs a device mesh.

    Returns:
        The device that this worker computes on.
    """
    device = local_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if dist.is_initialized():
        return device
    timeout = timedelta(seconds=timeout_s)
    options: dict[str, Any] = {"device_id": device} if device.type == "cuda" else {}
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        if os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE"):
            os.environ.update(loopback_only())
        dist.init_process_group(backend, timeout=timeout, **options)
    else:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(
            backend, store=store, rank=0, world_size=1, timeout=timeout, **options
        )
    return device


def leave() -> None:
    """Leave the process group, and end the threads of it and of the groups made beside it."""
    _patient_groups.clear()
    _cpu_groups.clear()
    dist.destroy_process_group()


def loopback_only() -> dict[str, str]:
    """Variables that make gloo and NCCL listen on loopback only, except those already set.

    For ranks that are all on one machine. Neither library authenticates connections.
    """
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    return {name: loopback for name in names if loopback and name not in os.environ}


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def reduce_scatter(output: torch.Tensor, flat: torch.Tensor) -> None:
    """Sum `flat` (world_size x n elements) over ranks; rank r gets the r-th part in `output`."""
    if world_size() == 1:
        output.copy_(flat)
    else:
        _reduce_scatter(output, flat)


def all_gather(flat: torch.Tensor, shard: torch.Tensor) -> None:
    """Concatenate every rank's `shard` into `flat`; `shard` may be this rank's slice of `flat`."""
    if world_size() > 1:
        _all_gather(flat, shard)
    elif shard.data_ptr() != flat.data_ptr():
        flat.copy_(shard)


def start_all_gather(flat: torch.Tensor, shard: torch.Tensor) -> dist.Work | None:
    """As `all_gather`, in the background: `flat` is whole after `wait` of the result, if any.

    On a GPU `wait` makes the current stream wait, not the host.
    """
    if world_size() > 1:
        work: dist.Work = _all_gather(flat, shard, async_op=True)
        return work
    all_gather(flat, shard)
    return None


def reduce_to(tensor: torch.Tensor, owner: int) -> None:
    """Sum `tensor` over ranks, in place on rank `owner`; elsewhere its contents are undefined."""
    if world_size() > 1:
        dist.reduce(tensor, owner)


def start_broadcast(tensor: torch.Tensor, owner: int) -> dist.Work | None:
    """Send rank `owner`'s `tensor` to all, in the background, as `start_all_gather`."""
    if world_size() == 1:
        return None
    work: dist.Work = dist.broadcast(tensor, owner, async_op=True)
    return work


def all_reduce(tensor: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """Sum `tensor` over the ranks of `group`, in place; every rank gets the same bits."""
    if world_size(group) > 1:
        dist.all_reduce(tensor, group=group)
    return tensor


def all_reduce_max(tensor: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """The maximum of each element over the ranks of `group`, in place."""
    if world_size(group) > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group)
    return tensor


def all_to_all(
    tensor: torch.Tensor, to: Sequence[int], of: Sequence[int], group: dist.ProcessGroup
) -> torch.Tensor:
    """Send the first `to[0]` rows of `tensor` to the first rank of `group`, the next `to[1]` to the
    second and so on; the result has `of[0]` rows of the first rank, `of[1]` of the second.
    """
    if world_size(group) == 1:
        return tensor
    received = tensor.new_empty(sum(of), *tensor.shape[1:])
    dist.all_to_all_single(received, tensor, list(of), list(to), group=group)
    return received


def max_over_ranks(values: list[float], device: torch.device) -> list[float]:
    """The maximum of each value over ranks."""
    if world_size() == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return [float(v) for v in tensor.tolist()]


def gather_floats(values: list[float], device: torch.device) -> list[list[float]]:
    """Every rank's `values` in rank order; all ranks pass the same number of values."""
    if world_size() == 1:
        return [values]
    mine = torch.tensor(values, dtype=torch.float64, device=device)
    everyone = torch.empty(world_size() * len(values), dtype=torch.float64, device=device)
    _all_gather(everyone, mine)
    return everyone.view(world_size(), len(values)).tolist()


def gather_objects(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """The `value` (small and picklable) of every rank of `group`, in rank order.

    Unlike torch's `all_gather_object`, this does not need NumPy, which the plugin alone does not
    install.
    """
    ranks = world_size(group)
    if ranks == 1:
        return [value]
    device = _device_of_collectives(group)
    mine = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8).to(device)
    sizes = torch.empty(ranks, dtype=torch.int64, device=device)
    _all_gather(sizes, torch.tensor([mine.numel()], device=device), group=group)
    longest = int(sizes.max())
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: mine.numel()] = mine
    everyone = torch.empty(ranks * longest, dtype=torch.uint8, device=device)
    _all_gather(everyone, padded, group=group)
    rows = zip(everyone.view(ranks, longest).cpu(), sizes.tolist(), strict=True)
    # A row at a time: as Python numbers a byte takes eight.
    return [pickle.loads(bytes(row[:size].tolist())) for row, size in rows]


def _device_of_collectives(group: dist.ProcessGroup | None) -> torch.device:
    """The CPU where the process group has a backend for it, else the accelerator."""
    # Such as "gloo", "nccl", or "cpu:gloo,cuda:nccl".
    if "gloo" in dist.get_backend_config(group):
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None
    return torch.device(accelerator.type, torch.accelerator.current_device_index())


def broadcast_object(value: T) -> T:
    """Rank 0's `value`, on every rank; the others wait up to a day.

    Rank 0 may be tokenising a large repository or exporting a large model, which can exceed the
    training timeout. If a rank dies meanwhile, the launcher has to notice.
    """
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=_patient_group())
    return box[0]


def _patient_group() -> dist.ProcessGroup:
    world = dist.group.WORLD
    if world not in _patient_groups:
        _patient_groups.clear()  # left over from a destroyed process group
        _patient_groups[world] = dist.new_group(backend="gloo", timeout=timedelta(days=1))
    return _patient_groups[world]


def first_reason(reason: str | None) -> str | None:
    """The `reason` of the lowest rank that has one, on every rank; None if no rank has one.

    Costs one small MAX reduction if there is none.
    """
    if world_size() == 1:
        return reason
    group = _cpu_group()
    flag = torch.tensor(int(reason is not None), dtype=torch.int32)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=group)
    if not flag.item():
        return None
    reasons: list[str | None] = [None] * world_size()
    dist.all_gather_object(reasons, reason, group=group)
    return next(other for other in reasons if other is not None)


def _cpu_group() -> dist.ProcessGroup | None:
    """All ranks on the CPU backend: a small vote does not wait for a GPU's queue."""
    world = dist.group.WORLD
    if dist.get_backend() == "gloo":
        return world
    if world not in _cpu_groups:
        _cpu_groups.clear()
        _cpu_groups[world] = dist.new_group(backend="gloo")
    return _cpu_groups[world]


def silent_ranks(timeout_s: float) -> list[int]:
    """The ranks that fail to reach a barrier, as far as rank 0 can tell; [] on other ranks.

    Call after a collective has failed. Never raises: the original failure is the one to report.
    """
    group = _patient_groups.get(dist.group.WORLD) if dist.is_initialized() else None
    if group is None:
        return []
    try:
        dist.monitored_barrier(group, timeout=timedelta(seconds=timeout_s), wait_all_ranks=True)
    except Exception as error:
        named = re.search(r"Ranks? ([\d, ]+) failed to pass", str(error))
        return [int(number) for number in named[1].split(",")] if named else []
    return []


@contextmanager
def errors_on_all_ranks() -> Iterator[None]:
    """Raise an error of one rank on all ranks, so that none is left waiting. A collective.

    If several ranks fail, the error of the lowest one is raised everywhere. Ranks wait up to a day
    for each other, or until the launcher ends them because one was interrupted. There must be no
    other collective inside, nor another such block: a rank that fails before it would leave the
    others waiting there.

    >>> with errors_on_all_ranks():
    ...     if rank() == 0:
    ...         read_the_source()

    Raises:
        UserError: some rank raised it.
        RuntimeError: some rank raised another exception; that rank re-raises the exception itself.
    """
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    told = None if own is None else (isinstance(own, UserError), str(own) or repr(own))
    everyone: list[tuple[bool, str] | None] = [told]
    if world_size() > 1:
        everyone = [None] * world_size()
        dist.all_gather_object(everyone, told, group=_patient_group())
    for failed, reason in enumerate(everyone):
        if reason is None:
            continue
        if own is not None and failed == rank():
            raise own
        is_users, message = reason
        if is_users:
            raise UserError(message) from own
        raise RuntimeError(f"rank {failed} failed: {message}") from own


def on_rank_0(fn: Callable[..., T], *args: Any) -> T:
    """Rank 0's `fn(*args)`, on every rank; an exception is raised on every rank."""
    value: Any = None
    with errors_on_all_ranks():
        if rank() == 0:
            value = fn(*args)
    result: T = broadcast_object(value)
    return result


def assert_same_on_all_ranks(
    values: dict[str, Any], what: str, groups: Sequence[dist.ProcessGroup | None] = (None,)
) -> None:
    """Check that small values, such as hashes by parameter name, are equal on all ranks.

    Args:
        groups: those of this rank, one for each dimension of a mesh: its ranks are compared.

    Raises:
        UserError: on all ranks, naming the first key that differs.
    """
    everyone = {rank(): values}
    for group in groups:
        everyone = {key: found[key] for found in gather_objects(everyone, group) for key in found}
    first_rank = min(everyone)
    first = everyone[first_rank]
    for other_rank, other in sorted(everyone.items()):
        if other == first:
            continue
        keys = [key for key in {**first, **other} if first.get(key) != other.get(key)]
        raise UserError(
            f"{what} differ between rank {first_rank} and rank {other_rank} ({len(keys)} of them,"
            f" first {keys[0]}); load the same weights on every rank, or set one seed before the"
            " model is made"
        )
