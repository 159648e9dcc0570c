"""The loop with everything around it faked: what happens in which order, and whose time is counted.

One rank is this process itself; two ranks are processes of their own.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lwo_dist import distributed
from lwo_dist.callback import Callback
from lwo_dist.checkpoint.store import Outcome
from lwo_dist.config.reading import load_config
from lwo_dist.errors import UserError
from lwo_dist.stop import Stopped, StopRequest, StopVote
from lwo_dist.tasks.completion import LineCompletion
from lwo_dist.training.meter import Meter
from lwo_dist.training.results import Results
from lwo_dist.training.saver import Saver
from lwo_dist.training.system_metrics import SystemMetrics
from lwo_dist.training.trainer import Trainer
from tests import oracle
from tests.distributed.training import attach
from tests.prepared import prepared
from tests.ranks import run_ranks

CPU = torch.device("cpu")
STEP, EVALUATION, SAVE, CALLBACK = 1.0, 1000.0, 10_000.0, 100_000.0  # seconds of the fake clock
LENGTHS = [5, 9, 12, 7, 12, 6]


@dataclass
class Loop:
    """One rank's fakes: they write down what happens, and move the clock."""

    fail_saves_of: tuple[int, ...] = ()
    stop_at: int | None = None
    """SIGTERM for the last rank when so many steps are done, seen at the next vote."""
    losses: tuple[float, ...] = ()
    """What the evaluations find, the first before training; by default ever less."""
    stop_in_evaluation: int | None = None
    """SIGTERM during the evaluation of this step."""
    events: list[str] = field(default_factory=list)
    metrics: list[dict[str, float]] = field(default_factory=list)
    committed: list[int] = field(default_factory=list)
    saved: list[tuple[dict[str, Any], int]] = field(default_factory=list)
    now: float = 0.0
    request: StopRequest = field(default_factory=StopRequest)
    pending: Outcome | None = None

    def trainer(self, folder: Path, *settings: str, accumulation: int = 1) -> Trainer:
        lwo = attach(
            "replicate",
            oracle.Recipe(steps_per_layer=2, accumulation=accumulation),
            tied=False,
            dtype=torch.float32,
        )
        lwo.model.register_forward_pre_hook(self._forward)
        config = load_config(
            None,
            [
                "train.steps=6",
                "train.global_batch_size=4",
                "train.logging_steps=2",
                "eval.steps=4",
                "checkpoint.minutes=0",
                *settings,
            ],
        )
        results = Results(folder, LineCompletion(), "loss", writes=False)
        system = SystemMetrics(CPU, folder, enabled=False)
        callbacks = [Recorder(self)] if distributed.rank() == 0 else []
        saver = Saver(
            config,
            lwo,
            results,
            self,  # type: ignore[arg-type]
            about={"run": {"name": "r"}, "data": {"seed": 0}},
            callbacks=callbacks,
            on_commit=lambda step, folder: self.committed.append(step),
            checkpoint=None,
            clock=self.clock,
        )
        self.request.add_poll(self._poll)
        self.lwo = lwo
        return Trainer(
            config,
            lwo,
            prepared(LENGTHS, sequence_length=12, vocabulary=61),
            device=CPU,
            evaluate=self._evaluate,  # type: ignore[arg-type]
            meter=Meter(lwo, results, system, CPU, clock=self.clock),
            results=results,
            saver=saver,
            stop=StopVote(self.request, distributed.first_reason),
            callbacks=callbacks,
        )

    def clock(self) -> float:
        return self.now

    # what a LayerStore does

    def save(self, lwo: Any, extra: Mapping[str, Any], *, best_step: int) -> None:
        assert self.pending is None
        step = lwo.step_count
        self.events.append(f"save {step}")
        self.saved.append((dict(extra), best_step))
        self.now += SAVE
        error = "disk full" if step in self.fail_saves_of else ""
        self.pending = Outcome(step, Path(f"step_{step}"), error, bytes_written=7, seconds=2.0)

    def poll(self) -> bool:
        return self.pending is not None and distributed.rank() == 0

    def wait(self) -> Outcome | None:
        outcome, self.pending = self.pending, None
        return outcome

    # the rest

    def _forward(self, model: Any, inputs: Any) -> None:
        self.now += STEP * (1 + distributed.rank())

    def _evaluate(self, before_batch: Any) -> Any:
        self.now += EVALUATION
        step = self.lwo.step_count
        if step == self.stop_in_evaluation:
            self.request.request("SIGTERM")
        before_batch()
        self.events.append(f"evaluate {step}")
        done = sum(event.startswith("evaluate") for event in self.events)
        loss = self.losses[done - 1] if self.losses else 10.0 - step
        return SimpleNamespace(scores={"eval/loss": loss})

    def _poll(self) -> str | None:
        is_last_rank = distributed.rank() == distributed.world_size() - 1
        return "SIGTERM" if is_last_rank and self.lwo.step_count == self.stop_at else None


