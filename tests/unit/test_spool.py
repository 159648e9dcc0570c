import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lwo_dist.spool import Sent, Spool, count_points, is_being_written, points_of, read_spool


def points(path: Path) -> list[tuple[int, str, float]]:
    return [(p.step, p.name, p.value) for record in read_spool(path) for p in points_of(record)]


def test_points_come_back_as_written(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    spool = Spool(path)
    spool.append_metrics(10, {"train/loss": 1.25, "lwo/active_layer": 3})
    spool.append_metrics(20, {"train/loss": math.inf, "train/grad_norm": math.nan})
    values = points(path)
    assert values[:3] == [
        (10, "train/loss", 1.25),
        (10, "lwo/active_layer", 3.0),
        (20, "train/loss", math.inf),
    ]
    assert math.isnan(values[3][2])
    assert count_points(path) == 4
    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_reading_goes_on_from_an_offset(tmp_path):
    path = tmp_path / "metrics.jsonl"
    spool = Spool(path)
    spool.append_metrics(1, {"a": 1.0})
    first = next(iter(read_spool(path)))
    spool.append_metrics(2, {"a": 2.0, "b": 2.0})
    assert [r.fields["step"] for r in read_spool(path, first.end)] == [2]
    assert count_points(path, first.end) == 2
    assert list(read_spool(path))[-1].end == path.stat().st_size


@pytest.mark.parametrize(
    "torn", [b'{"kind": "metrics", "ti', b'{"kind": "end", "time_ms": 1}', b"\0" * 40]
)
def test_a_torn_last_line_is_dropped_and_said(tmp_path, caplog, torn):
    path = tmp_path / "metrics.jsonl"
    spool = Spool(path)
    spool.append_metrics(1, {"a": 1.0})
    spool.close()
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    assert points(path) == [(1, "a", 1.0)]

    again = Spool(path)
    assert "torn line" in caplog.text
    assert f"{len(torn)} bytes" in caplog.text
    again.append_metrics(2, {"a": 2.0})
    assert points(path) == [(1, "a", 1.0), (2, "a", 2.0)]


def test_a_damaged_line_inside_spoils_no_other(tmp_path):
    path = tmp_path / "metrics.jsonl"
    spool = Spool(path)
    spool.append_metrics(1, {"a": 1.0})
    with path.open("ab") as file:
        file.write(b'{"kind": "met\n[1]\n{"step": 3}\n\xff\xfe\n')
    spool.append_metrics(2, {"a": 2.0})
    assert [r.kind for r in read_spool(path)] == ["metrics", *["damaged"] * 4, "metrics"]
    assert points(path) == [(1, "a", 1.0), (2, "a", 2.0)]
    assert Spool(path).attempts == 0


def test_a_sigkill_loses_nothing_that_was_appended(tmp_path):
    path = tmp_path / "metrics.jsonl"
    script = (
        "import os, signal, sys; from pathlib import Path; from lwo_dist.spool import"
        " Spool\nspool = Spool(Path(sys.argv[1]))\nfor step in range(500):"
        " spool.append_metrics(step, {'a': step, 'b': step})\nos.kill(os.getpid(),"
        " signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert count_points(path) == 1000
    assert not is_being_written(path)  # the kernel took the lock back


def test_a_step_counts_once_over_all_attempts(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = Spool(path)
    first.append("run")
    for step in (10, 20, 30):
        first.append_metrics(step, {"train/loss": 1.0})
    first.append_switch(25, "layers.1")
    first.append_metrics(30, {"eval/loss": 1.0})
    first.close()

    second = Spool(path)  # goes on from step 15
    second.append("run")
    assert second.attempts == 2
    second.append_metrics(20, {"train/loss": 2.0, "new/metric": 2.0})
    second.append_switch(25, "layers.1")
    second.append_metrics(30, {"train/loss": 2.0})
    second.append_metrics(30, {"eval/loss": 2.0})
    second.append_metrics(40, {"train/loss": 2.0})
    second.append_switch(50, "layers.2")
    assert points(path) == [
        (10, "train/loss", 1.0),
        (20, "train/loss", 1.0),
        (30, "train/loss", 1.0),
        (30, "eval/loss", 1.0),
        (20, "new/metric", 2.0),
        (40, "train/loss", 2.0),
    ]
    assert [r.fields["step"] for r in read_spool(path) if r.kind == "switch"] == [25, 50]


def test_step_zero_is_a_step(tmp_path):
    spool = Spool(tmp_path / "metrics.jsonl")
    spool.append_metrics(0, {"eval/loss": 1.0})
    assert points(spool.path) == [(0, "eval/loss", 1.0)]


def test_a_full_disk_costs_one_line_and_is_said(tmp_path):
    # RLIMIT_FSIZE makes the kernel cut the write short as a full disk does; lifted again, there is
    # room.
    script = (
        "import resource, signal, sys; from pathlib import Path; from lwo_dist.spool"
        " import Spool\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nspool ="
        " Spool(Path(sys.argv[1]))\nspool.append_metrics(1, {'a': 1})\nhard ="
        " resource.getrlimit(resource.RLIMIT_FSIZE)[1]\nresource.setrlimit(resource.RLIMIT_FSIZE,"
        " (spool.path.stat().st_size + 20, hard))\ntry: spool.append_metrics(2, {'a': 2})\nexcept"
        " OSError as error: print(error)\nresource.setrlimit(resource.RLIMIT_FSIZE, (hard,"
        " hard))\nspool.append_metrics(3, {'a': 3})\n"
    )
    path = tmp_path / "metrics.jsonl"
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], check=True, capture_output=True, text=True
    )
    assert "only 20 of" in done.stdout
    assert [p[0] for p in points(path)] == [1, 3]


def test_a_live_spool_is_told_from_a_dead_one(tmp_path):
    spool = Spool(tmp_path / "metrics.jsonl")
    assert is_being_written(spool.path)
    spool.close()
    assert not is_being_written(spool.path)


def test_sent_is_kept_and_a_new_store_starts_over(tmp_path):
    spool = Spool(tmp_path / "metrics.jsonl")
    spool.append_metrics(1, {"a": 1.0})
    sent = Sent.load(spool.path)
    sent.address("http://one", None)
    sent.run_id, sent.offset, sent.waiting = "r1", spool.path.stat().st_size, ["config.yaml"]
    sent.save()

    again = Sent.load(spool.path)
    assert (again.key, again.uri, again.run_id, again.offset, again.waiting) == (
        sent.key,
        "http://one",
        "r1",
        sent.offset,
        ["config.yaml"],
    )
    again.address("http://one", None)
    again.address("http://one", "r1")
    assert (again.run_id, again.offset) == ("r1", sent.offset)
    again.address("http://one", "r2")
    assert (again.run_id, again.offset, again.waiting) == ("r2", 0, [])
    again.offset = 7
    again.address("http://two", None)
    assert (again.key, again.run_id, again.offset) == (sent.key, None, 0)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"key": 1}'])
