"""The settings of `strategy: fsdp`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .base import Settings

__all__ = ["FSDPConfig"]


class FSDPConfig(Settings):
    """Sharded weights."""

    storage: Literal["fp32", "bf16"] = Field(
        "fp32",
        description=(
            "strategy: fsdp only; bf16: shards of 2 bytes a parameter, fp32 while a layer is active"
        ),
    )