class Recorder(Callback):
    def __init__(self, loop: Loop):
        self.loop = loop

    def on_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        self.loop.events.append(f"metrics {step}")
        self.loop.metrics.append(dict(metrics))
        self.loop.now += CALLBACK

    def on_switch(self, step: int, layer: str) -> None:
        self.loop.events.append(f"switch {step} {layer}")

    def on_visit(self, step: int, layer: str, metrics: Mapping[str, float]) -> None:
        self.loop.events.append(f"visit {step} {layer}")

    def on_evaluation(self, step: int, scores: Mapping[str, float]) -> None:
        assert self.loop.losses or scores == {"eval/loss": 10.0 - step}
        self.loop.events.append(f"scores {step}")

    def on_checkpoint(self, step: int, folder: Path) -> None:
        assert folder == Path(f"step_{step}")
        self.loop.events.append(f"checkpoint {step}")


WHOLE_RUN = [
    *("evaluate 0", "scores 0"),
    *("switch 2 layer_0", "metrics 2", "visit 2 embed", "save 2"),
    *("switch 4 layer_1", "metrics 4", "visit 4 layer_0", "checkpoint 2"),
    *("evaluate 4", "scores 4", "save 4"),
    *("switch 6 layer_2", "metrics 6", "visit 6 layer_1", "checkpoint 4"),
    *("evaluate 6", "scores 6", "save 6", "checkpoint 6"),
]
OF_EVERY_RANK = ("evaluate", "save")


def train_whole(folder: Path) -> Loop:
    loop = Loop()
    loop.trainer(folder).train()
    loop.request = StopRequest()  # its polls do not pickle
    del loop.lwo
    return loop


def test_the_order_of_events(tmp_path: Path) -> None:
    loop = train_whole(tmp_path)
    assert loop.events == WHOLE_RUN
    assert loop.committed == [2, 4, 6]
    assert [best_step for _, best_step in loop.saved] == [0, 4, 6]
    state, _ = loop.saved[1]
    assert state["data"] == {"seed": 0, "next_step": 4} and state["run"] == {"name": "r"}
    assert set(state["results"]["evaluations"]) == {"0", "4"}


def test_the_other_ranks_do_the_same_and_rank_0_tells_of_it(tmp_path: Path) -> None:
    first, second = run_ranks(train_whole, 2, tmp_path)
    assert first.events == WHOLE_RUN
    assert second.events == [event for event in WHOLE_RUN if event.startswith(OF_EVERY_RANK)]
    assert first.committed == second.committed == [2, 4, 6]
    # Own times are rank 0's; what all ranks must agree on is the slowest one's.
    assert first.metrics[-1]["time/step_seconds"] == STEP
    assert "memory/ranks/peak_bytes_1" in first.metrics[-1]