def test_a_spoilt_offset_file_means_from_the_start(tmp_path, caplog, content):
    path = tmp_path / "metrics.jsonl"
    Spool(path).append_metrics(1, {"a": 1.0})
    path.with_suffix(".sent.json").write_text(content)
    sent = Sent.load(path)
    assert (sent.run_id, sent.offset) == (None, 0)
    assert "cannot be read" in caplog.text


def test_an_offset_beyond_the_end_means_from_the_start(tmp_path):
    path = tmp_path / "metrics.jsonl"
    Spool(path).append_metrics(1, {"a": 1.0})
    sent = Sent.load(path)
    sent.offset = 10_000
    sent.save()
    os.truncate(path, 0)
    assert Sent.load(path).offset == 0


# ---- forged spools


@pytest.mark.parametrize(
    "line",
    [
        b'{"kind": "metrics", "time_ms": 1, "step": "x", "values": {}}',
        b'{"kind": "metrics", "time_ms": 1, "step": 1, "values": {"a": "b"}}',
        b'{"kind": "metrics", "time_ms": 1, "step": 1, "values": {"a": 1%s}}' % (b"0" * 4000),
        b'{"kind": "metrics", "time_ms": 1}',
        b'{"kind": "switch", "time_ms": 1, "step": 1}',
        b'{"kind": "artifact", "time_ms": 1, "path": ["a"]}',
        b'{"kind": ["run"], "time_ms": 1}',
        b'{"kind": "run", "time_ms": "now"}',
        b"[" * 100_000,
        b'"%s"' % (b"x" * (17 * 2**20)),
    ],
    ids=range(10),
)
def test_a_malformed_line_is_damaged_and_affects_no_other(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line + b"\n")
    with path.open("ab") as file:
        file.write(b'{"kind": "metrics", "time_ms": 1, "step": 2, "values": {"a": 1.0}}\n')
    assert [record.kind for record in read_spool(path)] == ["damaged", "metrics"]
    spool = Spool(path)  # as a resumed run does
    spool.append_metrics(3, {"a": 2.0})
    assert points(path) == [(2, "a", 1.0), (3, "a", 2.0)]


def test_a_symlinked_spool_is_not_written(tmp_path):
    (tmp_path / "elsewhere").write_text("mine")
    (tmp_path / "metrics.jsonl").symlink_to("elsewhere")
    with pytest.raises(OSError, match="is a symlink"):
        Spool(tmp_path / "metrics.jsonl")
    assert (tmp_path / "elsewhere").read_text() == "mine"
