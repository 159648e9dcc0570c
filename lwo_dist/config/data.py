"""Where examples come from."""

from __future__ import annotations

from pydantic import Field

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
    cache: str | None = Field(None, description="folder of tokenised data; unset: <storage>/cache")
