"""One run: every group of settings, and how they fit together."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from lwo_dist.access import Access
from lwo_dist.redaction import refuse_password
from lwo_dist.registry import METHODS, STRATEGIES, TASKS, Registry

from .base import Settings
from .checkpoint import CheckpointConfig
from .cluster import ClusterConfig
from .completion import CompletionConfig
from .data import NO_PASSWORD as NO_SOURCE_PASSWORD
from .data import DataConfig
from .evaluation import EvalConfig
from .fsdp import FSDPConfig
from .lora import LoRAConfig
from .lwo import LWOConfig
from .model import ModelConfig
from .tracking import NO_PASSWORD as NO_TRACKING_PASSWORD
from .tracking import TrackingConfig
from .train import TrainConfig

__all__ = ["NO_PASSWORD", "Config"]

NO_PASSWORD = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or what your store reads, in the environment"
    " of all workers instead"
)
"""What to do about a password in `storage`."""


def _choice(what: str, registry: Registry) -> str:
    return f"{what}: {', '.join(registry.names)}, or module:Class of your own"


class Config(Settings):
    """One run."""

    method: str = Field("lwo", description=_choice("what is trained", METHODS))
    strategy: str = Field("fsdp", description=_choice("how a layer lives on the ranks", STRATEGIES))
    zero_stage: Literal[1, 2, 3] | None = Field(
        None, description="strategy: deepspeed only; unset: what the deepspeed config says, else 3"
    )
    deepspeed: str | dict[str, Any] | None = Field(
        None, description="strategy: deepspeed only; a DeepSpeed config, a JSON file or a mapping"
    )
    task: str = Field("completion", description=_choice("what is learned", TASKS))
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
    access: Access = Field(
        "private",
        description=(
            "who can read what a run writes: only its owner (private), or also the owner's Unix"
            " group (group)"
        ),
    )
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    completion: CompletionConfig = CompletionConfig()
    lwo: LWOConfig = LWOConfig()
    lora: LoRAConfig = LoRAConfig()
    fsdp: FSDPConfig = FSDPConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    cluster: ClusterConfig = ClusterConfig()
    tracking: TrackingConfig = TrackingConfig()

    @field_validator("method", "strategy", "task")
    @classmethod
    def _check_choice(cls, value: str, info: ValidationInfo) -> str:
        registry = {"method": METHODS, "strategy": STRATEGIES, "task": TASKS}[str(info.field_name)]
        return registry.check(value)

    @model_validator(mode="after")
    def _refuse_passwords(self) -> Self:
        for name in ("source", "held_out_source", "validation_source"):
            refuse_password(f"data.{name}", getattr(self.data, name) or "", NO_SOURCE_PASSWORD)
        refuse_password("tracking.uri", self.tracking.uri or "", NO_TRACKING_PASSWORD)
        refuse_password("storage", self.storage, NO_PASSWORD)
        return self

    @model_validator(mode="after")
    def _check_patience(self) -> Self:
        if self.train.patience and not self.eval.steps:
            raise ValueError(
                f"train.patience = {self.train.patience} needs evaluations during training; set"
                " eval.steps, such as 50"
            )
        return self

    @model_validator(mode="after")
    def _check_epochs(self) -> Self:
        if self.train.epochs is not None and self.lwo.batches == "cycle":
            raise ValueError(
                f"train.epochs = {self.train.epochs:g} cannot be counted with lwo.batches: cycle,"
                " where every layer is trained on the same sequences again; set train.steps"
            )
        return self

    def with_steps(self, steps: int) -> Config:
        """This run with a known length: `train.epochs` turned into steps, and the schedule's
        `max_steps` filled in where it is unset.
        """
        train = self.train.model_copy(update={"steps": steps, "epochs": None})
        lwo = self.lwo
        if lwo.max_steps is None:
            lwo = lwo.model_copy(update={"max_steps": steps})
        return self.model_copy(update={"train": train, "lwo": lwo})
