"""Updates without optimizer state: each matrix moves along its orthogonalised gradient.

AdamW needs two moments to know how large a step each weight should take. A gradient with all its
singular values set to 1 has a known size, so it can be used as it is: this is Muon (Jordan et al.,
2024) without momentum. Scale does not matter, so these gradients are not clipped either.

Muon takes five iterations with one polynomial. Here two are enough, with the best polynomial for
each (Polar Express; Amsel et al., 2025), at 0.4 of the operations. Singular values below 0.04 of
the norm stay smaller than with five; the loss is nearly the same (tests/benchmarks/README.md).

`torch.optim.Muon` is not used: it keeps a momentum buffer for each matrix, also with a momentum of
0, computes in bf16 on every device, and cannot skip a step by a tensor on the device.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "ITERATIONS",
    "bytes_at_once",
    "matrices_at_once",
    "orthogonalise",
    "orthogonalise_bytes",
    "orthogonalise_flops",
    "same_shape",
    "update_without_state",
]

_QUINTICS = (
    (7.0441, -19.4937, 14.169),
    (2.7004, -2.0091, 0.4562),
)
"""Of each iteration, the coefficients of x -> a x + b x^3 + c x^5. One after the other they bring
singular values between 0.04 and 1 to between 0.71 and 1.29: no two odd polynomials of degree 5
come nearer to 1. Smaller ones grow at most 19-fold."""
ITERATIONS = len(_QUINTICS)
_AT_ONCE = 2**24
"""Elements that are orthogonalised together; a larger matrix comes alone."""
_MARGIN = 1.02
"""The first polynomial is steep at 1: a norm that bf16 makes 1 % too small would turn 1 into
2.9."""


def orthogonalise(matrices: Tensor) -> Tensor:
    """About U V^T of each matrix U S V^T, by Newton-Schulz iterations; zeros stay zeros.

    Args:
        matrices: [..., rows, columns]. Float32 is computed in bf16 on a GPU, and on a CPU whose
            matrix unit has bf16 (AMX): five times as fast there.

    Returns:
        Of the same shape and dtype, contiguous.

    Example:
        >>> orthogonalise(2 * torch.eye(3)).round(decimals=0)
        tensor([[1., 0., 0.],
                [0., 1., 0.],
                [0., 0., 1.]])
    """
    # The square of a small number is 0 in float32.
    largest = matrices.abs().amax((-2, -1), keepdim=True)
    x = matrices / largest.clamp_min(torch.finfo(matrices.dtype).tiny)
    if x.dtype == torch.float32 and _multiplies_bf16(x.device.type):
        x = x.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    norm = x.norm(dim=(-2, -1), keepdim=True).clamp_min(0.5)  # a largest entry of 1, or zeros
    x = (x / (_MARGIN * norm)).reshape(-1, *x.shape[-2:])
    for a, b, c in _QUINTICS:
        gram = x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, gram, x, beta=a)
    found = x.mT if tall else x
    return found.to(matrices.dtype).contiguous().view(matrices.shape)


@functools.cache
def _multiplies_bf16(device_type: str) -> bool:
    """Whether the device multiplies matrices faster in bf16 than in float32."""
    if device_type == "cpu":
        capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        return bool(capabilities.get("amx_bf16"))  # an older torch does not know
    return device_type == "cuda"


def orthogonalise_flops(shapes: Iterable[Sequence[int]]) -> int:
    """Floating-point operations of `orthogonalise` on matrices of these shapes; others cost none.

    Per iteration 2 m^2 n for the Gram matrix, 2 m^3 for its square and 2 m^2 n for the product,
    with m <= n.
    """
    total = 0
    for shape in shapes:
        if len(shape) >= 2:
            m, n = sorted(shape[-2:])
            total += math.prod(shape[:-2]) * ITERATIONS * (4 * m * m * n + 2 * m**3)
    return total


def orthogonalise_bytes(shape: Sequence[int]) -> int:
    """Peak bytes of `orthogonalise` for float32 of this shape: the input, the iterate and the next
    one, and a Gram matrix. In bf16 it is less.
    """
    m, n = sorted(shape[-2:])
    return 4 * math.prod(shape[:-2]) * (3 * m * n + m * m)


def matrices_at_once(count: int, shape: Sequence[int]) -> int:
    """How many of `count` matrices of this shape are orthogonalised together, with as many kernels
    as one takes.
    """
    return max(1, min(count, _AT_ONCE // math.prod(shape)))


def bytes_at_once(shapes: Sequence[Sequence[int]]) -> int:
    """The most that `orthogonalise` needs to update matrices of these shapes."""
    return max(
        (
            orthogonalise_bytes((matrices_at_once(len(members), shape), *shape))
            for shape, members in same_shape(shapes).items()
        ),
        default=0,
    )


def same_shape(shapes: Sequence[Sequence[int]]) -> dict[tuple[int, ...], list[int]]:
    """The indices of the matrices of each shape; vectors and scalars are left out."""
    same: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for number, shape in enumerate(shapes):
        if len(shape) >= 2:
            same[tuple(shape)].append(number)
    return same


def _whole(gradients: list[Tensor], shape: tuple[int, ...]) -> Iterator[Tensor]:
    number = matrices_at_once(len(gradients), shape)
    for start in range(0, len(gradients), number):
        yield orthogonalise(torch.stack(gradients[start : start + number]))


@torch.no_grad()
def update_without_state(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    lr: float,
    weight_decay: float,
    skipped: Tensor,
    *,
    shapes: Sequence[Sequence[int]] | None = None,
    orthogonalised: Callable[[list[Tensor], tuple[int, ...]], Iterable[Tensor]] = _whole,
) -> None:
    """Move each matrix against its gradient's direction, in place.

    It moves by `lr` x sqrt(the larger dimension) x `orthogonalise`. The entries then have a root
    mean square near 1, and move by about `lr`, as in AdamW's first steps: one rate serves both.
    Vectors (norms, biases) stay as they are until their layer is active: normalised, a gradient of
    rounding errors, such as that of a key's bias, would move as far as any other.

    Args:
        weights, gradients: of the same shapes and dtypes.
        weight_decay: decoupled, as AdamW's.
        skipped: 0-dim, on the device; 1.0 leaves every weight as it is.
        shapes: of the whole tensors, where `weights` and `gradients` are parts of them.
        orthogonalised: takes the gradients of matrices of one shape, and that shape. It gives the
            same part of `orthogonalise` of each, several at a time as a stack, [some, rows, ...];
            rows beyond those of the gradient are padding.
    """
    for shape, members in same_shape(shapes or [g.shape for g in gradients]).items():
        scale = math.sqrt(max(shape[-2:]))
        left = [weights[i] for i in members]
        for stack in orthogonalised([gradients[i] for i in members], shape):
            some, left = left[: len(stack)], left[len(stack) :]
            if weight_decay:
                torch._foreach_add_(_rows(stack, some), some, alpha=weight_decay / scale)
            stack = torch.where(skipped > 0, 0.0, stack)
            torch._foreach_add_(some, _rows(stack, some), alpha=-lr * scale)
            del stack  # before the next one is computed


def _rows(stack: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    return [found[: len(weight)] for found, weight in zip(stack, weights, strict=True)]
