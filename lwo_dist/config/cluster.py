"""Ray Train's workers."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator

from .base import Settings

__all__ = ["ClusterConfig"]


class ClusterConfig(Settings):
    """Ray Train's workers."""

    num_workers: int | tuple[int, int] = Field(
        1,
        description=(
            "worker processes, one per GPU where there are GPUs; [min, max]: as many as there"
            " is room"
        ),
    )
    use_gpu: bool | None = Field(None, description="unset: GPUs where Ray has one for each worker")
    resources_per_worker: dict[str, float] = Field(
        default_factory=dict, description="as in Ray's ScalingConfig"
    )
    timeout_s: int = Field(
        300, ge=1, description="time limit of one collective, and of a micro-batch"
    )
    max_failures: int = Field(
        3, ge=-1, description="restarts of the workers after failures; -1: without limit"
    )
    elastic_resize_monitor_interval_s: float = Field(
        60.0,
        gt=0,
        description="num_workers: [min, max] only; how often to look for room for more",
    )
    env: dict[str, str] = Field(
        default_factory=dict, description="environment variables for the workers; no secrets"
    )

    @field_validator("num_workers", mode="before")
    @classmethod
    def _check_num_workers(cls, value: Any) -> Any:
        both = list(value) if isinstance(value, list | tuple) else [value, value]
        if len(both) != 2 or any(type(n) is not int or n < 1 for n in both) or both[0] > both[1]:
            raise ValueError(
                f"{value!r} must be a number of workers, 1 or more, or [min, max], for example"
                " [2, 4]"
            )
        return value if isinstance(value, int) else tuple(both)

    @property
    def min_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @property
    def world_sizes(self) -> range:
        """Every number of workers that can come."""
        return range(self.min_workers, self.max_workers + 1)
