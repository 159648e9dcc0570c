"""What a method must say: how the model is prepared, its layers, its visits, what is exported."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor, nn

from lwo_dist.config import Config, LWOConfig
from lwo_dist.layers import Layer, Visit

__all__ = ["Method"]


class Method(ABC):
    """Which parameters are trained together. The hook and the trainer never ask which one it is.

    A method has no state: one instance serves every model of the process.
    """

    name: str
    """As in the config."""
    extras: tuple[str, ...] = ()
    """What it needs beyond torch, as extras of the package."""
    changes_model = False
    """Whether `prepare` adds parameters or renames them. A checkpoint then holds more than the base
    model, and a resumed run makes the base model first and prepares it again."""

    def check(self, config: Config) -> None:
        """Refuse settings of a run that have no effect with this method. Raises: UserError."""

    def prepare(self, model: nn.Module, config: LWOConfig) -> None:
        """Change the model in place, before it is sharded; by default nothing is changed.

        All ranks call it with the same global seed. The parameters of the base model may lie on the
        meta device; what is added must be on the CPU, with its initial values.
        """

    @abstractmethod
    def layers(self, model: nn.Module, config: LWOConfig) -> list[Layer]:
        """All layers that are ever trained, in the order of the forward pass.

        Raises:
            UserError: the model has no such layers.
        """

    def visits(self, layers: Sequence[Layer]) -> list[Visit]:
        """The visits of one cycle, in model order: by default one for each layer."""
        return [Visit(layer) for layer in layers]

    def export(
        self, names: Sequence[str], read: Callable[[str], Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        """Name and fp32 tensor of everything in the exported model: by default as it was trained.

        Args:
            names: of all tensors in the checkpoint.
            read: gives one of them; what was read is not kept.
        """
        for name in names:
            yield name, read(name)
