"""The settings of a run, a file a group. `config.reading` makes them from YAML."""

from .checkpoint import CheckpointConfig
from .cluster import ClusterConfig
from .completion import CompletionConfig
from .data import DataConfig
from .evaluation import EvalConfig
from .fsdp import FSDPConfig
from .lora import LoRAConfig
from .lwo import LWOConfig
from .model import ModelConfig
from .run import Config
from .tracking import TrackingConfig
from .train import TrainConfig

__all__ = [
    "CheckpointConfig",
    "ClusterConfig",
    "CompletionConfig",
    "Config",
    "DataConfig",
    "EvalConfig",
    "FSDPConfig",
    "LWOConfig",
    "LoRAConfig",
    "ModelConfig",
    "TrackingConfig",
    "TrainConfig",
]
