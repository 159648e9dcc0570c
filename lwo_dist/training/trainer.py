"""The loop. One step, from here to the ranks:

for batch in micro_batches(step):          data: a pure function of (seed, step)
    loss = token losses of the batch       Trainer._loss
    lwo.backward(loss)                     hook -> strategy: gradients of the active layer
    report = lwo.step()                    hook -> strategy: reduce, clip, update; then the switch
every logging_steps: metrics               one collective for all of them
every eval.steps:    evaluate, save        and the best checkpoint is kept
every visit:         save                  a copy on the host; a thread writes it
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lwo_dist import distributed
from lwo_dist.callback import Callback
from lwo_dist.checkpoint.store import LayerStore, Outcome
from lwo_dist.config import Config
from lwo_dist.data import PreparedData, label_tokens, micro_batches
from lwo_dist.data.batches import IGNORED_LABEL, global_batch_indices
from lwo_dist.errors import UserError
from lwo_dist.hook import LWO, StepReport
from lwo_dist.memory import peak_bytes
from lwo_dist.stop import StopNow, Stopped, StopVote

from .evaluate import Evaluation
from .results import Results
from .system_metrics import SystemMetrics
from .visits import Visits
from .watchdog import Watchdog

__all__ = ["Trainer"]

_MOST_RANKS = 64  # with points of their own; MLflow's pages draw a chart for each


class Trainer:
    """Trains to `config.train.steps`, from wherever the hook stands. Every rank runs one.

    Args:
        evaluate: a collective that scores the model on the held-out lines; calls its argument
            before each batch.
        about_run: what a checkpoint says of the run it is from.
        system: the load of every node, for the metrics.
        callbacks: on rank 0 only; empty elsewhere.
        on_commit: called on every rank, at the same place in the loop, for each checkpoint that is
            there.
        checkpoint: the folder that training goes on from.
    """

    def __init__(
        self,
        config: Config,
        lwo: LWO,
        data: PreparedData,
        results: Results,
        store: LayerStore,
        *,
        device: torch.device,
        evaluate: Callable[[Callable[[], None]], Evaluation],
        about_run: Mapping[str, Any],
        stop: StopVote,
        system: SystemMetrics,
        callbacks: Sequence[Callback] = (),
        on_commit: Callable[[int, Path], None] = lambda step, folder: None,
        checkpoint: Path | None = None,
    ):
        self.config, self.lwo, self.data, self.device = config, lwo, data, device
        self.results, self.store = results, store
        self.evaluate, self.about_run, self.callbacks, self.on_commit = (
            evaluate,
            about_run,
            callbacks,
            on_commit,
        )
        self.system, self.visits = system, Visits(lwo, device)
        self._batch_of = {
            "seed": config.seed,
            "global_batch_size": config.train.global_batch_size,
        }
        self.stop, self.watchdog = stop, Watchdog(config.cluster.timeout_s)
        self._report: StepReport | None = None
        self._committed = checkpoint
        self._saved_step = lwo.step_count
        self._saved_at = time.monotonic()
        self._last_save: dict[str, float] = {}
        self._start_stretch()

    def train(self) -> None:
        """Evaluate, train, evaluate. The last step always ends in an evaluation and a checkpoint.

        Raises:
            Stopped: on every rank alike, with what was done saved.
            CollectiveError: a rank died or hangs.
        """
        self.lwo.model.train()
        with self.watchdog:
            try:
                self._train()
            except StopNow as stop:
                raise self._stopped(stop.reason) from None

    def _train(self) -> None:
        train, steps = self.config.train, self.config.train.steps
        if (
            self._evaluates(self.lwo.step_count)
            and self.lwo.step_count not in self.results.evaluations
        ):
            self._evaluate()  # before the first step, or where a stop came before it was done
        while self.lwo.step_count < steps:
            self._report = report = self._train_step(self.lwo.step_count)
            done = self.lwo.step_count
            if report.switched:
                for callback in self.callbacks:
                    callback.on_switch(done, self.lwo.active_layer.name)
            if done % min(train.logging_steps, train.max_skipped_steps) == 0:
                self._refuse_non_finite()
            if done % train.logging_steps == 0 or done == steps:
                self._log(report)
            self.stop.after_step(done)
            if self._evaluates(done):
                self._evaluate()
            if self._evaluates(done) or self._save_is_due(done):
                self._save()
        self._settle_last()

    def _evaluates(self, step: int) -> bool:
        return step in (0, self.config.train.steps) or _every(self.config.eval.steps, step)

    def _stopped(self, reason: str) -> Stopped:
        if self.lwo.step_count > self._saved_step:
            if self._report is not None and self.lwo.step_count > self._stretch_first:
                self._log(self._report)
            self._save()
        self._settle_last()
        return Stopped(reason, self.lwo.step_count, self._committed)

    def _settle_last(self) -> None:
        outcome = self._settle()
        if outcome is not None and outcome.error:
            raise UserError(
                f"the last checkpoint could not be written ({outcome.error}); make room, and give"
                " the command again"
            )

    def _train_step(self, step: int) -> StepReport:
        lwo = self.lwo
        # Dropout, if the model has any, is then a function of (seed, step, rank) too, and a resume
        # needs no state.
        torch.manual_seed(hash((self.config.seed, step, distributed.rank())))
        accumulation = lwo.config.gradient_accumulation_steps
        batches = micro_batches(
            self.data,
            step=step,
            world_size=distributed.world_size(),
            rank=distributed.rank(),
            accumulation=accumulation,
            **self._batch_of,
        )
        tokens = label_tokens(self.data, step=step, **self._batch_of)
        step_loss = torch.zeros((), device=self.device)
        for batch in batches:
            self.watchdog.beat(step, lwo.active_layer.name)
            loss = (
                self._loss({name: tensor.to(self.device) for name, tensor in batch.items()})
                / tokens
            )
            step_loss += loss.detach()
            # The strategy averages over ranks and micro-batches; the sum over them is wanted.
            lwo.backward(loss * distributed.world_size() * accumulation)
            report = lwo.step()
        self._stretch_loss += step_loss
        self.visits.add(step, step_loss, report)
        self._stretch_tokens += int(self.data.lengths[self._indices(step)].sum())
        return report

    def _loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Sum over the label tokens of the cross-entropy, in nats and fp32."""
        logits = self.lwo.model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        return cross_entropy(
            logits.flatten(0, 1).float(),
            labels.flatten(),
            ignore_index=IGNORED_LABEL,
            reduction="sum",
        )

    def _log(self, report: StepReport) -> None:
        step, elapsed = self.lwo.step_count, time.perf_counter() - self._stretch_started
        steps = step - self._stretch_first
        loss = distributed.all_reduce(self._stretch_loss) / steps
        own = {
            "elapsed": elapsed,
            "memory/peak_bytes": peak_bytes(self.device),
            **{f"memory/{name}": value for name, value in self.lwo.memory().items()},
            "time/switch_seconds": self.lwo.switch_seconds - self._stretch_switch,
            "saved": float(self.store.poll()),
        }
        everyone = distributed.gather_floats([*own.values(), *self.system.read()], self.device)
        largest = {
            name: max(values)
            for name, values in zip(own, zip(*everyone, strict=True), strict=False)
        }
        self.stop.pace(largest["elapsed"] / steps)
        self.results.add_time(elapsed, self._stretch_tokens)
        metrics = {
            "train/loss": float(loss),
            "train/learning_rate": report.lr,
            "train/grad_norm": float(report.grad_norm) if report.grad_norm is not None else 0.0,
            "train/tokens_per_second": self._stretch_tokens / elapsed,
            "train/elapsed_seconds": self.results.training_seconds,
            "train/skipped_steps": float(self.lwo.skipped_steps),
            "lwo/active_layer": float(
                [layer.name for layer in self.lwo.layers].index(report.layer)
            ),
            "lwo/cycle": float(self.lwo.schedule.cycle(step - 1)),
            **{name: value for name, value in largest.items() if "/" in name},
            **{
                f"memory/ranks/peak_bytes_{rank}": row[1]
                for rank, row in enumerate(everyone[:_MOST_RANKS])
            },
            "comm/bytes_per_step": float(report.bytes_sent),
            "time/step_seconds": elapsed / steps,
            "time/checkpoint_blocked_seconds": self.results.blocked_seconds,
            **self._last_save,
            **self.system.metrics([row[len(own) :] for row in everyone]),
        }
        self._last_save = {}
        self.results.add_metrics(metrics)
        for callback in self.callbacks:
            callback.on_metrics(step, metrics)
        for visit in self.visits.take():
            for callback in self.callbacks:
                callback.on_visit(visit.step, visit.layer, visit.metrics)
        if largest["saved"]:
            self._settle()
        self._start_stretch()

    def _evaluate(self) -> None:
        self.lwo.flush()
        with self._off_the_clock(), self.watchdog.paused("evaluation"):
            evaluation = self.evaluate(self.stop.now)
        self.results.add_evaluation(self.lwo.step_count, evaluation)
        for callback in self.callbacks:
            callback.on_evaluation(self.lwo.step_count, evaluation.scores)

    def _save_is_due(self, step: int) -> bool:
        settings = self.config.checkpoint
        if settings.steps:
            return _every(settings.steps, step)
        if self.lwo.schedule.position(step)[1] != 0:
            return False
        # Clocks differ: rank 0's counts.
        return distributed.broadcast_object(
            time.monotonic() - self._saved_at >= 60 * settings.minutes
        )

    def _save(self) -> None:
        """Start a checkpoint of this step; the loop goes on as soon as the host has its copy."""
        step = self.lwo.step_count
        extra = {
            "data": {**self._batch_of, "fingerprint": self.data.fingerprint, "next_step": step},
            "results": self.results.state_dict(),
            "run": self.about_run,
        }
        started = time.perf_counter()
        with self._off_the_clock(), self.watchdog.paused("checkpoint"):
            self._settle()
            self.store.save(self.lwo, extra, best_step=self.results.best_step)
        self._saved_at, self._saved_step = time.monotonic(), step
        self.results.blocked_seconds += time.perf_counter() - started

    def _settle(self) -> Outcome | None:
        """Wait for the save that is under way and tell everyone what became of it. A collective."""
        with self.watchdog.paused("checkpoint"):
            outcome = self.store.wait()
        if outcome is None:
            return None
        if outcome.error:
            if distributed.rank() == 0:
                print(
                    f"warning: the checkpoint of step {outcome.step} could not be written"
                    f" ({outcome.error}); training goes on, and the next one holds what this one"
                    " lacks",
                    flush=True,
                )
            return outcome
        self._committed = outcome.folder
        self.on_commit(outcome.step, outcome.folder)
        for callback in self.callbacks:
            callback.on_checkpoint(outcome.step, outcome.folder)
        self._last_save = {
            "checkpoint/bytes": float(outcome.bytes_written),
            "checkpoint/seconds": outcome.seconds,
        }
        return outcome

    def _refuse_non_finite(self) -> None:
        in_a_row = int(self.lwo.skipped_in_a_row)
        if in_a_row >= self.config.train.max_skipped_steps:
            raise UserError(
                f"loss or gradient norm was not finite for {in_a_row} steps in a row, up to step"
                f" {self.lwo.step_count} (train.max_skipped_steps ="
                f" {self.config.train.max_skipped_steps}); lower lwo.lr, or look at the data"
            )

    @contextmanager
    def _off_the_clock(self) -> Iterator[None]:
        """Training time is the loop's own: evaluations and saves are not in it."""
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        self._stretch_started += seconds
        self.visits.pause(seconds)

    def _start_stretch(self) -> None:
        """What the next progress line is about starts now."""
        self._stretch_started = time.perf_counter()
        self._stretch_first = self.lwo.step_count
        self._stretch_tokens = 0
        self._stretch_loss = torch.zeros((), device=self.device)
        self._stretch_switch = self.lwo.switch_seconds

    def _indices(self, step: int) -> Any:
        return global_batch_indices(
            len(self.data.lengths), self._batch_of["global_batch_size"], self.config.seed, step
        )


def _every(interval: int, step: int) -> bool:
    return interval > 0 and step % interval == 0
