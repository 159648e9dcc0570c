"""The same for the ranks that use DeepSpeed."""

from __future__ import annotations

import gc
import importlib

import tests.preload  # noqa: F401
from lwo_dist.strategies.deepspeed.builder import load_deepspeed

load_deepspeed()
# DeepSpeed imports it with its first optimizer, and with it torch's compiler.
importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
gc.freeze()
