import logging
import threading
from pathlib import Path

import pytest

from lwo_dist.spool import Sent, Spool, count_points
from lwo_dist.tracking.sender import Sender, reason, send_spool, unsent


class MemoryStore:
    """Keeps what it gets; `down` is the exception that every call raises meanwhile."""

    uri = "memory"

    def __init__(self) -> None:
        self.down: Exception | None = None
        self.calls: list[str] = []
        self.batches: list[int] = []
        self.points: set[tuple] = set()
        self.files: list[tuple[str, str | None]] = []
        self.ends: list[str] = []
        self.called = threading.Semaphore(0)

    def _call(self, name: str) -> None:
        self.calls.append(name)
        self.called.release()
        if self.down:
            raise self.down

    def open_run(self, fields, time_ms, run_id):
        self._call("open_run")
        return run_id or "made"

    def log_points(self, run_id, points):
        self._call("log_points")
        self.batches.append(len(points))
        self.points |= set(points)

    def upload(self, run_id, file: Path, folder):
        self._call("upload")
        self.files.append((file.name, folder))

    def end_run(self, run_id, fields, time_ms):
        self._call("end_run")
        self.ends.append(fields["status"])


@pytest.fixture
def spool(tmp_path):
    spool = Spool(tmp_path / "metrics.jsonl")
    spool.append("run")
    return spool


def fill(spool: Spool, steps: range) -> None:
    for step in steps:
        spool.append_metrics(step, {"a": step, "b": step, "c": step})
        spool.append_switch(step, "layer")


def test_batches_are_at_most_a_thousand_and_nothing_is_lost(spool):
    fill(spool, range(1200))
    spool.append_metrics(1200, {f"m{i}": i for i in range(2500)})  # one step above the limit alone
    store, sent = MemoryStore(), Sent.load(spool.path)
    send_spool(spool.path, store, sent)
    assert max(store.batches) <= 1000
    assert len(store.batches) <= 4 + 3  # gathered, not one call per step
    assert (
        len(store.points) == sum(store.batches) == sent.points == count_points(spool.path) == 6100
    )
    assert sent.offset == spool.path.stat().st_size
    send_spool(spool.path, store, sent)
    assert sent.points == 6100


def test_the_offset_moves_only_after_success(spool):
    fill(spool, range(500))
    store, sent = MemoryStore(), Sent.load(spool.path)
    send_spool(spool.path, store, sent)
    before = sent.offset
    fill(spool, range(500, 1000))
    store.down = ConnectionRefusedError(111, "Connection refused")
    with pytest.raises(ConnectionRefusedError):
        send_spool(spool.path, store, sent)
    assert sent.offset == Sent.load(spool.path).offset == before
    assert unsent(spool.path, sent) == "1500 metric points"
    store.down = None
    send_spool(spool.path, store, Sent.load(spool.path))  # as another process would
    assert len(store.points) == count_points(spool.path)


def test_what_arrived_before_an_error_is_not_sent_again(spool):
    fill(spool, range(1200))
    store, sent = MemoryStore(), Sent.load(spool.path)
    log_points = store.log_points

    def third_fails(run_id, points):
        if len(store.batches) == 2:
            raise TimeoutError("timed out")
        log_points(run_id, points)

    store.log_points = third_fails  # type: ignore[method-assign]
    with pytest.raises(TimeoutError):
        send_spool(spool.path, store, sent)
    assert (
        sent.points
        == sum(store.batches)
        == 3600 - count_points(spool.path, Sent.load(spool.path).offset)
        > 1900
    )


def test_points_do_not_wait_for_a_file_that_cannot_be_uploaded(spool, monkeypatch):
    (spool.path.parent / "pictures").mkdir()
    for name in ("config.yaml", "pictures/loss.png"):
        (spool.path.parent / name).write_text("x")
        spool.append("artifact", path=name)
    spool.append("artifact", path="gone.png")
    fill(spool, range(10))
    spool.append("end", status="FINISHED")
    store, sent = MemoryStore(), Sent.load(spool.path)

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(store, "upload", refuse)
    with pytest.raises(
        RuntimeError, match=r"config\.yaml could not be uploaded: Permission denied"
    ):
        send_spool(spool.path, store, sent)
    assert (len(store.points), store.ends) == (30, ["FINISHED"])
    again = Sent.load(spool.path)
    assert again.waiting == ["config.yaml", "pictures/loss.png", "gone.png"]
    monkeypatch.undo()
    send_spool(spool.path, store, again)
    assert store.files == [("config.yaml", None), ("loss.png", "pictures")]
    assert Sent.load(spool.path).waiting == []


