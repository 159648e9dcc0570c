"""Every setting of a run: frozen pydantic models.

Field descriptions are the documentation: the README's table is made from them, and an error message
ends in the description of the field that it is about.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

__all__ = [
    "CheckpointConfig",
    "ClusterConfig",
    "Config",
    "DataConfig",
    "EvalConfig",
    "FSDPConfig",
    "LWOConfig",
    "ModelConfig",
    "TrackingConfig",
    "TrainConfig",
    "UserError",
]


class UserError(ValueError):
    """Bad input. The message is one line: the value, the rule, the remedy. The command line exits
    with 2.
    """


class _Settings(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=()
    )


class LWOConfig(_Settings):
    """What the hook needs: the optimizer, the schedule of layers and of the learning rate."""

    lr: float = Field(1e-5, gt=0, description="peak learning rate of AdamW")
    betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW's betas")
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon")
    weight_decay: float = Field(
        0.0, ge=0, description="decoupled weight decay, on every parameter of the active layer"
    )
    max_grad_norm: float = Field(
        1.0, ge=0, description="clip the active layer's gradient norm; 0 turns it off"
    )
    steps_per_layer: int = Field(50, ge=1, description="optimizer steps that a layer stays active")
    order: Literal["ascending", "descending", "random", "weighted"] = Field(
        "ascending",
        description=(
            "order of the layers; random is reshuffled each cycle, weighted draws by layer_weights"
        ),
    )
    layer_weights: dict[str, float] = Field(
        default_factory=dict,
        description="order: weighted only; layer name -> relative frequency, 1 where unnamed",
    )
    seed: int = Field(0, ge=0, description="seed of the random and weighted orders")
    state: Literal["reset", "keep"] = Field(
        "reset",
        description=(
            "a layer's moments at a switch: reset drops them, keep parks them for its next visit"
        ),
    )
    inactive_master: Literal["host", "discard"] = Field(
        "host",
        description=(
            "16-bit weights' fp32 masters between visits: host parks them, discard rounds them away"
        ),
    )
    train_embeddings: bool = Field(True, description="make the embedding a trained layer")
    train_head: bool = Field(
        True, description="make the output head, with the final norm, a trained layer"
    )
    layers_per_group: int = Field(
        1, ge=1, description="neighbouring transformer layers trained as one layer"
    )
    gradient_accumulation_steps: int = Field(
        1, ge=1, description="micro-batches per optimizer step"
    )
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="decay after the warm-up"
    )
    lr_schedule_over: Literal["run", "cycle", "visit"] = Field(
        "run", description="the stretch that one learning-rate schedule spans"
    )
    warmup_steps: int = Field(
        0, ge=0, description="linear warm-up at the start of each such stretch"
    )
    visit_ramp_steps: int = Field(
        0, ge=0, description="n > 0: the first n steps of a visit run at lr/n, 2 lr/n, ..."
    )
    max_steps: int | None = Field(
        None,
        ge=1,
        description=(
            "optimizer steps of the run; a decay over the run needs it (train.steps fills it)"
        ),
    )

    @model_validator(mode="after")
    def _check(self) -> LWOConfig:
        if not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"betas {self.betas} must lie in [0, 1)")
        if self.order == "weighted" and not self.layer_weights:
            raise ValueError(
                "order: weighted needs layer_weights, for example layer_weights: {head: 2.0}"
            )
        if self.order != "weighted" and self.layer_weights:
            raise ValueError(
                f"layer_weights has no effect with order: {self.order}; set order: weighted or"
                " drop it"
            )
        if any(w <= 0 for w in self.layer_weights.values()):
            raise ValueError(
                f"layer_weights {self.layer_weights} must be above 0; freeze a layer by other means"
            )
        return self


class ModelConfig(_Settings):
    """Which model is tuned."""

    name: str = Field(
        "tiny-code", description="a Hugging Face id, a folder, or tiny-code (made here, offline)"
    )
    revision: str | None = Field(None, description="branch, tag or commit of a Hugging Face id")
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")


class DataConfig(_Settings):
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


class FSDPConfig(_Settings):
    """Sharded weights."""

    storage: Literal["fp32", "bf16"] = Field(
        "fp32",
        description=(
            "strategy: fsdp only; bf16: shards of 2 bytes a parameter, fp32 while a layer is active"
        ),
    )


class TrainConfig(_Settings):
    """The training loop."""

    steps: int = Field(200, ge=1, description="optimizer steps")
    global_batch_size: int = Field(
        16, ge=1, description="sequences per optimizer step, over all workers"
    )
    sequence_length: int = Field(256, ge=8, description="tokens per sequence")
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="compute in this; weights and reductions stay fp32"
    )
    gradient_checkpointing: bool = Field(
        False, description="recompute activations in backward (non-reentrant)"
    )
    logging_steps: int = Field(
        10, ge=1, description="a progress line and a metrics point every so many steps"
    )
    max_skipped_steps: int = Field(
        10, ge=1, description="stop after so many non-finite steps in a row"
    )
    max_seconds: float | None = Field(
        None,
        gt=0,
        description=(
            "wall-clock limit: then save, exit with 75 and go on when the command is given again"
        ),
    )


class EvalConfig(_Settings):
    """Scores on held-out files before, during and after training."""

    steps: int = Field(
        0, ge=0, description="evaluate every so many steps; 0: only before and after"
    )
    num_lines: int = Field(1000, ge=1, description="held-out lines to complete")
    batch_size: int = Field(32, ge=1, description="lines generated at once on a worker")
    max_new_tokens: int = Field(48, ge=1, description="longest completion, in tokens")
    metric: Literal["loss", "exact_match", "edit_similarity", "bleu"] = Field(
        "loss", description="what names the best checkpoint"
    )


class CheckpointConfig(_Settings):
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


class ClusterConfig(_Settings):
    """Ray Train's workers."""

    num_workers: int | tuple[int, int] = Field(
        1,
        description=(
            "worker processes, one per GPU where there are GPUs; [fewest, most]: as many as there"
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
        description="num_workers: [fewest, most] only; how often to look for room for more",
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
                f"{value!r} must be a number of workers, 1 or more, or [fewest, most], for example"
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


class TrackingConfig(_Settings):
    """MLflow."""

    enabled: bool = Field(True, description="log to MLflow")
    uri: str | None = Field(
        None, description="unset: MLFLOW_TRACKING_URI, else sqlite in <storage>/mlflow.db"
    )
    experiment: str = Field("lwo_dist", description="MLflow experiment")
    flush_timeout_s: float = Field(
        30.0, ge=0, description="longest wait at the end for points that are still unsent"
    )
    upload_timeout_s: float = Field(
        600.0, ge=0, description="longest wait at the end, the points sent, for files"
    )
    log_model: bool = Field(True, description="log the exported model as an MLflow model")
    register_as: str | None = Field(None, description="also register that model under this name")
    system_metrics: bool = Field(True, description="log the load of every node and GPU")


class Config(_Settings):
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
