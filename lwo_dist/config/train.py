"""The training loop."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from .base import Settings

__all__ = ["TrainConfig"]


class TrainConfig(Settings):
    """The training loop."""

    steps: int = Field(300, ge=0, description="optimizer steps; 0: train.epochs says how many")
    epochs: float | None = Field(
        None, gt=0, description="passes over the training sequences, instead of train.steps"
    )
    global_batch_size: int = Field(
        16, ge=1, description="sequences per optimizer step, over all workers"
    )
    sequence_length: int = Field(256, ge=8, description="tokens per sequence")
    packing: bool = Field(
        False,
        description=(
            "pack short examples several to a sequence; none attends to another. Pays where most"
            " are much shorter than train.sequence_length; windows of completion are full already"
        ),
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description=(
            "compute in this; auto: bf16 where every worker's GPU has it, else fp32; weights and"
            " reductions stay fp32"
        ),
    )
    gradient_checkpointing: bool = Field(
        False, description="recompute activations in backward (non-reentrant)"
    )
    logging_steps: int = Field(
        10,
        ge=1,
        description="a metrics point every so many steps; about 30 of them become progress lines",
    )
    max_skipped_steps: int = Field(
        10, ge=1, description="stop after so many non-finite steps in a row"
    )
    patience: int | None = Field(
        None,
        ge=1,
        description=(
            "end after this many evaluations in a row without a better eval.metric; unset: never;"
            " the learning-rate schedule is not shortened"
        ),
    )
    max_seconds: float | None = Field(
        None,
        gt=0,
        description=(
            "wall-clock limit: then save, exit with 75 and go on when the command is given again"
        ),
    )

    @model_validator(mode="before")
    @classmethod
    def _leave_steps_to_epochs(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("epochs") is not None:
            return {"steps": 0, **values}
        return values

    @model_validator(mode="after")
    def _check_length(self) -> Self:
        if self.epochs is None and self.steps == 0:
            raise ValueError("steps = 0 needs train.epochs; set train.steps or train.epochs")
        if self.epochs is not None and self.steps:
            raise ValueError(
                f"steps = {self.steps} and epochs = {self.epochs:g} both say how long the run is;"
                " drop one, or override it with train.steps=0 or train.epochs=null"
            )
        return self
