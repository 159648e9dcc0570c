"""The interface of a method: model preparation, layers, visits and export."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lwo_dist.config import Config, LWOConfig
from lwo_dist.errors import UserError
from lwo_dist.layers import Layer, Visit

__all__ = ["Method", "Saved"]


@dataclass(frozen=True)
class Saved:
    """What an export is made from."""

    names: Sequence[str]
    """All tensors in the checkpoint and, with `Method.trains_adapters`, in the base model."""
    read: Callable[[str], Tensor]
    """Reads one of them by name; the result is not cached."""
    model: nn.Module
    """The base model on the meta device, to look up modules; `prepare` has not changed it."""
    record: Mapping[str, Any] = field(default_factory=dict)
    """The run's record (`run_info.checkpoint_record`), its entries checked; empty for a checkpoint
    written by hand."""


class Method(ABC):
    """Which parameters are trained together. The hook and the trainer never check which one it is.

    A method has no state: one instance serves every model of the process.
    """

    name: str
    """The name used in the config."""
    extras: tuple[str, ...] = ()
    """The extras of the package that it needs beyond torch."""
    own_settings: tuple[str, ...] = ()
    """Keys of the config that only this method reads, such as `lora.rank`; a run resumes with the
    same values."""
    free_on_resume: tuple[str, ...] = ()
    """Those of `own_settings` that change no result, so that a run may resume with others."""
    changes_model = False
    """Whether `prepare` adds or renames parameters. If so, a checkpoint holds more than the base
    model, and a resumed run builds the base model first and prepares it again."""
    trains_adapters = False
    """Whether `prepare` adds all that is trained, so that the base model stays as it is. If so,
    checkpoints hold the layers only, and an export reads the base model again."""
    drops_trained = False
    """Whether `lwo.suffix_backward` drops sublayers that are trained too, which then have no
    gradient in that step. For methods that train all of them at once."""

    rate_times_width: float | None = None
    """Divided by the size of a hidden state, it is the peak learning rate where `lwo.lr` is unset.
    None: that must be set."""

    def check(self, config: Config) -> None:
        """Refuse run settings that have no effect with this method. Raises: UserError."""

    def prepare(self, model: nn.Module, config: Config) -> None:
        """Change the model in place, before it is sharded; by default do nothing.

        All ranks call it with the same global seed. The base model's parameters may be on the meta
        device; added parameters must be on the CPU, with their initial values.
        """

    def with_rate(self, model: nn.Module, config: LWOConfig) -> LWOConfig:
        """`config` with `lr` set: if it is unset, to `rate_times_width` / width, rounded to two
        significant digits.

        The width is the size of a hidden state. Adam's best rate falls in proportion to it (Yang et
        al., *Tensor Programs V*, 2022, table 3).

        Raises:
            UserError: this method has no rate, or the model has no width.
        """
        if config.lr is not None:
            return config
        self.refuse_unset_rate(config)
        assert self.rate_times_width is not None
        rate = self.rate_times_width / _width(model)
        return config.model_copy(update={"lr": float(f"{rate:.1e}")})

    def refuse_unset_rate(self, config: LWOConfig) -> None:
        """Raise UserError if neither `config` nor this method has a learning rate."""
        if config.lr is None and self.rate_times_width is None:
            raise UserError(f"method: {self.name} has no learning rate of its own; set lwo.lr")

    @abstractmethod
    def layers(self, model: nn.Module, config: LWOConfig) -> list[Layer]:
        """All layers that are ever trained, in the order of the forward pass.

        Raises:
            UserError: the model does not have the layers this method needs.
        """

    def visits(self, layers: Sequence[Layer]) -> list[Visit]:
        """The visits of one cycle, in model order: by default one per layer."""
        return [Visit(layer) for layer in layers]

    def cycle(self, layers: Sequence[Layer], config: LWOConfig) -> list[Visit]:
        """`visits`, and what `config` trains beside each active layer.

        Raises:
            UserError: `embeddings`, `stateless` or `stateless_every` would have no effect.
        """
        visits = self.visits(layers)
        if config.embeddings == "always":
            outside = tuple(layer for layer in layers if layer.is_outside)
            inside = [visit for visit in visits if not visit.active.is_outside]
            lost = {
                layer.name
                for visit in visits
                if visit not in inside
                for layer in visit.layers
                if not layer.is_outside
            }
            if not outside or not inside or len(visits) == 1 or lost:
                raise UserError(
                    f"lwo.embeddings: always does not fit method: {self.name}, which has no visits"
                    " of the embedding or the head alone beside others; set lwo.embeddings: visit"
                )
            visits = [
                replace(visit, also=tuple(dict.fromkeys((*visit.also, *outside))))
                for visit in inside
            ]
        if config.stateless != "none":
            visits = [self._with_stateless(visit, layers, config) for visit in visits]
            if not any(visit.stateless for visit in visits):
                if config.stateless_every > 1:
                    raise UserError(
                        f"lwo.stateless_every = {config.stateless_every} leaves no layer for"
                        f" lwo.stateless: {config.stateless} to update; set a smaller one"
                    )
                raise UserError(
                    f"lwo.stateless: {config.stateless} has no effect with method: {self.name},"
                    " which leaves no transformer layer out of a visit; drop it"
                )
        return visits

    def _with_stateless(self, visit: Visit, layers: Sequence[Layer], config: LWOConfig) -> Visit:
        active = layers.index(visit.active)
        others = tuple(
            layer
            for index, layer in enumerate(layers)
            if layer not in visit.stateful
            and not layer.is_outside
            and (config.stateless == "all" or layer.depth >= visit.active.depth)
            and (index - active) % config.stateless_every == 0
        )
        return replace(visit, stateless=others)

    def export(self, saved: Saved) -> Iterator[tuple[str, Tensor]]:
        """Name and fp32 tensor of everything in the exported model; by default as trained."""
        for name in saved.names:
            yield name, saved.read(name)

    def adapter(self, saved: Saved) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The adapters alone, in peft's format: adapter_model.safetensors and adapter_config.json.

        Raises:
            UserError: this method has no adapters.
        """
        raise UserError(
            f"method: {self.name} trains the model's own weights, so there is no adapter; export"
            " the model"
        )


def _width(model: nn.Module) -> int:
    """The size that most of the matrices' elements have as a dimension: that of a hidden state.

    In a transformer nearly every matrix has it. Embeddings may have others, and do not count. The
    smaller one of a tie.
    """
    elements: Counter[int] = Counter()
    for name, parameter in _matrices(model):
        if not parameter.is_floating_point():
            raise UserError(
                f"{name} is of {parameter.dtype}, packed, so that its shape says nothing of the"
                " model's width; set lr"
            )
        shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 leaves empty tensors
        for size in set(shape[-2:]):
            elements[size] += math.prod(shape)
    if not elements:
        raise UserError(f"a {type(model).__name__} has no matrices to choose a rate by; set lr")
    return max(elements, key=lambda size: (elements[size], -size))


def _matrices(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Those of linear layers, and stacks of them, as experts are."""
    for path, module in model.named_modules():
        if not isinstance(module, nn.Embedding | _ConvNd):
            for name, parameter in module.named_parameters(path, recurse=False):
                if len(getattr(parameter, "ds_shape", parameter.shape)) in (2, 3):
                    yield name, parameter
