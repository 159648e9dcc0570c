"""The interface of a method: model preparation, layers, visits and export."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor, nn

from lwo_dist.config import Config, LWOConfig
from lwo_dist.layers import Layer, Visit

__all__ = ["Method"]


class Method(ABC):
    """Which parameters are trained together. The hook and the trainer never check which one it is.

    A method has no state: one instance serves every model of the process.
    """

    name: str
    """The name used in the config."""
    extras: tuple[str, ...] = ()
    """The extras of the package that it needs beyond torch."""
    changes_model = False
    """Whether `prepare` adds or renames parameters. If so, a checkpoint holds more than the base
    model, and a resumed run builds the base model first and prepares it again."""

    def check(self, config: Config) -> None:
        """Refuse run settings that have no effect with this method. Raises: UserError."""

    def prepare(self, model: nn.Module, config: LWOConfig) -> None:
        """Change the model in place, before it is sharded; by default do nothing.

        All ranks call it with the same global seed. The base model's parameters may be on the meta
        device; added parameters must be on the CPU, with their initial values.
        """

    @abstractmethod
    def layers(self, model: nn.Module, config: LWOConfig) -> list[Layer]:
        """All layers that are ever trained, in the order of the forward pass.

        Raises:
            UserError: the model does not have the layers this method needs.
        """

    def visits(self, layers: Sequence[Layer]) -> list[Visit]:
        """The visits of one cycle, in model order: by default one per layer."""
        return [Visit(layer) for layer in layers]

    def export(
        self, names: Sequence[str], read: Callable[[str], Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        """Name and fp32 tensor of everything in the exported model; by default as trained.

        Args:
            names: all tensors in the checkpoint.
            read: reads one of them by name; the result is not cached.
        """
        for name in names:
            yield name, read(name)
