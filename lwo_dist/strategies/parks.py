"""What an inactive layer keeps on the host: moments, and the bits lost in a 16-bit weight."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["HostParks", "join", "split"]


class HostParks:
    """Copies of this rank's tensors by layer and key, in host memory, pinned if CUDA is available.

    A prefetched park is also on the device until it is taken or replaced.
    """

    def __init__(self) -> None:
        self._parked: dict[str, dict[str, Tensor]] = {}
        self._arriving: dict[str, torch.cuda.Event] = {}  # until then a park is not to be read
        self._ahead: dict[str, tuple[dict[str, Tensor], torch.cuda.Event]] = {}
        self._stream: torch.cuda.Stream | None = None

    def put(self, layer: str, tensors: Mapping[str, Tensor]) -> None:
        """Park `tensors`, in addition to what the layer has parked under other keys.

        Does not wait for the device.
        """
        self._ahead.pop(layer, None)
        if not tensors:
            return
        parked = self._parked.setdefault(layer, {})
        for key, tensor in tensors.items():
            parked[key] = torch.empty(
                tensor.shape, dtype=tensor.dtype, pin_memory=torch.cuda.is_available()
            )
            parked[key].copy_(tensor.detach(), non_blocking=True)
            if tensor.is_cuda:
                stream = torch.cuda.current_stream(tensor.device)
                self._arriving[layer] = stream.record_event()

    def drop(self, layer: str) -> None:
        self._ahead.pop(layer, None)
        self._arriving.pop(layer, None)
        self._parked.pop(layer, None)

    def get(self, layer: str) -> dict[str, Tensor]:
        """The parked tensors on the host; {} if there are none. Do not modify them.

        Waits until they have arrived.
        """
        if layer in self._arriving:
            self._arriving.pop(layer).synchronize()
        return self._parked.get(layer, {})

    def prefetch(self, layer: str, device: torch.device) -> None:
        """Start copying a layer's park to `device` asynchronously. Does nothing on a CPU.

        The copy uses device memory until `take`, so call this shortly before.
        """
        if device.type != "cuda" or layer not in self._parked or layer in self._ahead:
            return
        self._stream = self._stream or torch.cuda.Stream(device)
        with torch.cuda.stream(self._stream):
            if layer in self._arriving:
                self._stream.wait_event(self._arriving[layer])
            ahead = {
                key: tensor.to(device, non_blocking=True)
                for key, tensor in self._parked[layer].items()
            }
            self._ahead[layer] = ahead, self._stream.record_event()

    def take(self, layer: str, device: torch.device) -> dict[str, Tensor]:
        """Remove a layer's park and return it as tensors on `device`; {} if nothing is parked."""
        parked = self._parked.pop(layer, {})
        arriving = self._arriving.pop(layer, None)
        if arriving is not None and device.type == "cuda":
            torch.cuda.current_stream(device).wait_event(arriving)
        elif arriving is not None:
            arriving.synchronize()
        if layer not in self._ahead:
            return {key: tensor.to(device, non_blocking=True) for key, tensor in parked.items()}
        ahead, arrived = self._ahead.pop(layer)
        current = torch.cuda.current_stream(device)
        current.wait_event(arrived)
        for tensor in ahead.values():
            tensor.record_stream(current)  # it was allocated on the copy stream
        return ahead

    @property
    def nbytes(self) -> int:
        """Bytes on the host, without scalars (a step count per tensor), as for optimizer state."""
        return sum(
            t.nbytes for tensors in self._parked.values() for t in tensors.values() if t.dim()
        )


# [Note: A master in 16 bits]
# A bf16 weight is the fp32 master rounded to nearest, so read as integers, the bits of the two
# differ by at most 2^15. The master's low 16 bits, as a signed number, are that difference: adding
# it to the weight's bits restores the master. One value is ambiguous: halfway, +2^15, is rounded
# down to an even weight, but as a signed 16-bit number it reads -2^15, which is halfway below.
# These elements, about one in 2^16, are listed separately.


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """The bits of `master` (fp32, any shape) lost in rounding to bf16; `join` restores it.

    Returns:
        The low 16 bits, int16, flat; and the flat indices, int64, of elements exactly halfway above
        their weight. NaNs stay NaN, but the payload may change.
    """
    bits = master.detach().contiguous().view(torch.int32).view(-1)
    low = bits.view(torch.int16)[::2].clone()  # low half first: little-endian, as on all GPU hosts
    halfway = (bits - _bits(master.detach().to(torch.bfloat16)) == 2**15).nonzero().view(-1)
    return low, halfway


def join(weight: Tensor, low: Tensor, halfway: Tensor) -> Tensor:
    """The fp32 master from its rounding `weight` (bf16, any shape) and the results of `split`."""
    bits = _bits(weight.detach()) + low
    bits[halfway] += 2**16
    return bits.view(torch.float32).view(weight.shape)


def _bits(weight: Tensor) -> Tensor:
    """The bits of bf16 weights, flat, widened to those of the equal fp32 numbers."""
    return weight.contiguous().view(torch.int16).view(-1).to(torch.int32) << 16
