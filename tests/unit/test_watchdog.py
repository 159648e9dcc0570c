"""What the watchdog says, and when it ends the process."""

from __future__ import annotations

import queue
import socket

import pytest

from lwo_dist.errors import UserError
from lwo_dist.stop import StopNow
from lwo_dist.training.watchdog import CollectiveError, Watchdog

HERE = f"rank 0 on {socket.gethostname()}"
LONG = 60.0  # Nothing in these tests takes so long, and none waits for it.


def test_no_progress_ends_the_process_and_says_where(capfd: pytest.CaptureFixture[str]) -> None:
    ended: queue.Queue[int] = queue.Queue()
    with Watchdog(0.2, end=ended.put) as watchdog:
        watchdog.beat(6, "layer_1")
        assert ended.get(timeout=LONG) == 1
    warning, last, *stacks = capfd.readouterr().err.splitlines()
    assert warning.startswith(f"watchdog: {HERE}, step 7, layer layer_1: no progress for ")
    assert last.startswith(f"watchdog: {HERE}, step 7, layer layer_1: no progress for ")
    assert last.endswith("more than cluster.timeout_s = 0.2; ending")
    assert any("test_no_progress_ends_the_process" in line for line in stacks)


def test_an_evaluation_takes_as_long_as_it_takes() -> None:
    ended: queue.Queue[int] = queue.Queue()
    with Watchdog(0.05, end=ended.put) as watchdog:
        watchdog.beat(2, "head")
        with watchdog.paused("evaluation"):
            assert watchdog.position == f"{HERE}, evaluation after step 3, layer head"
            with pytest.raises(queue.Empty):
                ended.get(timeout=1)
        assert watchdog.position == f"{HERE}, step 3, layer head"
        assert ended.get(timeout=LONG) == 1  # And afterwards it watches again.


@pytest.mark.parametrize(
    "message",
    [
        "[enforce fail] Timed out waiting 5000ms for recv operation",
        "Connection closed by peer [127.0.0.1]:99",
    ],
)
def test_a_failed_collective_says_where(message: str) -> None:
    with (
        pytest.raises(
            CollectiveError,
            match=rf"^{HERE}, step 3, layer head: a collective failed .*timeout_s = 60",
        ) as e,
        Watchdog(LONG) as watchdog,
    ):
        watchdog.beat(2, "head")
        raise RuntimeError(message)
    assert message in str(e.value) and isinstance(e.value.__cause__, RuntimeError)


def test_other_errors_keep_their_kind_and_get_a_note() -> None:
    with pytest.raises(ZeroDivisionError) as error, Watchdog(LONG) as watchdog:
        watchdog.beat(2, "head")
        raise ZeroDivisionError
    assert error.value.__notes__ == [f"at {HERE}, step 3, layer head"]
    for expected in (UserError("bad connection"), StopNow("SIGTERM")):
        with pytest.raises(type(expected)) as raised, Watchdog(LONG):
            raise expected
        assert raised.value is expected and not hasattr(expected, "__notes__")
