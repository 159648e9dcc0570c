"""Two torchruns of one run: the second is refused, or takes the run over if it is told to."""

from __future__ import annotations

from pathlib import Path

import pytest

from lwo_dist.cli import main
from tests.cluster.launching import environment, make_inputs, run, torchrun
from tests.cluster.test_stop import ENDLESS, started, stopped_line


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("one_writer"))


def test_a_second_torchrun_of_a_run_is_refused_and_harms_nothing(folder: Path) -> None:
    with started(torchrun(folder, "r", *ENDLESS), environment(folder)) as first:
        second = run(torchrun(folder, "r", *ENDLESS), environment(folder))
        said = [line for line in second.stderr.splitlines() if line.startswith("lwo-dist: ")]
        assert len(said) == 1, second.stderr
        assert "has been writing this run since" in said[0] and "checkpoint.take_over" in said[0]
        assert "exitcode  : 2" in second.stderr
        first.terminate()
        _, stderr = first.communicate()
    assert stopped_line(stderr, "SIGTERM", folder / "runs" / "r") >= 20
    assert main(["checkpoints", "verify", str(folder / "runs" / "r")]) == 0


def test_a_run_that_is_taken_over_ends_in_one_line(folder: Path) -> None:
    with started(torchrun(folder, "r", *ENDLESS), environment(folder)) as first:
        command = torchrun(folder, "r", *ENDLESS, "checkpoint.take_over=true")
        with started(command, environment(folder)) as second:
            _, stderr = first.communicate()
            said = [line for line in stderr.splitlines() if line.startswith("lwo-dist: ")]
            assert len(said) == 1 and "took over this run at" in said[0], stderr
            assert "exitcode  : 2" in stderr
            second.terminate()
            _, stderr = second.communicate()
    assert stopped_line(stderr, "SIGTERM", folder / "runs" / "r") >= 20
    assert main(["checkpoints", "verify", str(folder / "runs" / "r")]) == 0
