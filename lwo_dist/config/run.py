"""One run: every group of settings, and how they fit together."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from .base import Settings
from .checkpoint import CheckpointConfig
from .cluster import ClusterConfig
from .data import DataConfig
from .evaluation import EvalConfig
from .fsdp import FSDPConfig
from .lwo import LWOConfig
from .model import ModelConfig
from .tracking import TrackingConfig
from .train import TrainConfig

__all__ = ["Config"]


class Config(Settings):
    """One run."""

    method: Literal["lwo", "full"] = Field(
        "lwo", description="layer-wise optimisation, or full fine-tuning"
    )
    strategy: Literal["replicate", "fsdp", "deepspeed"] = Field(
        "fsdp", description="how a layer lives on the ranks"
    )
    zero_stage: Literal[1, 2, 3] | None = Field(
        None, description="strategy: deepspeed only; unset: what the deepspeed config says, else 3"
    )
    deepspeed: str | dict[str, Any] | None = Field(
        None, description="strategy: deepspeed only; a DeepSpeed config, a JSON file or a mapping"
    )
    task: Literal["completion"] = Field(
        "completion", description="what is learned: completing lines of code"
    )
    seed: int = Field(0, ge=0, description="seed of data order and initialisation")
    storage: str = Field(
        "runs",
        description=(
            "folder for runs, seen by all workers; or an object store, such as s3://bucket/folder"
        ),
    )
    run_name: str | None = Field(
        None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$", description="unset: made from the date"
    )
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    lwo: LWOConfig = LWOConfig()
    fsdp: FSDPConfig = FSDPConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    cluster: ClusterConfig = ClusterConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _check(self) -> Config:
        for key in ("zero_stage", "deepspeed"):
            if getattr(self, key) is not None and self.strategy != "deepspeed":
                raise ValueError(
                    f"{key} has no effect with strategy: {self.strategy}; set deepspeed there, or"
                    " drop it"
                )
        if self.method == "full" and self.lwo.state == "keep":
            raise ValueError(
                "lwo.state: keep has no effect with method: full, which never switches; drop it"
            )
        self._check_storage()
        return self

    def _check_storage(self) -> None:
        if self.fsdp.storage == "bf16":
            for key, value in (
                ("strategy", "fsdp"),
                ("train.precision", "bf16"),
                ("method", "lwo"),
            ):
                found = self.train.precision if key == "train.precision" else getattr(self, key)
                if found != value:
                    raise ValueError(
                        f"fsdp.storage: bf16 cannot be used with {key}: {found}; set {key}:"
                        f" {value}, or fsdp.storage: fp32"
                    )
        in_16_bits = self.fsdp.storage == "bf16" or (
            self.strategy == "deepspeed" and self.train.precision == "bf16"
        )
        if self.lwo.inactive_master == "discard" and not in_16_bits:
            raise ValueError(
                "lwo.inactive_master: discard has no effect where weights are stored in fp32; drop"
                " it, or set fsdp.storage: bf16, or strategy: deepspeed with train.precision: bf16"
            )