def test_an_end_before_any_run_blocks_nothing(tmp_path):
    spool = Spool(tmp_path / "metrics.jsonl")
    spool.append(
        "end", status="FAILED"
    )  # the driver's word on an attempt that died before it began
    spool.append("run")
    fill(spool, range(3))
    store = MemoryStore()
    send_spool(spool.path, store, Sent.load(spool.path))
    assert (len(store.points), store.ends) == (9, [])


def test_one_warning_when_down_and_one_when_back(spool, caplog):
    caplog.set_level(logging.WARNING)
    store = MemoryStore()
    store.down = ConnectionRefusedError(111, "Connection refused")
    sender = Sender(spool.path, store, Sent.load(spool.path), interval_s=0, max_pause_s=0.01)
    sender.start()
    for step in range(20):
        fill(spool, range(step, step + 1))
        sender.wake()
        assert store.called.acquire(timeout=30)
    store.down = None
    assert sender.close(30)
    assert sender.problem is None
    assert len(store.points) == 60
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2, lines
    assert lines[0].startswith("MLflow at memory: Connection refused; points are kept in ")
    assert lines[1] == "MLflow at memory is back; sent 60 waiting points"


def test_the_breaker_stays_open_for_the_pause(spool):
    """While a server is down, news do not make calls: one try, then none until the pause is
    over.
    """
    store = MemoryStore()
    store.down = TimeoutError("timed out")
    sender = Sender(spool.path, store, Sent.load(spool.path), interval_s=0, max_pause_s=3600)
    pauses = []
    sender._pause = lambda failures: (pauses.append(failures), sender._closing.wait())  # type: ignore[method-assign]
    sender.start()
    sender.wake()
    assert store.called.acquire(timeout=30)
    fill(spool, range(100))
    for _ in range(100):
        sender.wake()
    assert store.calls == ["open_run"]
    store.down = None
    assert sender.close(30)
    assert pauses == [1]
    assert len(store.points) == 300


def test_pauses_double_up_to_the_limit(spool, monkeypatch):
    sender = Sender(spool.path, MemoryStore(), Sent.load(spool.path), max_pause_s=60)
    waits = []
    monkeypatch.setattr(sender._closing, "wait", lambda seconds: waits.append(seconds))
    for failures in range(1, 12):
        sender._pause(failures)
    limits = [1, 2, 4, 8, 16, 32, 60, 60, 60, 60, 60]
    assert all(0.75 * limit <= wait <= limit for wait, limit in zip(waits, limits, strict=True)), (
        waits
    )


def test_the_flush_at_the_end_is_bounded(spool):
    store = MemoryStore()
    hold = threading.Event()

    def hang_then_fail(*_):
        hold.wait()
        raise TimeoutError("timed out")

    store.open_run = hang_then_fail  # type: ignore[method-assign]
    sender = Sender(spool.path, store, Sent.load(spool.path), interval_s=0)
    sender.start()
    assert not sender.close(0.05)
    assert sender.daemon
    hold.set()
    sender.join(30)
    assert not sender.is_alive()  # abandoned: it goes as soon as its call returns


def test_the_reason_is_the_root_in_one_line(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter22")
    try:
        try:
            raise ConnectionRefusedError(111, "Connection refused")
        except OSError as error:
            raise ValueError("a page\nof text") from error
    except ValueError as error:
        assert reason(error) == "Connection refused"
    assert (
        reason(ValueError("two\n  lines http://me:pw@host/x hunter22"))
        == "two lines http://host/x ***"
    )
    assert reason(KeyError()) == "KeyError"
