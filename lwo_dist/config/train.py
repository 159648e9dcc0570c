"""The training loop."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .base import Settings

__all__ = ["TrainConfig"]


class TrainConfig(Settings):
    """The training loop."""

    steps: int = Field(200, ge=1, description="optimizer steps")
    global_batch_size: int = Field(
        16, ge=1, description="sequences per optimizer step, over all workers"
    )
    sequence_length: int = Field(256, ge=8, description="tokens per sequence")
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="compute in this; weights and reductions stay fp32"
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
    max_seconds: float | None = Field(
        None,
        gt=0,
        description=(
            "wall-clock limit: then save, exit with 75 and go on when the command is given again"
        ),
    )