def test_training_time_is_the_steps_own(tmp_path: Path) -> None:
    loop = train_whole(tmp_path)
    assert [metrics["train/elapsed_seconds"] for metrics in loop.metrics] == [2.0, 4.0, 6.0]
    assert [metrics["time/step_seconds"] for metrics in loop.metrics] == [1.0] * 3
    # Six steps of four examples: each of the six examples four times.
    tokens = sum(metrics["train/tokens_per_second"] * 2.0 for metrics in loop.metrics)
    assert tokens == 4 * sum(LENGTHS)
    assert [m["time/checkpoint_blocked_seconds"] for m in loop.metrics] == [0.0, SAVE, 2 * SAVE]
    # A save is reported with the metrics after the reading at which it was found to be written.
    assert ["checkpoint/seconds" in metrics for metrics in loop.metrics] == [False, False, True]
    assert loop.metrics[2]["checkpoint/bytes"] == 7.0


@pytest.mark.parametrize("logging", [1, 2, 5])
def test_every_evaluation_knows_the_training_before_it(logging: int, tmp_path: Path) -> None:
    """Wherever the metrics are logged, and in what a resumed run starts from."""
    loop = Loop()
    trainer = loop.trainer(tmp_path, "eval.steps=3", f"train.logging_steps={logging}")
    loop.now += CALLBACK  # the start of the run
    trainer.train()
    sizes = [int(trainer._batch_of(step).tokens) for step in range(6)]
    assert [list(point.items()) for point in trainer.results.curve] == [
        [
            ("step", step),
            ("training_seconds", STEP * step),
            ("tokens", sum(sizes[:step])),
            ("eval/loss", 10.0 - step),
        ]
        for step in (0, 3, 6)
    ]
    saved = {state["data"]["next_step"]: state["results"] for state, _ in loop.saved}
    assert list(saved) == [2, 3, 4, 6]
    for step, state in saved.items():
        assert (state["training_seconds"], state["tokens"]) == (STEP * step, sum(sizes[:step]))
    resumed = Results(tmp_path, LineCompletion(), "loss", writes=False)
    resumed.load_state_dict(saved[4])
    assert resumed.curve == trainer.results.curve[:2]


def test_a_checkpoint_s_cost_is_told_once(tmp_path: Path) -> None:
    loop = Loop()
    loop.trainer(tmp_path, "checkpoint.steps=4", "eval.steps=0", "train.steps=10").train()
    # Saved at 4, found to be written at 6, told at 8; the next one would be told at 12.
    told = ["checkpoint/bytes" in metrics for metrics in loop.metrics]
    assert told == [False, False, False, True, False]


def test_a_run_that_goes_on_evaluates_what_it_lacks(tmp_path: Path) -> None:
    loop = Loop()
    trainer = loop.trainer(tmp_path)
    trainer.results.evaluations[0] = {"eval/loss": 10.0}
    trainer.train()
    assert loop.events == WHOLE_RUN[2:]


def test_saves_every_so_many_steps_and_at_most_so_often(tmp_path: Path) -> None:
    by_steps = Loop()
    by_steps.trainer(tmp_path, "checkpoint.steps=3", "eval.steps=0", "train.steps=8").train()
    assert [event for event in by_steps.events if "save" in event] == ["save 3", "save 6", "save 8"]
    by_minutes = Loop()
    # A save takes longer than that, a visit does not; but the callbacks' time counts here.
    settings = ("eval.steps=0", "train.steps=8", f"checkpoint.minutes={1.5 * CALLBACK / 60}")
    by_minutes.trainer(tmp_path, *settings).train()
    assert [event for event in by_minutes.events if "save" in event] == ["save 4", "save 8"]


STALLING = (9.0, 5.0, 6.0, 4.0, 4.0, 5.0, 1.0)
PATIENT = ("train.patience=2", "eval.steps=3", "train.steps=18", "train.logging_steps=4")


def train_patiently(folder: Path, losses: tuple[float, ...], *settings: str) -> Any:
    loop = Loop(losses=losses)
    trainer = loop.trainer(folder, *PATIENT, *settings)
    trainer.train()
    kept = [event for event in loop.events if event.startswith(("evaluate", "save", "metrics"))]
    return kept, trainer.ended_early, trainer.results.best_step, loop.saved[-1]


