"""A step without memory: the model's own forward and backward on the meta device, counted.

No family has a formula here. What autograd keeps, what checkpointing recomputes and what each
operation makes for a moment is whatever the model does; only shapes are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers.utils import import_utils

from lwo_dist.losses import summed_loss_at
from lwo_dist.orthogonal import orthogonalise_bytes
from lwo_dist.strategies.replicate import compute_in_bf16
from lwo_dist.sublayers import attention_flops

from .live import LiveBytes

__all__ = ["Batch", "Moment", "Rehearsal", "forward_in_autocast", "rehearse", "step_loss"]

ROOT = -1
"""The unit of all that is in no transformer layer."""


@dataclass(frozen=True)
class Batch:
    """A rank's micro-batch: sequences without padding, every token a label."""

    sequences: int
    length: int
    """Tokens of a sequence; of an encoder-decoder, of each side."""


@dataclass(frozen=True)
class Moment:
    """A stretch of a step."""

    phase: str
    """"forward", "loss", "backward", or "reduce": the gradients of `unit` are there."""
    unit: int
    """The transformer layer that runs, or `ROOT`."""
    live_bytes: int
    """Most bytes of activations, gradients and temporaries at one time."""
    gradient_bytes: int
    """Of those, gradients of parameters, at its end."""


@dataclass(frozen=True)
class Rehearsal:
    moments: tuple[Moment, ...]
    flops: int
    """Of forward and backward of the micro-batch."""
    kept_bytes: int
    """What lives when the forward has ended: activations that backward needs, and the logits."""
    logit_bytes: int
    """What the head and the loss add to it at the worst moment."""


