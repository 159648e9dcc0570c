"""Set before any test imports torch or transformers, and inherited by every process that a test
starts.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = (
    "1"  # The tests' ranks share few cores; one thread also makes sums repeatable.
)
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# transformers 5.23 prints a page about torchvision, and a generation config, on ordinary use.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
