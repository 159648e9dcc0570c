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

Format = Literal[
    "code",
    "jsonl",
    "concode",
    "code-to-text",
    "code-to-code-trans",
    "code-refinement",
    "devign",
    "codexglue-completion",
    "repobench",
    "crosscodeeval",
]


class DataConfig(Settings):
    """Where examples come from."""

    source: str | None = Field(
        None, description="a folder of source files, or a git repository (folder or URL)"
    )
    format: Format = Field(
        "code",
        description=(
            "what the source holds: code, or a data set, a file or a folder of files, in the format"
            " jsonl, concode, code-to-text, code-to-code-trans, code-refinement, devign,"
            " codexglue-completion, repobench or crosscodeeval"
        ),
    )
    fields: dict[Literal["source", "target"], str] = Field(
        {},
        description=(
            "names of the fields of a data set, such as {source: question, target: answer}; of"
            " parallel files, their endings; unset: the format's own"
        ),
    )
    held_out_source: str | None = Field(
        None, description="data set to score instead of a part of data.source"
    )
    validation_source: str | None = Field(
        None, description="data set that evaluate_on: validation scores"
    )
    prompt: str | None = Field(
        None,
        description=(
            "text given to the model, with {source} where an example's goes; unset: the task's own"
        ),
    )
    chat: bool = Field(
        False, description="give the prompt as a user's message, by the model's chat template"
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
        description="share of the files kept for choosing settings; not for training or scores",
    )
    evaluate_on: Literal["held_out", "validation"] = Field(
        "held_out", description="which files are scored; validation: to choose settings"
    )
    retrieval: int = Field(
        0,
        ge=0,
        description=(
            "put up to this many similar pieces of the training data (BM25) before each held-out"
            " context: passages of files, in at most half of its room, or in a task from text to"
            " text worked examples, as long as they fit; 0: none"
        ),
    )
    retrieval_in_training: bool = Field(
        False,
        description=(
            "put them before training examples, too; never an example before itself, nor code from"
            " the same file"
        ),
    )
    split: Literal["hash", "time"] = Field(
        "hash",
        description="which files are held out: by the hash of their content, or those that git"
        " says were changed last",
    )
    near_duplicates: float | None = Field(
        0.85,
        gt=0,
        le=1,
        description="leave out training files and pairs whose similarity to a scored one is at"
        " least this: Jaccard index of token 5-grams; null: leave out only equal ones",
    )
    max_commits: int = Field(
        10_000, ge=1, description="newest commits to look for fixes in (tasks repair, defect)"
    )
    cache: str | None = Field(None, description="folder of tokenised data; unset: <storage>/cache")

    @model_validator(mode="after")
    def _check_split(self) -> Self:
        if self.held_out_fraction + self.validation_fraction >= 1:
            raise ValueError(
                f"held_out_fraction = {self.held_out_fraction:g} and validation_fraction ="
                f" {self.validation_fraction:g} leave no files to train on; make them smaller"
            )
        unsplit = self.format == "code" and not self.validation_fraction
        if self.evaluate_on == "validation" and unsplit:
            raise ValueError(
                "evaluate_on: validation needs a validation_fraction, such as 0.1; set it"
            )
        if self.retrieval_in_training and not self.retrieval:
            raise ValueError(
                "retrieval_in_training needs data.retrieval, how many to put; set it, such as 3"
            )
        return self

    @model_validator(mode="after")
    def _check_data_set(self) -> Self:
        if self.prompt is not None and "{source}" not in self.prompt:
            raise ValueError("prompt has no {source}, where the text of an example goes; add it")
        if self.format != "code" and self.split == "time":
            raise ValueError(
                f"split: time needs a git history, but format is {self.format}; set split: hash"
            )
        if self.format == "code":
            for name in ("fields", "held_out_source", "validation_source"):
                if getattr(self, name):
                    raise ValueError(
                        f"{name} needs a data set, but format is code; set data.format, such as"
                        " jsonl"
                    )
        return self
