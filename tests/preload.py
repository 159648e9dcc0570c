"""What every rank of the tests needs, imported once by the server that they are forked from."""

from __future__ import annotations

import gc

import pytest  # noqa: F401
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.utils.checkpoint  # noqa: F401
import transformers.generation.utils
import transformers.models.auto.modeling_auto
import transformers.models.qwen2.modeling_qwen2  # noqa: F401

import lwo_dist.run  # noqa: F401

gc.freeze()  # A rank's collections leave these objects alone, and with them the shared memory.
