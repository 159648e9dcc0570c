"""What a line is completed from."""

from __future__ import annotations

from pydantic import Field

from .base import Settings

__all__ = ["CompletionConfig"]


class CompletionConfig(Settings):
    """Line completion, `task: completion`."""

    context_lines: int | None = Field(
        None,
        ge=1,
        description="number of lines before a held-out line that are given; unset: all that fit",
    )
    skip_comments: bool = Field(
        False, description="complete no held-out line that is a comment and nothing else"
    )
    mid_line: bool = Field(
        False,
        description="complete held-out lines from a position within, chosen by the file's hash",
    )
    fim_rate: float | None = Field(
        None,
        ge=0,
        le=1,
        description=(
            "fill in the middle: also give the lines after a held-out line, and cut and rearrange"
            " this share of the training sequences; unset: off"
        ),
    )
