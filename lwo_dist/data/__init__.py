"""From source trees to token batches."""

from .batches import (
    check_world_sizes,
    global_batch_indices,
    label_tokens,
    micro_batch_size,
    micro_batches,
)
from .cache import cache_folder
from .dataset import PreparedData
from .examples import EvalExample, TrainExample
from .source_tree import SourceTree, read_source_tree

__all__ = [
    "EvalExample",
    "PreparedData",
    "SourceTree",
    "TrainExample",
    "cache_folder",
    "check_world_sizes",
    "global_batch_indices",
    "label_tokens",
    "micro_batch_size",
    "micro_batches",
    "read_source_tree",
]
