"""The settings of LoRA's adapters."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StringConstraints

from .base import Settings

__all__ = ["LoRAConfig"]

_Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.]{0,199}$")]


class LoRAConfig(Settings):
    """The adapters of `method: lora` (Hu et al., 2022), trained at `lwo.lr`.

    The default of `alpha` does not grow with the rank: divided by the rank, the best learning rate
    then hardly depends on it. That rate is 5 to 20 times that of full fine-tuning: 2e-4 for a model
    of billions of parameters, more for small ones (SmolLM2-135M: 1e-3).
    """

    rank: int = Field(
        16, ge=1, le=4096, description="method: lora only; rank of the adapters' two matrices"
    )
    alpha: float = Field(
        32.0, gt=0, description="method: lora only; an adapter's output is scaled by alpha / rank"
    )
    use_rslora: bool = Field(
        False,
        description="method: lora only; scale by alpha / sqrt(rank), for ranks of 64 and more",
    )
    dropout: float = Field(
        0.0, ge=0, lt=1, description="method: lora only; dropout of the adapters' input in training"
    )
    target_modules: tuple[_Name, ...] | None = Field(
        None,
        min_length=1,
        description=(
            "method: lora only; names of linear layers, such as [q_proj, v_proj]; unset: all but"
            " the head"
        ),
    )

    @property
    def scaling(self) -> float:
        """The factor of an adapter's output (Hu et al., 2022; rsLoRA: Kalajdzievski, 2023)."""
        return self.alpha / (self.rank**0.5 if self.use_rslora else self.rank)
