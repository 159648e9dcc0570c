"""Scores on held-out files."""

from __future__ import annotations

from pydantic import Field

from .base import Settings

__all__ = ["EvalConfig"]


class EvalConfig(Settings):
    """Scores on held-out files before, during and after training."""

    steps: int = Field(
        0, ge=0, description="evaluate every so many steps; 0: only before and after"
    )
    num_lines: int = Field(1000, ge=1, description="held-out examples to score, such as lines")
    batch_size: int = Field(32, ge=1, description="examples answered at once on a worker")
    max_new_tokens: int = Field(
        48, ge=1, description="longest answer, in tokens; longer targets are cut to it"
    )
    metric: str = Field("loss", description="what names the best checkpoint")
    """A score of the task; `Task.check` refuses another name."""
    baseline: str | None = Field(
        None,
        description=(
            "run in this storage whose scores of the untuned model are reused, instead of"
            " computing them again; same model and examples; compare sets it"
        ),
    )
