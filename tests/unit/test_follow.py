"""Following a job over a connection that breaks, with a stand-in for Ray's client."""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from lwo_dist.cluster import jobs as module
from lwo_dist.cluster.jobs import Jobs, _exit_code
from lwo_dist.errors import UserError

LOG = ["step 1\n", "step 2\nstep", " 3\n", "done\n"]


def _info(status: str, code: int | None = None, message: str | None = None) -> Any:
    ended = SimpleNamespace(
        value=status, is_terminal=lambda: status in ("SUCCEEDED", "FAILED", "STOPPED")
    )
    return SimpleNamespace(status=ended, driver_exit_code=code, message=message)


class _Client:
    """Sends `LOG` from its start at each call, and breaks off after so many parts, then after so
    many more, ...
    """

    def __init__(self, breaks: list[int], answers: list[Any]):
        self._breaks, self._answers = breaks, answers

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        length = self._breaks.pop(0) if self._breaks else None
        for text in LOG[:length]:
            yield text
        if length is not None:
            raise RuntimeError("WebSocket connection closed unexpectedly with close code 1006")

    def get_job_info(self, job: str) -> Any:
        return self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]


def _jobs(client: _Client, monkeypatch: pytest.MonkeyPatch) -> Jobs:
    monkeypatch.setattr(module, "_PAUSE_SECONDS", 0)
    jobs = Jobs.__new__(Jobs)
    jobs._client, jobs._address = client, "http://127.0.0.1:1"
    return jobs


@pytest.mark.parametrize("breaks", [[], [0], [2], [1, 2, 3], [3, 1, 0], [4]])
def test_nothing_is_written_twice_and_nothing_is_lost(
    breaks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    client = _Client(breaks, [_info("RUNNING"), _info("SUCCEEDED", 0)])
    assert _jobs(client, monkeypatch).follow("job", written.append) == 0
    assert "".join(written) == "".join(LOG)


def test_a_cluster_that_stays_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOST_SECONDS", 0.01)
    client = _Client([0] * 1_000_000, [_info("RUNNING")])
    with pytest.raises(
        UserError, match=r"cannot be reached \(WebSocket .*\); job job may still be running"
    ):
        _jobs(client, monkeypatch).follow("job", lambda text: None)


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        ("SUCCEEDED", 0, 0),
        ("FAILED", 2, 2),
        ("FAILED", 75, 75),
        ("FAILED", -9, 137),
        ("FAILED", None, 1),
        ("STOPPED", None, 143),
        ("STOPPED", 75, 75),
    ],
)
def test_exit_codes(status: str, code: int | None, expected: int) -> None:
    assert _exit_code(_info(status, code)) == expected


def test_a_job_that_never_started_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert _exit_code(_info("FAILED", None, "Runtime env setup failed: no room\ntrace")) == 1
    assert capsys.readouterr().err == "lwo-dist: Runtime env setup failed: no room\n"