@pytest.mark.parametrize("ranks", [1, 2])
def test_patience_ends_a_run_that_gets_no_better(ranks: int, tmp_path: Path) -> None:
    """Equal is no better; the best of steps 3 to 15 is 9, with two evaluations after it."""
    found = run_ranks(train_patiently, ranks, tmp_path, STALLING)
    for events, early, best, (state, saved_as_best) in found:
        assert early == "no better loss in 2 evaluations after step 9 (train.patience = 2)"
        assert best == saved_as_best == 9
        assert [e for e in events if "evaluate" in e] == [f"evaluate {i}" for i in range(0, 16, 3)]
        assert events[-1] == "save 15"
        # The last steps are in what is saved, though no metrics point was due.
        assert state["results"]["training_seconds"] > 0 and len(state["results"]["losses"]) == 4
        assert state["results"]["evaluations"]["15"] == {"eval/loss": 5.0}
    assert found[0][0][-3:] == ["evaluate 15", "metrics 15", "save 15"]


def test_a_run_whose_patience_lasts_is_not_early(tmp_path: Path) -> None:
    better = (9.0, 5.0, 6.0, 4.0, 5.0, 3.0, 4.0)
    events, early, best, _ = train_patiently(tmp_path / "a", better)
    assert (events[-1], early, best) == ("save 18", None, 15)
    # At the last step it is as long as it should be.
    events, early, best, _ = train_patiently(tmp_path / "b", (9.0, 5.0, 6.0, 4.0, 3.0, 5.0, 6.0))
    assert (events[-1], early, best) == ("save 18", None, 12)
    # A base that is better than all that follows does not count.
    worse = (1.0, 9.0, 8.0, 7.0, 6.0, 5.0, 4.0)
    assert train_patiently(tmp_path / "c", worse)[0][-1] == "save 18"


def test_a_run_that_ended_early_does_not_train_on(tmp_path: Path) -> None:
    _, early, _, (state, _) = train_patiently(tmp_path, STALLING)
    for patience, goes_on in ((2, False), (3, True)):
        loop = Loop()
        trainer = loop.trainer(tmp_path, *PATIENT, f"train.patience={patience}")
        trainer.results.load_state_dict(state["results"])
        trainer.train()
        assert bool(loop.events) == goes_on
        assert goes_on or trainer.ended_early == early


def stop(folder: Path) -> tuple[list[str], str, int, Path | None]:
    loop = Loop(stop_at=3)
    with pytest.raises(Stopped) as stopped:
        loop.trainer(folder).train()
    return loop.events, stopped.value.reason, stopped.value.step, stopped.value.checkpoint


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_stop_ends_in_a_save(ranks: int, tmp_path: Path) -> None:
    found = run_ranks(stop, ranks, tmp_path)
    for _, *stopped in found:
        assert stopped == ["SIGTERM", 3, Path("step_3")]
    # The step since the last metrics is logged, because its loss belongs to the saved results.
    told = [*WHOLE_RUN[:6], "metrics 3", "checkpoint 2", "save 3", "checkpoint 3"]
    assert found[0][0] == told
    for events, *_ in found[1:]:
        assert events == [event for event in told if event.startswith(OF_EVERY_RANK)]


def test_a_stop_right_after_the_metrics_does_not_log_again(tmp_path: Path) -> None:
    loop = Loop(stop_at=3)
    with pytest.raises(Stopped, match="at step 3; checkpoint step_3"):
        loop.trainer(tmp_path, "train.logging_steps=3").train()
    assert loop.events[-3:] == ["checkpoint 2", "save 3", "checkpoint 3"]
    assert len(loop.metrics) == 1


def test_a_stop_right_after_a_save_does_not_save_again(tmp_path: Path) -> None:
    loop = Loop()
    trainer = loop.trainer(tmp_path, "train.logging_steps=10")
    original = trainer.saver.save

    def save_and_stop() -> None:
        original()
        # The vote after the next step would come too late: this is as a vote at once.
        trainer.stop.now()

    loop.stop_at = 2
    trainer.stop.after_step = lambda step: None  # type: ignore[method-assign]
    trainer.saver.save = save_and_stop  # type: ignore[method-assign]
    with pytest.raises(Stopped, match="at step 2; checkpoint step_2"):
        trainer.train()
    assert [e for e in loop.events if "save" in e or "check" in e] == ["save 2", "checkpoint 2"]