def step_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The loss of a step, as the trainer computes it."""
    device = next(model.parameters()).device
    tokens = torch.zeros((batch.sequences, batch.length), dtype=torch.int64, device=device)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = torch.zeros_like(tokens)
    # The last token of a sequence predicts nothing.
    labels = torch.arange(batch.sequences * (batch.length - 1), device=device)
    return summed_loss_at(model, inputs, labels, torch.zeros_like(labels), tokens.shape)


def rehearse(
    model: nn.Module,
    units: Sequence[nn.Module],
    trained: set[str],
    batch: Batch,
    *,
    own_gradients: bool,
    used_up: Collection[str] = (),
    autocast: bool = False,
    fused_dropout: bool = True,
    loss: Callable[[nn.Module, Batch], Tensor] = step_loss,
) -> Rehearsal:
    """Forward and backward of one micro-batch.

    Args:
        model: on the meta device, in the dtype of the computation; of fake tensors for `autocast`.
        units: the transformer layers that are gathered and reduced one by one.
        trained: names of the parameters that are trained in this visit.
        own_gradients: gradients are new tensors that are dropped once their unit is reduced; else
            they are added into buffers that are not counted.
        used_up: parameters that are updated without state as soon as they have their gradient.
        autocast: bf16 as `torch.autocast` computes it, weights in fp32. It leaves tensors of the
            meta device as they are.
        fused_dropout: attention with dropout is fused too, as on a GPU.
    """
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in trained)
        parameter.grad = None
    added = sorted(trained.difference(used_up))
    buffers = [] if own_gradients else [torch.empty_like(parameters[name]) for name in added]
    for name, buffer in zip(added, buffers, strict=False):
        parameters[name].grad = buffer
    own = [parameters[name] for name in added]
    some = next(model.parameters())
    fake = some.fake_mode if isinstance(some, FakeTensor) else nullcontext()
    watch = _Watch(LiveBytes(ignored=[*parameters.values(), *model.buffers(), *buffers]), units)
    shapes = _ShapesOnly()
    with (
        fake,
        _not_traced(),
        _fused_attention(fused_dropout),
        shapes,
        watch.live,
        watch.hooks(
            model, own if own_gradients else [], [parameters[name] for name in sorted(used_up)]
        ),
    ):
        with forward_in_autocast(model) if autocast else nullcontext():
            value = loss(model, batch)
        watch.end("loss", ROOT)
        kept = watch.live.now
        watch.in_backward = True
        value.backward()
        watch.end("backward", ROOT)
        watch.reduce(ROOT)
        del value
    for parameter in parameters.values():
        parameter.grad = None
    head = max(moment.live_bytes for moment in watch.moments if moment.phase == "loss")
    return Rehearsal(tuple(watch.moments), shapes.flops, kept, head)


class _Watch:
    """Cuts a step into moments."""

    def __init__(self, live: LiveBytes, units: Sequence[nn.Module]):
        self.live = live
        self.moments: list[Moment] = []
        self.in_backward = False
        self._units = units
        self._owners = {
            id(parameter): number
            for number, unit in enumerate(units)
            for parameter in unit.parameters()
        }
        self._gradients: dict[int, list[nn.Parameter]] = {}

    def end(self, phase: str, unit: int) -> None:
        """The stretch that ends now was of `unit`."""
        whole = [p.grad for group in self._gradients.values() for p in group]
        gradients = sum(gradient.nbytes for gradient in whole if gradient is not None)
        self.moments.append(Moment(phase, unit, self.live.peak, gradients))
        self.live.peak = self.live.now

    def reduce(self, unit: int) -> None:
        """The gradients of `unit`, or at the end of all units, are whole."""
        for number in [unit] if unit != ROOT else [*self._gradients]:
            if number in self._gradients:
                self.end("reduce", number)
                for parameter in self._gradients.pop(number):
                    parameter.grad = None
                self.live.peak = self.live.now

    @contextmanager
    def hooks(
        self, model: nn.Module, trained: Sequence[nn.Parameter], used_up: Sequence[nn.Parameter]
    ) -> Iterator[None]:
        handles: list[Any] = [model.register_forward_hook(self._after(ROOT))]
        for number, unit in enumerate(self._units):
            handles.append(unit.register_forward_pre_hook(self._before(number), with_kwargs=True))
            handles.append(unit.register_forward_hook(self._after(number)))
        for parameter in trained:
            handles.append(parameter.register_post_accumulate_grad_hook(self._note))
        for parameter in used_up:
            handles.append(parameter.register_post_accumulate_grad_hook(self._use_up))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _note(self, parameter: nn.Parameter) -> None:
        found = self._gradients.setdefault(self._owners.get(id(parameter), ROOT), [])
        if all(parameter is not other for other in found):
            found.append(parameter)

    def _use_up(self, parameter: nn.Parameter) -> None:
        if parameter.dim() >= 2:
            needed = orthogonalise_bytes(parameter.shape)
            self.live.add(needed)
            self.live.add(-needed)
        parameter.grad = None

    def _before(self, number: int) -> Callable[..., None]:
        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            if self.in_backward:
                return  # recomputed
            self.end("forward", ROOT)
            first = next((t for t in (*args, *kwargs.values()) if _needs_grad(t)), None)
            if first is not None:
                first.register_hook(lambda gradient: self._passed(number))

        return before

    def _after(self, number: int) -> Callable[..., None]:
        def after(module: nn.Module, args: Any, output: Any) -> None:
            if self.in_backward:
                return
            self.end("forward", number)
            if number == ROOT:
                return
            first = output[0] if isinstance(output, tuple) else output
            if _needs_grad(first):
                first.register_hook(lambda gradient: self.end("backward", ROOT))

        return after

    def _passed(self, number: int) -> None:
        self.end("backward", number)
        self.reduce(number)


def _needs_grad(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


@contextmanager
def _fused_attention(with_dropout: bool) -> Iterator[None]:
    """Attention as the fused kernels compute it: on the meta device torch would choose the plain
    one, whose [tokens, tokens] matrices no device makes.

    A function mode would not reach what is recomputed in backward.
    """
    plain = functional.scaled_dot_product_attention

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        learned = attn_mask is not None and attn_mask.requires_grad
        if query.dim() != 4 or learned or (dropout_p and not with_dropout):
            return plain(
                query,
                key,
                value,
                attn_mask,
                dropout_p,
                is_causal,
                scale=scale,
                enable_gqa=enable_gqa,
            )
        mask = None if attn_mask is None else attn_mask.to(query.dtype)
        attended: Tensor
        attended, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, is_causal, attn_mask=mask, scale=scale
        )
        return attended

    functional.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = plain


@contextmanager
def forward_in_autocast(model: nn.Module) -> Iterator[None]:
    """As `replicate` computes in bf16: the loss is not in it."""
    plain = model.forward
    compute_in_bf16(model, "cpu")
    try:
        yield
    finally:
        model.forward = plain


@contextmanager
def _not_traced() -> Iterator[None]:
    """For transformers fake tensors are those of a compiler, for which it makes masks that a run
    does not make.
    """
    plain = import_utils.is_fake_tensor
    import_utils.is_fake_tensor = lambda tensor: False
    try:
        yield
    finally:
        import_utils.is_fake_tensor = plain


class _ShapesOnly(TorchDispatchMode):
    """Counts FLOPs, and stands in for what the meta device lacks: a value that the host reads is 1
    (a mask without padding), and products of groups of rows are of any dtype.

    FlopCounterMode is not used: it holds on to what checkpointing frees.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _ATEN._local_scalar_dense.default:
            return args[0].dtype == torch.bool or 1
        if func is _ATEN._grouped_mm.default:
            result = _grouped_product(*args)
        else:
            result = func(*args, **kwargs)
        packet = func._overloadpacket
        if packet in _FLOPS:
            self.flops += _FLOPS[packet](*args)
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=result)
        return result


def _grouped_product(left: Tensor, right: Tensor, ends: Tensor | None = None, *_: Any) -> Tensor:
    if left.dim() == right.dim() == 2:  # of rows that both have: the gradient of the weights
        assert ends is not None
        return left.new_empty((len(ends), left.shape[0], right.shape[1]))
    batch = left.shape[:1] if left.dim() == right.dim() == 3 else ()
    return left.new_empty((*batch, left.shape[-2], right.shape[-1]))


def _grouped_flops(left: Tensor, right: Tensor, *_: Any) -> int:
    return 2 * left.numel() * right.shape[-1]


def _attention_flops(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> int:
    return attention_flops(query.shape, key.shape, value.shape)


def _attention_backward_flops(_: Any, query: Tensor, key: Tensor, value: Tensor, *__: Any) -> int:
    """The scores again, and two products for each of the two."""
    return 5 * _attention_flops(query, key, value) // 2


_ATEN = torch.ops.aten
_FLOPS: dict[Any, Callable[..., int]] = {
    _ATEN._grouped_mm: _grouped_flops,
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}
