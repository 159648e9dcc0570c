"""The training loop. One step, from here to the ranks:

    batch = global_batch(data, step)          data: a pure function of (seed, step), or, with
                                              `batches: cycle`, of (seed, batch of the cycle)
    for micro_batch in batch.micro_batches:
        loss = sum of token losses / tokens   Trainer._summed_loss
        lwo.backward(loss)                    hook -> strategy: gradients of the active layer
        report = lwo.step()                   hook -> strategy: reduce, clip, update; may switch

and between steps:

        every logging_steps:  log                 the meter's reading is passed to the callbacks
    every eval.steps:     evaluate, save      the best checkpoint is kept; may end the run
    every visit:          save                a copy on the host; a thread writes it
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from lwo_dist import distributed
from lwo_dist.callback import Callback
from lwo_dist.config import Config
from lwo_dist.console import say
from lwo_dist.data import GlobalBatch, PreparedData, global_batch
from lwo_dist.errors import UserError
from lwo_dist.hook import LWO, StepReport
from lwo_dist.losses import IGNORED_LABEL, summed_loss
from lwo_dist.stop import StopNow, Stopped, StopVote

from .evaluate import Evaluation
from .meter import Meter
from .results import Results
from .saver import Saver
from .watchdog import Watchdog

__all__ = ["Trainer"]


class Trainer:
    """Trains to `config.train.steps` from the hook's current position, or until `train.patience`
    evaluations in a row have brought nothing better. Every rank runs one.

    Args:
        evaluate: a collective that scores the model on the held-out examples and calls its argument
            before each batch.
        callbacks: on rank 0 only; empty elsewhere.
    """

    def __init__(
        self,
        config: Config,
        lwo: LWO,
        data: PreparedData,
        *,
        device: torch.device,
        evaluate: Callable[[Callable[[], None]], Evaluation],
        meter: Meter,
        results: Results,
        saver: Saver,
        stop: StopVote,
        callbacks: Sequence[Callback] = (),
    ):
        self.config = config
        self.lwo = lwo
        self.data = data
        self.device = device
        self.evaluate = evaluate
        self.meter = meter
        self.results = results
        self.saver = saver
        self.stop = stop
        self.callbacks = callbacks
        self.watchdog = Watchdog(config.cluster.timeout_s)
        self.ended_early: str | None = None
        """Why the run has ended before `train.steps`."""

    def train(self) -> None:
        """Evaluate, train, evaluate. The last step always ends with an evaluation and a checkpoint;
        `ended_early` then says if it came before `train.steps`.

        Raises:
            Stopped: on all ranks, after saving the progress.
            CollectiveError: a rank has died or hangs.
            UserError: too many consecutive non-finite steps, or the last checkpoint could not be
                written.
        """
        self.lwo.model.train()
        with self.watchdog:
            try:
                self._train()
            except StopNow as stop:
                raise self._stopped(stop.reason) from None

    def _train(self) -> None:
        settings = self.config.train
        step = self.lwo.step_count
        if self._evaluation_is_due(step) and step not in self.results.evaluations:
            self._evaluate()  # before the first step, or if a stop interrupted it
        self.meter.restart()  # nor is the start
        is_over = self._has_stalled()
        while step < settings.steps and not is_over:
            report = self._train_step(step)
            step = self.lwo.step_count
            if report.switched:
                for callback in self.callbacks:
                    callback.on_switch(step, self.lwo.active_layer.name)
            if step % min(settings.logging_steps, settings.max_skipped_steps) == 0:
                self._refuse_non_finite()
            if step % settings.logging_steps == 0 or step == settings.steps:
                self._log()
            self.stop.after_step(step)
            if self._evaluation_is_due(step):
                self._evaluate()
                is_over = self._has_stalled()
                if is_over and self.meter.steps > 0:
                    self._log()
                self._save()
            elif self.saver.is_due(step):
                self._save()
        self._settle_last()
        if step < settings.steps:
            label = self.results.task.score_named(self.results.metric).label
            self.ended_early = (
                f"no better {label} in {self.results.stalled} evaluations after step"
                f" {self.results.best_step} (train.patience = {settings.patience})"
            )

    def _has_stalled(self) -> bool:
        """Whether the patience is at its end; a collective if there is one."""
        patience = self.config.train.patience
        if patience is None:
            return False
        # Unlike machines may differ in the last digit of a score: rank 0's count.
        return distributed.broadcast_object(self.results.stalled >= patience)

    def _train_step(self, step: int) -> StepReport:
        _seed_dropout(self.config.seed, step)
        batch = self._batch_of(step)
        step_loss = torch.zeros((), device=self.device)
        self.meter.begin_step()
        for micro_batch in batch.micro_batches:
            self.watchdog.beat(step, self.lwo.active_layer.name)
            loss = self._summed_loss(micro_batch) / batch.label_tokens
            step_loss += loss.detach()
            # The strategy averages over ranks and micro-batches, but the sum over them is needed.
            self.lwo.backward(loss * distributed.world_size() * len(batch.micro_batches))
            report = self.lwo.step(wait=False)
        self.meter.after_step(step_loss, batch.tokens, report)
        return report

    def _batch_of(self, step: int) -> GlobalBatch:
        return global_batch(
            self.data,
            seed=self.config.seed,
            step=self.lwo.schedule.batch(step),
            global_batch_size=self.config.train.global_batch_size,
            world_size=distributed.world_size(),
            rank=distributed.rank(),
            accumulation=self.lwo.config.gradient_accumulation_steps,
        )

    def _summed_loss(self, micro_batch: dict[str, Tensor]) -> Tensor:
        """Sum of the cross-entropy over the label tokens, in nats and fp32."""
        labels = micro_batch["labels"]  # on the CPU, where the labelled positions are looked up
        inputs = {
            name: tensor.to(self.device) for name, tensor in micro_batch.items() if name != "labels"
        }
        next_tokens = pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)
        return summed_loss(self.lwo.model, inputs, next_tokens)

    def _refuse_non_finite(self) -> None:
        in_a_row = int(self.lwo.skipped_in_a_row)
        if in_a_row >= self.config.train.max_skipped_steps:
            raise UserError(
                f"loss or gradient norm was not finite for {in_a_row} steps in a row, up to step"
                f" {self.lwo.step_count} (train.max_skipped_steps ="
                f" {self.config.train.max_skipped_steps}); lower lwo.lr, or look at the data"
            )

    def _log(self) -> None:
        step = self.lwo.step_count
        reading = self.meter.read(save_is_written=self.saver.is_written)
        self.stop.pace(reading.step_seconds)
        metrics = {**reading.metrics, **self.saver.take_metrics()}
        self.results.add_metrics(metrics)
        for callback in self.callbacks:
            callback.on_metrics(step, metrics)
            for visit in reading.visits:
                callback.on_visit(visit.step, visit.layer, visit.metrics)
        if reading.save_is_written:
            with self.watchdog.paused("checkpoint"):
                self.saver.settle()
        self.meter.restart()  # time in callbacks is not training time

    def _evaluation_is_due(self, step: int) -> bool:
        interval = self.config.eval.steps
        if step in (0, self.config.train.steps):
            return True
        return interval > 0 and step % interval == 0

    def _evaluate(self) -> None:
        step = self.lwo.step_count
        self.lwo.flush()
        if step == 0:
            many = self.results.task.example[1]
            say(f"evaluating before training: {len(self.data.held_out)} held-out {many}")
        with self.meter.off_the_clock(), self.watchdog.paused("evaluation"):
            evaluation = self.evaluate(self.stop.now)
            self.results.add_evaluation(step, evaluation)
            for callback in self.callbacks:
                callback.on_evaluation(step, evaluation.scores)

    def _save(self) -> None:
        with self.meter.off_the_clock(), self.watchdog.paused("checkpoint"):
            self.saver.save()

    def _settle_last(self) -> None:
        with self.watchdog.paused("checkpoint"):
            self.saver.settle_last()

    def _stopped(self, reason: str) -> Stopped:
        """Save the progress since the last checkpoint."""
        step = self.lwo.step_count
        if step > self.saver.saved_step:
            if self.meter.steps > 0:
                self._log()
            self._save()
        self._settle_last()
        return Stopped(reason, step, self.saver.committed)


def _seed_dropout(seed: int, step: int) -> None:
    """Make dropout a function of (seed, step, rank), so that a resume needs no RNG state."""
    torch.manual_seed(hash((seed, step, distributed.rank())))
