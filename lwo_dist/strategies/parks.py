"""What a layer keeps on the host while it is not active: moments, and the bits that a 16-bit weight
lacks.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["HostParks", "join", "split"]


class HostParks:
    """Copies of this rank's tensors by layer and key, in host memory, pinned where there is CUDA.

    A park that was brought ahead (`prefetch`) is on the device as well, until it is taken or
    replaced.
    """

    def __init__(self) -> None:
        self._parked: dict[str, dict[str, Tensor]] = {}
        self._ahead: dict[str, tuple[dict[str, Tensor], torch.cuda.Event]] = {}
        self._stream: torch.cuda.Stream | None = None

    def put(self, layer: str, tensors: Mapping[str, Tensor]) -> None:
        """Park `tensors`, beside what the layer has parked under other keys."""
        self._ahead.pop(layer, None)
        if not tensors:
            return
        parked = self._parked.setdefault(layer, {})
        for key, tensor in tensors.items():
            parked[key] = torch.empty(
                tensor.shape, dtype=tensor.dtype, pin_memory=torch.cuda.is_available()
            )
            parked[key].copy_(tensor.detach(), non_blocking=True)
        # Whoever reads the host's copy need not ask whether it has arrived; a switch is rare enough
        # to wait.
        for device in {tensor.device for tensor in tensors.values() if tensor.is_cuda}:
            torch.cuda.current_stream(device).synchronize()

    def drop(self, layer: str) -> None:
        self._ahead.pop(layer, None)
        self._parked.pop(layer, None)

    def get(self, layer: str) -> dict[str, Tensor]:
        """What is parked, on the host; {} if nothing is. Not to be changed."""
        return self._parked.get(layer, {})

    def prefetch(self, layer: str, device: torch.device) -> None:
        """Begin to copy a layer's park to `device`, beside what the device computes. On a CPU there
        is nothing to do.

        The device holds those bytes until `take`, so call it shortly before.
        """
        if device.type != "cuda" or layer not in self._parked or layer in self._ahead:
            return
        self._stream = self._stream or torch.cuda.Stream(device)
        with torch.cuda.stream(self._stream):
            ahead = {
                key: tensor.to(device, non_blocking=True)
                for key, tensor in self._parked[layer].items()
            }
            self._ahead[layer] = ahead, self._stream.record_event()

    def take(self, layer: str, device: torch.device) -> dict[str, Tensor]:
        """Take a layer's park away, as tensors on `device`; {} if nothing is parked."""
        parked = self._parked.pop(layer, {})
        if layer not in self._ahead:
            return {key: tensor.to(device, non_blocking=True) for key, tensor in parked.items()}
        ahead, arrived = self._ahead.pop(layer)
        current = torch.cuda.current_stream(device)
        current.wait_event(arrived)
        for tensor in ahead.values():
            tensor.record_stream(current)  # it was allocated on the other one
        return ahead

    @property
    def nbytes(self) -> int:
        """Bytes on the host; scalars (a step count a tensor) are left out, as they are in the
        optimizer's state.
        """
        return sum(
            t.nbytes for tensors in self._parked.values() for t in tensors.values() if t.dim()
        )


# [Note: A master in 16 bits]
# A bf16 weight is the fp32 master rounded to nearest, so the master is within 2^15 of the weight's
# bits, read as an integer, and its low 16 bits say how far: added to the weight's bits as a signed
# number they give the master back. One value is left over. Half-way, +2^15, was rounded down to the
# even weight; as a signed 16-bit number it reads -2^15, which is the half-way below. About one
# element in 2^16 lies there: those are listed.


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """What the bf16 rounding of `master` (fp32, any shape) lacks; with the weight, `join` gives
    every bit back.

    Returns:
        The low 16 bits, int16, flat; and the flat indices, int64, of the elements that lie half-way
        above their weight. A NaN comes back as a NaN, but perhaps another one.
    """
    bits = master.detach().contiguous().view(torch.int32).view(-1)
    low = bits.view(torch.int16)[::2].clone()  # low half first, as on every machine with a GPU
    halfway = (bits - _bits(master.detach().to(torch.bfloat16)) == 2**15).nonzero().view(-1)
    return low, halfway


def join(weight: Tensor, low: Tensor, halfway: Tensor) -> Tensor:
    """The fp32 master of which `weight` (bf16, any shape) is the rounding; `low`, `halfway`: from
    `split`.
    """
    bits = _bits(weight.detach()) + low
    bits[halfway] += 2**16
    return bits.view(torch.float32).view(weight.shape)


def _bits(weight: Tensor) -> Tensor:
    """The bits of bf16 weights, flat, as those of the fp32 numbers that they stand for."""
    return weight.contiguous().view(torch.int16).view(-1).to(torch.int32) << 16