def test_a_stop_before_the_first_step_saves_nothing(tmp_path: Path) -> None:
    loop = Loop(stop_in_evaluation=0)
    with pytest.raises(Stopped, match="at step 0; no step was done"):
        loop.trainer(tmp_path).train()
    assert loop.events == []


def test_a_stop_in_an_evaluation_saves_the_steps_before_it(tmp_path: Path) -> None:
    loop = Loop(stop_in_evaluation=4)
    with pytest.raises(Stopped, match="at step 4; checkpoint step_4"):
        # Logged at 3: the last step is in the reading of the stop, the evaluation is not.
        loop.trainer(tmp_path, "train.logging_steps=3").train()
    assert loop.events[3:] == [
        *("save 2", "metrics 3", "visit 2 embed", "checkpoint 2"),
        *("switch 4 layer_1", "metrics 4", "visit 4 layer_0", "save 4", "checkpoint 4"),
    ]
    assert [metrics["train/elapsed_seconds"] for metrics in loop.metrics] == [3.0, 4.0]


def spoil(trainer: Trainer, steps: range) -> None:
    """Make the loss of these steps NaN."""

    def after_forward(model: Any, inputs: Any, loss: torch.Tensor) -> torch.Tensor:
        return loss * math.nan if trainer.lwo.step_count in steps else loss

    trainer.lwo.model.register_forward_hook(after_forward)


def test_too_many_non_finite_steps_in_a_row_end_the_run(tmp_path: Path) -> None:
    settings = ("train.steps=9", "train.max_skipped_steps=3", "train.logging_steps=10")
    loop = Loop()
    trainer = loop.trainer(tmp_path, *settings)
    spoil(trainer, range(2, 9))
    with pytest.raises(
        UserError,
        match=r"not finite for 4 steps in a row, up to step 6 \(train.max_skipped_steps = 3\)",
    ):
        trainer.train()
    assert [event for event in loop.events if "save" in event] == ["save 2", "save 4"]


def test_fewer_non_finite_steps_in_a_row_are_counted_and_no_more(tmp_path: Path) -> None:
    loop = Loop()
    trainer = loop.trainer(tmp_path, "train.max_skipped_steps=3", "train.logging_steps=10")
    spoil(trainer, range(1, 3))
    trainer.train()
    assert loop.events[-1] == "checkpoint 6"
    assert loop.metrics[-1]["train/skipped_steps"] == 2.0


def test_a_checkpoint_that_fails_is_said_and_the_next_one_makes_up_for_it(tmp_path: Path) -> None:
    loop = Loop(fail_saves_of=(2,))
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        loop.trainer(tmp_path).train()
    assert (
        "\nwarning: the checkpoint of step 2 could not be written (disk full); training goes on"
        in said.getvalue()
    )
    assert loop.committed == [4, 6]
    assert loop.events == [event for event in WHOLE_RUN if event != "checkpoint 2"]


def test_the_last_checkpoint_s_failure_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the last checkpoint could not be written \(disk full\)"):
        Loop(fail_saves_of=(6,)).trainer(tmp_path).train()
    with pytest.raises(UserError, match="the last checkpoint"):
        Loop(fail_saves_of=(3,), stop_at=3).trainer(tmp_path).train()


def test_an_accumulation_is_one_step_of_the_same_batch(tmp_path: Path) -> None:
    found = []
    for accumulation in (1, 2):
        loop = Loop()
        loop.trainer(tmp_path, accumulation=accumulation).train()
        # Of the norm, because AdamW hardly notices a gradient of the wrong size.
        names = ("train/loss", "train/grad_norm")
        found.append([metrics[name] for metrics in loop.metrics for name in names])
        assert loop.metrics[0]["time/step_seconds"] == accumulation * STEP
    assert found[0] == pytest.approx(found[1], rel=1e-4)
