"""The store of hidden states: exact, bounded, and gone with the process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lwo_dist.borders import BorderStore


def test_a_full_disk_is_no_room(tmp_path: Path, monkeypatch: Any) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    store = BorderStore(0, 10**9, lambda: tmp_path)
    with pytest.warns(UserWarning, match="only 0 micro-batches"):
        store.put(b"a", 1, torch.ones(3, 4))
    assert store.get(b"a") is None
    assert store.disk_bytes == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_border_is_kept_bit_by_bit(on_disk: bool, tmp_path: Path) -> None:
    store = BorderStore(0 if on_disk else 10**6, 10**6, lambda: tmp_path)
    for hidden in (
        torch.randn(2, 3, 8, dtype=torch.bfloat16),
        torch.tensor([[float("nan"), -0.0, float("inf")]]),
        torch.randn(2, 8, 3).transpose(1, 2),
    ):
        store.put(b"key", 4, hidden)
        hidden_copy = hidden.clone()
        hidden.zero_()  # as a layer that works in place
        border = store.get(b"key")
        assert border is not None
        assert border.on_disk == on_disk
        taken = border.take()
        assert taken.view(torch.uint8 if taken.is_contiguous() else taken.dtype).equal(
            hidden_copy.view(torch.uint8 if taken.is_contiguous() else taken.dtype)
        )
        assert taken.stride() == hidden_copy.stride()
        taken.zero_()
        assert border.hidden.any()
    store.drop_above(3)
    assert len(store) == 0
    assert store.host_bytes == store.disk_bytes == 0


KILLED = """
import os, signal, sys, torch
from pathlib import Path
from lwo_dist.borders import BorderStore
store = BorderStore(0, 10**9, lambda: Path(sys.argv[1]))
store.put(b"a", 1, torch.ones(1000, 1000))
assert store.disk_bytes == 4_000_000
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_leaves_no_file(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert done.returncode == -9
    assert list(tmp_path.iterdir()) == []
