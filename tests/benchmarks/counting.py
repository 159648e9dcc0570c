"""Floating-point operations and peak memory of a method's steps: counted, so that no other process
of the machine changes them.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from .rivals import Contender

__all__ = ["count_flops", "count_peak_bytes"]


def count_flops(contender: Contender, tokens: Tensor) -> float:
    """Of a step, by torch's FlopCounterMode on real steps; a mean over the visits of a cycle.

    The first step is not counted: the levers look at the model in it.

    Args:
        contender: new, with visits of one step.
        tokens: one sequence suffices: every operation counted is in proportion to their number.
    """
    contender.step(tokens)
    total = 0
    for _ in range(contender.visits):
        with FlopCounterMode(display=False, custom_mapping=_ATTENTION) as counter:
            contender.step(tokens)
        total += counter.get_total_flops()
    return total / contender.visits


def count_peak_bytes(make: Callable[[], Contender], tokens: Tensor, steps: int) -> int:
    """The most that torch's CPU allocator holds for the contender, from its making to the last of
    `steps` steps: weights, gradients, optimizer, activations, and buffers inside operations.

    Garbage in cycles is collected before each step: when it would be is a matter of chance. That of
    a contender before this one would count as freed by it.
    """
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        contender = make()
        for _ in range(steps):
            gc.collect()
            contender.step(tokens)
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = profiler.profiler.kineto_results.events()
    memory = [event for event in events if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(memory, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _forward(query: Any, key: Any, *_: Any, **__: Any) -> int:
    batch, heads, queries, width = query
    return 2 * 2 * batch * heads * queries * key[-2] * width


def _backward(gradient: Any, query: Any, key: Any, *_: Any, **__: Any) -> int:
    return 2 * _forward(query, key)


# Every kernel counts as the products of the formula: two forward, four backward. torch knows no
# formula for the CPU's kernel, and counts for the others what they compute again.
_ATTENTION = {
    getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}"): count
    for kernels, count in (
        (
            (
                "flash_attention",
                "flash_attention_for_cpu",
                "efficient_attention",
                "cudnn_attention",
            ),
            _forward,
        ),
        (
            (
                "flash_attention_backward",
                "flash_attention_for_cpu_backward",
                "efficient_attention_backward",
                "cudnn_attention_backward",
            ),
            _backward,
        ),
    )
    for kernel in kernels
}
