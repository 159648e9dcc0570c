"""From source trees to token batches."""

from lwo_dist.cache import cache_folder

from .batches import (
    GlobalBatch,
    global_batch,
    global_batch_indices,
    steps_of_epochs,
)
from .dataset import PreparedData
from .examples import EvalExample, TrainExample
from .source_tree import SourceTree, read_source_tree

__all__ = [
    "EvalExample",
    "GlobalBatch",
    "PreparedData",
    "SourceTree",
    "TrainExample",
    "cache_folder",
    "global_batch",
    "global_batch_indices",
    "read_source_tree",
    "steps_of_epochs",
]
