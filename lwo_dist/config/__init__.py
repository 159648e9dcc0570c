"""The settings of a run, and how they are read."""

from .reading import load_config
from .settings import (
    CheckpointConfig,
    ClusterConfig,
    Config,
    DataConfig,
    EvalConfig,
    FSDPConfig,
    LWOConfig,
    ModelConfig,
    TrackingConfig,
    TrainConfig,
    UserError,
)

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
    "load_config",
]
