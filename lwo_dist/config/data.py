"""Where examples come from."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from .base import Settings

__all__ = ["NO_PASSWORD", "DataConfig"]

NO_PASSWORD = (
    "remove it from the URL, and give git the password by a credential helper, GIT_ASKPASS or an"
    " ssh key"
)
"""What to do about a password in `source`."""


class DataConfig(Settings):
    """Where examples come from."""

    source: str | None = Field(
        None, description="a folder of source files, or a git repository (folder or URL)"
    )
    use_git: bool = Field(
        True, description="in a git work tree read only the files that git tracks"
    )
    extensions: tuple[str, ...] | None = Field(
        None, description="file endings to read, such as [.py]; unset: all text"
    )
    max_file_bytes: int = Field(500_000, ge=1, description="larger files are skipped and counted")
    held_out_fraction: float = Field(
        0.15, gt=0, lt=1, description="share of the files kept for evaluation"
    )
    validation_fraction: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of the files kept for choosing settings; no training, no final score",
    )
    evaluate_on: Literal["held_out", "validation"] = Field(
        "held_out", description="which files are scored; validation: to choose settings"
    )
    retrieval: int = Field(
        0,
        ge=0,
        description=(
            "put up to so many similar passages of the training files (BM25) before each held-out"
            " context, in at most half of its room; 0: none"
        ),
    )
    retrieval_in_training: bool = Field(
        False, description="put them before training sequences, too; never from the same file"
    )
    cache: str | None = Field(None, description="folder of tokenised data; unset: <storage>/cache")

    @model_validator(mode="after")
    def _check_split(self) -> Self:
        if self.held_out_fraction + self.validation_fraction >= 1:
            raise ValueError(
                f"held_out_fraction = {self.held_out_fraction:g} and validation_fraction ="
                f" {self.validation_fraction:g} leave no files to train on; make them smaller"
            )
        if self.evaluate_on == "validation" and not self.validation_fraction:
            raise ValueError(
                "evaluate_on: validation needs a validation_fraction, such as 0.1; set it"
            )
        if self.retrieval_in_training and not self.retrieval:
            raise ValueError(
                "retrieval_in_training needs data.retrieval, the number of passages; set it, such"
                " as 3"
            )
        return self
