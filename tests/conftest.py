"""What holds for all tests: an environment that is set before any test imports torch or
transformers, and that every process inherits that a test starts; and Hypothesis' settings.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import hypothesis
import pytest

os.environ["OMP_NUM_THREADS"] = (
    "1"  # The tests' ranks share few cores; one thread also makes sums repeatable.
)
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# transformers 5.23 prints a page about torchvision, and a generation config, on ordinary use.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

# An example may take longer than Hypothesis' 200 ms: other tests' processes share the cores.
hypothesis.settings.register_profile("shared_cores", deadline=None)
hypothesis.settings.load_profile("shared_cores")


@pytest.fixture
def dead_uri() -> Iterator[str]:
    """An address where connections are refused for as long as the test runs."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"
