"""Saving and resuming."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .base import Settings

__all__ = ["CheckpointConfig"]


class CheckpointConfig(Settings):
    """Saving and resuming."""

    steps: int = Field(
        0,
        ge=0,
        description=(
            "save every so many steps; 0: at the end of a visit, at least checkpoint.minutes apart"
        ),
    )
    minutes: float = Field(
        5.0, ge=0, description="checkpoint.steps: 0 only; least time between two such saves"
    )
    keep: int = Field(
        1, ge=1, description="so many of the newest checkpoints stay, and the best one besides"
    )
    resume: Literal["auto", "never"] = Field(
        "auto", description="auto: go on where a run of this run_name stopped"
    )
    take_over: bool = Field(
        False,
        description="take over a run that another process is still writing; that one then stops",
    )
