"""A run that is asked to stop saves what it has, and goes on as if nothing had been."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lwo_dist.callback import Callback
from lwo_dist.config import Config
from lwo_dist.distributed import first_reason, rank
from lwo_dist.driver import prepare
from lwo_dist.run import run
from lwo_dist.stop import StopNow, Stopped, StopRequest, StopVote
from tests.distributed.test_run import exported, inputs, make_config
from tests.ranks import run_ranks

__all__ = ["inputs"]


class Losses(Callback):
    def __init__(self) -> None:
        self.losses: dict[int, float] = {}

    def on_metrics(self, step: int, metrics: dict) -> None:  # type: ignore[override]
        self.losses[step] = metrics["train/loss"]


def run_until_stopped(config: Config, make_stop: Callable[[], StopRequest]) -> tuple:
    """(what it was stopped by, at which step, where the checkpoint is), or the summary; and rank
    0's losses.
    """
    recorder = Losses()
    StopVote.pace = lambda self, step_seconds: None  # type: ignore[method-assign]  # a vote after every step
    try:
        return run(config, [recorder], stop=make_stop()), recorder.losses
    except Stopped as stopped:
        return (stopped.reason, stopped.step, stopped.checkpoint), recorder.losses


def asked_on_rank_1() -> StopRequest:
    """Rank 1 wants to stop when it is asked the sixth time: after step 5, as the first vote is in
    an evaluation.
    """
    stop, asked = StopRequest(), []
    if rank() == 1:
        stop.add_poll(lambda: asked.append(1) or ("the test" if len(asked) == 6 else None))
    return stop


def test_a_stopped_run_goes_on_as_if_nothing_had_been(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    # With a checkpoint at the end only, so that what is gone on from can but be the stop's.
    unbroken = prepare(make_config(inputs, tmp_path / "a", "train.logging_steps=1"))
    (summary, losses), _ = run_ranks(run_until_stopped, 2, unbroken, StopRequest)
    config = prepare(make_config(inputs, tmp_path / "b", "train.logging_steps=1"))
    (first, before), (other, _) = run_ranks(run_until_stopped, 2, config, asked_on_rank_1)
    reason, step, checkpoint = first
    # In the middle of a visit: what is saved has moments of the active layer.
    assert first == other and (reason, step) == ("the test", 5)
    assert checkpoint.name == f"step_{step:06d}"
    assert json.loads((checkpoint / "state.json").read_text())["step"] == step

    (resumed, after), _ = run_ranks(run_until_stopped, 2, prepare(config), StopRequest)
    assert list(before) == list(range(1, step + 1)) and list(after) == list(range(step + 1, 15))
    assert before | after == losses
    expected, found = exported(summary), exported(resumed)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    for results in (summary, resumed):
        for point in results["eval"]["curve"]:
            assert point.pop("training_seconds") >= 0.0
    for key in ("eval", "tokens", "loss_first", "loss_last"):
        assert resumed[key] == summary[key]


def in_an_evaluation() -> StopRequest:
    # 12 lines in batches of 6 on 2 ranks: one vote before the first step, one after each of 4, the
    # next in evaluation.
    stop, asked = StopRequest(), []
    stop.add_poll(lambda: asked.append(1) or ("the test" if len(asked) == 6 else None))
    return stop


def test_a_stop_does_not_wait_for_an_evaluation(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    settings = ("eval.steps=4", "train.logging_steps=20", "eval.batch_size=6", "train.steps=8")
    config = prepare(make_config(inputs, tmp_path, *settings))
    (stopped, _), _ = run_ranks(run_until_stopped, 2, config, in_an_evaluation)
    assert stopped[:2] == ("the test", 4)
    state = json.loads((stopped[2] / "state.json").read_text())
    assert list(state["results"]["evaluations"]) == ["0"]
    # It is made up for.
    (summary, _), _ = run_ranks(run_until_stopped, 2, prepare(config), StopRequest)
    assert {path.name for path in (tmp_path / "r" / "evaluations").iterdir()} == {
        "step_000000.json",
        "step_000004.json",
        "step_000008.json",
    }
    assert summary["steps"] == 8


def out_of_time() -> StopRequest:
    return StopRequest(max_seconds=0.001)


def test_a_run_without_time_saves_nothing_and_says_so(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    config = prepare(make_config(inputs, tmp_path))
    (stopped, _), other = run_ranks(run_until_stopped, 2, config, out_of_time)
    assert stopped == other[0] == ("train.max_seconds = 0.001", 0, None)
    assert (
        str(Stopped(*stopped))
        == "stopped by train.max_seconds = 0.001 at step 0; no step was done, so nothing was saved"
    )
    assert not (tmp_path / "r" / "checkpoints").exists()


def reasons_of(worlds: list[list[str | None]]) -> list[str | None]:
    return [first_reason(world[rank()]) for world in worlds]


def test_ranks_agree_on_the_lowest_rank_s_reason() -> None:
    worlds = [[None, None, None], [None, "b", "c"], ["a", None, "c"]]
    assert run_ranks(reasons_of, 3, worlds) == [[None, "b", "a"]] * 3


def test_votes_are_about_a_second_apart() -> None:
    votes: list[int] = []
    step = 0
    vote = StopVote(StopRequest(), lambda reason: votes.append(step))  # type: ignore[func-returns-value, arg-type]
    for step in range(1, 4):
        vote.after_step(step)
    assert votes == [1, 2, 3]
    vote.pace(0.3)
    for step in range(4, 14):
        vote.after_step(step)
    assert votes == [1, 2, 3, 4, 7, 10, 13]
    vote.pace(5.0)
    for step in range(14, 18):
        vote.after_step(step)
    assert votes[-2:] == [16, 17]


def test_another_rank_s_reason_is_this_one_s_too() -> None:
    request = StopRequest()
    with pytest.raises(StopNow, match="SIGTERM"):
        StopVote(request, lambda reason: "SIGTERM").now()
    assert request.reason == "SIGTERM"


def test_every_poll_is_asked_at_every_vote() -> None:
    # A poll may be a collective: one rank must not leave it out because it knows a reason already.
    asked: list[str] = []
    stop = StopRequest()
    stop.request("known")
    for name in "ab":
        stop.add_poll(lambda name=name: asked.append(name) or name)  # type: ignore[misc]
    assert stop.poll() == "known" and asked == ["a", "b"]


def test_signals_are_requests_while_a_run_listens() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    quiet, asked = StopRequest(), StopRequest()
    with quiet.listening():
        pass
    assert signal.getsignal(signal.SIGUSR1) == before
    try:
        with asked.listening():
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGTERM)
        assert asked.reason == "SIGUSR1"
        # A launcher that sees another rank leave sends SIGTERM to one that is reporting.
        os.kill(os.getpid(), signal.SIGTERM)
        assert (
            signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
        )  # also while the interpreter shuts down
    finally:
        signal.signal(signal.SIGUSR1, before)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_ctrl_c_asks_once_then_ends_and_ends_at_once_where_nothing_is_to_be_saved(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    training, starting = StopRequest(), StopRequest()
    with training.listening():
        os.kill(os.getpid(), signal.SIGINT)
        assert training.reason == "Ctrl-C"
        assert capfd.readouterr().out.endswith("Ctrl-C again stops at once\n")
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    try:
        with starting.interrupting(), pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
        assert starting.reason == "SIGTERM"
    finally:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    under_torchrun = StopRequest()
    with under_torchrun.listening():
        for _ in range(2):  # one from the terminal, one from torchrun
            os.kill(os.getpid(), signal.SIGINT)
    assert under_torchrun.reason == "Ctrl-C"
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
