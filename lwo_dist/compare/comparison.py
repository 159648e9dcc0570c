"""Performs the runs of a comparison in order, and writes down the findings after each.

<storage>/<name>/comparison.json    design, rates, rows, differences
<storage>/<name>/comparison.md      the page, and its pictures beside it
<storage>/<name>-<task>-<method>-...  the runs

A finished run is not repeated, and an interrupted one resumes from its checkpoint, so the same
command resumes the comparison after any stop. A run that failed keeps its error in its row, and is
tried again when the command is given again.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

from lwo_dist import lease
from lwo_dist.cache import cache_folder
from lwo_dist.checkpoint.format import CHECKPOINTS
from lwo_dist.checkpoint.schema import LAYERS, read_json
from lwo_dist.config import Config
from lwo_dist.config.reading import make_config
from lwo_dist.console import say
from lwo_dist.errors import DamagedError, UserError, first_line
from lwo_dist.files import make_folder, write_whole
from lwo_dist.models import check_model
from lwo_dist.models.gguf import is_gguf
from lwo_dist.registry import METHODS, TASKS
from lwo_dist.report.comparison import save_comparison_pictures
from lwo_dist.run_info import public_config
from lwo_dist.stop import Stopped
from lwo_dist.storage import RunFolder
from lwo_dist.strategies.checks import check_config
from lwo_dist.tasks.base import Task
from lwo_dist.tracking.parent import ParentRun

from .child import FailedRunError, Launcher, run_children
from .design import Design, Run, Variant
from .page import comparison_page, verdicts
from .rates import best_rate
from .readings import LOSS, Row, differences, finished, means, row_of, time_to_loss

__all__ = ["FILE", "Comparison", "compare"]

FILE = "comparison.json"
PAGE = "comparison.md"
_SAME_LENGTH = 0.03
"""Two run lengths that differ by less are one: the time of a step is known no better."""


@dataclass
class Comparison:
    """What a comparison has found so far: the contents of comparison.json."""

    design: dict[str, Any]
    command: str
    rates: dict[str, dict[str, float | None]] = field(default_factory=dict)
    """Task -> method -> the learning rate that the sweep chose; None if every run failed."""
    sweep: list[Row] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    """`purpose`, `task`, `method`, `seed`, `lr`, `run_name`, `status` (`done` or `failed`), then
    `error`, or the figures of `readings.row_of` and `flops_per_step`."""
    readings: dict[str, Any] = field(default_factory=dict)
    """Task -> purpose -> method -> `mean` (`readings.means`), `against` (the difference from the
    reference), `time_to_loss` (seconds to the reference's lowest loss, or None)."""
    mlflow_run_id: str | None = None
    complete: bool = False
    """Whether every run was done or has failed."""


def compare(
    design: Design,
    *,
    storage: str,
    launcher: Launcher,
    command: Sequence[str],
    keep_models: bool = False,
    jobs: int = 1,
) -> Comparison:
    """Run the comparison to its end, or go on with it.

    Args:
        command: what was typed, for the page.
        keep_models: keep the weights of the compared runs; else their scores only.
        jobs: runs of the search for learning rates at a time. Runs that are compared have the
            machine to themselves, because their time counts.

    Raises:
        UserError: a setting is invalid, or another process runs this comparison, or it was begun
            with another design.
        Stopped: the process was asked to stop; the same command goes on.
    """
    configs = design.configs()
    for config in configs:
        _check(config)
    sources = {(config.task, config.data.model_dump_json()): config for config in configs}
    for config in sources.values():
        TASKS.get(config.task).read(config.data, cache_folder(config))
    folder = RunFolder(storage, design.name)
    folder.check_writable()
    make_folder(folder.local)
    lease.take(folder)
    with ExitStack() as stack:
        stack.enter_context(lease.renewed(folder))
        work = _Work(design, folder, launcher, shlex.join(command), keep_models, jobs)
        stack.enter_context(work.in_mlflow())
        work.all_runs()
    return work.found


class _Work:
    def __init__(
        self,
        design: Design,
        folder: RunFolder,
        launcher: Launcher,
        command: str,
        keep_models: bool,
        jobs: int,
    ):
        self.design = design
        self._folder = folder
        self._launcher: Launcher = launcher
        self._keep_models = keep_models
        self._jobs = jobs
        self._count = 0
        self._pictures: list[str] = []
        self._flops: dict[tuple[str, str], float | None] = {}
        self._baselines: dict[tuple[str, str, str], str] = {}
        self._errors: dict[str, FailedRunError] = {}
        first = design.equal_steps(
            design.tasks[0], design.methods[0], design.rates[0], design.seeds[0]
        )
        self._storage = first.config.storage
        record = {
            "name": design.name,
            "methods": {variant.label: dict(variant.settings) for variant in design.methods},
            "tasks": {variant.label: dict(variant.settings) for variant in design.tasks},
            "seeds": list(design.seeds),
            "rates": list(design.rates),
            "sweep_steps": design.sweep_steps,
            "equal_time": design.equal_time,
            "reference": design.reference,
            "config": public_config(make_config(dict(design.values))),
        }
        record = json.loads(json.dumps(record))
        before = _read(folder)
        if before is not None:
            _refuse_other_design(design.name, before["design"], record)
        self.found = Comparison(record, command)
        if before is not None:
            self.found.mlflow_run_id = before.get("mlflow_run_id")
        self._parent = ParentRun(first.config, design.name, self.found.mlflow_run_id)

    @contextmanager
    def in_mlflow(self) -> Iterator[None]:
        """The parent run in MLflow, with what was found at its end."""
        self._parent.start()
        self.found.mlflow_run_id = self._parent.run_id
        try:
            yield
        except Stopped:
            self._parent.end("KILLED")
            raise
        except BaseException:
            self._parent.end("FAILED")
            raise
        files = [self._folder.path(name) for name in (FILE, PAGE, *self._pictures)]
        self._parent.log(_metrics(self.found), files, "\n\n".join(verdicts(vars(self.found))))
        self._parent.end("FINISHED")

    def all_runs(self) -> None:
        """Every run, then the page once more."""
        for task in self.design.tasks:
            self._rates_of(task)
            self._at_equal_steps(task)
            if self.design.equal_time:
                self._at_equal_time(task)
        self.found.complete = True
        self._write()

    def _rates_of(self, task: Variant) -> None:
        chosen = self.found.rates.setdefault(task.label, {})
        if self._jobs > 1 and len(self.design.rates) > 1:
            tries = [
                self.design.sweep(task, method, lr)
                for method in self.design.methods
                for lr in self.design.rates
            ]
            # The first alone: it leaves the tokenised data and the untuned model's scores.
            for part in (tries[:1], tries[1:]):
                self._run([run for run in part if not finished(self._folder_of(run))])
            # One that had too little room beside the others is tried again alone.
            self._errors.clear()
        for method in self.design.methods:
            rates = self.design.rates
            if len(rates) == 1:
                chosen[method.label] = rates[0]
                continue
            chosen[method.label] = best_rate(rates, partial(self._sweep_loss, task, method))

    def _sweep_loss(self, task: Variant, method: Variant, lr: float) -> float:
        row = self._row(self.design.sweep(task, method, lr), self.found.sweep)
        return float(row["scores"][LOSS]) if row["status"] == "done" else math.nan

    def _at_equal_steps(self, task: Variant) -> None:
        # Seed by seed, so that a machine that becomes slower does so for all methods.
        for seed in self.design.seeds:
            for method in self.design.methods:
                lr = self.found.rates[task.label][method.label]
                if lr is not None:
                    self._row(self.design.equal_steps(task, method, lr, seed), self.found.rows)
                else:
                    self._failed_everywhere(task, method, seed)

    def _failed_everywhere(self, task: Variant, method: Variant, seed: int) -> None:
        errors = [
            row["error"]
            for row in self.found.sweep
            if row["task"] == task.label and row["method"] == method.label and "error" in row
        ]
        self.found.rows.append(
            {
                "purpose": "equal_steps",
                "task": task.label,
                "method": method.label,
                "seed": seed,
                "lr": None,
                "run_name": None,
                "status": "failed",
                "error": errors[-1] if errors else "no learning rate gave a finite loss",
            }
        )

    def _at_equal_time(self, task: Variant) -> None:
        """Each method for as long as the reference took, in training seconds."""
        seconds = {
            method.label: [row["step_seconds"] for row in self._done(task, method, "equal_steps")]
            for method in self.design.methods
        }
        reference = seconds[self.design.reference]
        if not reference:
            return
        lengths = {
            label: round(self.design.steps * median(reference) / median(own))
            for label, own in seconds.items()
            if own and label != self.design.reference
        }
        for seed in self.design.seeds:
            for method in self.design.methods:
                steps = lengths.get(method.label)
                lr = self.found.rates[task.label][method.label]
                if steps is None or lr is None:
                    continue
                if abs(steps / self.design.steps - 1) < _SAME_LENGTH:
                    continue
                known = self._known_length(task, method, seed)
                run = self.design.equal_steps_as(task, method, lr, seed, known or steps)
                self._row(run, self.found.rows)

    def _known_length(self, task: Variant, method: Variant, seed: int) -> int | None:
        """The number of steps that an interrupted comparison began such a run with."""
        name = self.design.equal_steps_as(task, method, 1.0, seed, 1).name
        path = RunFolder(self._storage, name).path("steps.json")
        return int(read_json(path)) if path.is_file() else None

    def _done(self, task: Variant, method: Variant, purpose: str) -> list[Row]:
        return [
            row
            for row in self.found.rows
            if (row["task"], row["method"], row["purpose"]) == (task.label, method.label, purpose)
            and row["status"] == "done"
        ]

    def _row(self, run: Run, rows: list[Row]) -> Row:
        """The row of a run, which is done first if it is not yet finished."""
        row: Row = {
            "purpose": run.purpose,
            "task": run.task,
            "method": run.method,
            "seed": run.seed,
            "lr": run.lr,
            "run_name": run.name,
        }
        folder = self._folder_of(run)
        try:
            if not finished(folder) and run.name not in self._errors:
                self._run([run])
            if error := self._errors.get(run.name):
                raise error
            row |= {"status": "done", **row_of(folder)}
            row["flops_per_step"] = self._flops_of(run, row.pop("base_model"), row["data"])
            self._baselines.setdefault(_scored(run), run.name)
            self._drop_weights(run, folder)
        except (FailedRunError, DamagedError, KeyError) as error:
            row |= {"status": "failed", "error": first_line(error)}
            say(f"{run.name} failed: {row['error']}")
        rows.append(row)
        self._write()
        return row

    def _run(self, runs: Sequence[Run]) -> None:
        """Do the runs; how they failed is in `_errors`."""
        for run in runs:
            self._count += 1
            say(
                f"run {self._count}: {run.purpose.replace('_', ' ')}, {run.task}, {run.method},"
                f" lr {run.lr:g}, seed {run.seed} ({run.name})"
            )
            if run.purpose == "equal_time":
                folder = self._folder_of(run)
                make_folder(folder.local)
                length = json.dumps(run.config.train.steps)
                write_whole(folder.path("steps.json"), length.encode())
        try:
            outcomes = run_children(
                [self._config_of(run) for run in runs], self._launcher, self._jobs
            )
        except Stopped:
            say(f"the same command goes on with {self.design.name}")
            raise
        self._errors |= {name: error for name, error in outcomes.items() if error is not None}
        for run in runs:
            if run.name not in self._errors:
                self._baselines.setdefault(_scored(run), run.name)

    def _config_of(self, run: Run) -> Config:
        baseline = self._baselines.get(_scored(run))
        evaluation = run.config.eval.model_copy(update={"baseline": baseline})
        tracking = run.config.tracking.model_copy(
            update={"parent_run_id": self.found.mlflow_run_id}
        )
        return run.config.model_copy(update={"eval": evaluation, "tracking": tracking})

    def _folder_of(self, run: Run) -> RunFolder:
        return RunFolder(self._storage, run.name)

    def _drop_weights(self, run: Run, folder: RunFolder) -> None:
        """A comparison has many runs, and only their scores are compared."""
        if self._keep_models and run.purpose != "sweep":
            return
        for name in (LAYERS, CHECKPOINTS, "model", "adapter"):
            if folder.path(name).is_dir():
                folder.remove_folder(name)

    def _flops_of(self, run: Run, base_model: str, counts: Mapping[str, int]) -> float | None:
        """Operations of an optimizer step; None, with a line, for a model that cannot be traced.

        Args:
            counts: as `PreparedData.counts`.
        """
        key = (run.task, run.method)
        if key not in self._flops:
            from lwo_dist.driver import model_source
            from lwo_dist.models.flops import flops_per_sequence, update_flops

            say(f"counting the operations of {run.method}")
            method = METHODS.get(run.config.method)
            base = run.config.model.model_copy(update={"name": base_model})
            config = run.config.model_copy(update={"model": base})
            length = run.config.train.sequence_length
            sequences = counts.get("packed_rows", counts["windows"])
            labels = min(round(counts["label_tokens"] / sequences), length)
            try:
                model = model_source(config, method).empty()
                lwo = run.config.lwo
                visits = method.cycle(method.layers(model, lwo), lwo)
                of_sequence = flops_per_sequence(
                    model,
                    visits,
                    length,
                    labels,
                    batches=run.config.lwo.batches,
                    suffix_backward=run.config.lwo.suffix_backward,
                    drops_trained=method.drops_trained,
                )
                of_batch = of_sequence * run.config.train.global_batch_size
                self._flops[key] = of_batch + update_flops(model, visits)
            except Exception as error:  # its code may do anything without values to compute with
                self._flops[key] = None
                say(f"the operations of {run.method} were not counted ({first_line(error)})")
        return self._flops[key]

    def _write(self) -> None:
        """comparison.json, the pictures and the page, of what there is so far."""
        self.found.readings = {task.label: self._readings(task) for task in self.design.tasks}
        local = self._folder.local
        write_whole(local / FILE, json.dumps(vars(self.found), indent=1).encode())
        pictures = save_comparison_pictures(vars(self.found), local)
        self._pictures = [path.name for path in pictures]
        page = comparison_page(vars(self.found), self._pictures)
        write_whole(local / PAGE, page.encode())
        self._folder.push([FILE, PAGE, *self._pictures])

    def _readings(self, task: Variant) -> dict[str, Any]:
        found: dict[str, Any] = {}
        reference = self.design.reference
        own = {
            purpose: {
                method.label: rows
                for method in self.design.methods
                if (rows := self._done(task, method, purpose))
            }
            for purpose in ("equal_steps", "equal_time")
        }
        if own["equal_time"]:
            # The reference, and methods that are as fast: those runs have the right length already.
            own["equal_time"] = {**own["equal_steps"], **own["equal_time"]}
        base = own["equal_steps"].get(reference, [])
        losses = [point["scores"][LOSS] for point in means(base)["curve"]] if base else []
        for purpose, by_method in own.items():
            found[purpose] = {}
            for label, rows in by_method.items():
                mean = means(rows)
                found[purpose][label] = {
                    "mean": mean,
                    "against": self._against(base, rows) if label != reference else {},
                    "time_to_loss": time_to_loss(mean["curve"], min(losses, default=math.nan)),
                }
        return found

    def _against(self, base: Sequence[Row], rows: Sequence[Row]) -> dict[str, dict[str, float]]:
        seeds = {row["seed"] for row in base} & {row["seed"] for row in rows}
        if not seeds:
            return {}
        sides = [
            [RunFolder(self._storage, row["run_name"]) for row in side if row["seed"] in seeds]
            for side in (base, rows)
        ]
        return differences(*sides)


def _check(config: Config) -> None:
    """Refuse settings or a model that no run could use. Raises: UserError."""
    from lwo_dist.driver import fitting_task

    if config.data.source is None:
        raise UserError("data.source is not set; give a folder of source files or a git repository")
    check_config(config)
    task: Task = TASKS.get(config.task)
    task.check(config)
    if config.model.name != "tiny-code" and not is_gguf(config.model.name):
        check_model(config.model, config.train.sequence_length)
        fitting_task(config)


def _metrics(found: Comparison) -> dict[str, float]:
    """`<task>/<purpose>/<method>/<score>` and the training seconds, means over the seeds."""
    metrics = {}
    for task, by_purpose in found.readings.items():
        for purpose, by_method in by_purpose.items():
            for method, reading in by_method.items():
                mean = reading["mean"]
                values = {**mean["scores"], "training_seconds": mean["training_seconds"]}
                for name, value in values.items():
                    metrics[f"{task}/{purpose}/{method}/{name}"] = float(value)
    return metrics


def _scored(run: Run) -> tuple[str, str, str]:
    """What the scores of the untuned model depend on."""
    return run.task, run.config.model.name, run.config.data.evaluate_on


def _read(folder: RunFolder) -> dict[str, Any] | None:
    folder.fetch_small()
    try:
        path = folder.file(FILE)
        if not path.is_file():
            return None
        found: dict[str, Any] = read_json(path)
        return found if isinstance(found["design"], dict) else None
    except (DamagedError, KeyError, TypeError, OSError) as error:
        raise UserError(
            f"{folder}/{FILE} is damaged ({first_line(error)}); remove it, and the comparison is"
            " made again from its finished runs"
        ) from None


def _refuse_other_design(name: str, then: dict[str, Any], now: dict[str, Any]) -> None:
    # How its runs are tracked, and whether there are more of them, does not change what they find.
    def plain(record: dict[str, Any]) -> dict[str, Any]:
        config = {key: value for key, value in record["config"].items() if key != "tracking"}
        return {**record, "config": config, "equal_time": None}

    for key, value in plain(now).items():
        if plain(then).get(key) != value:
            changed = key
            if key == "config":
                old = plain(then)["config"]
                changed = ", ".join(sorted(k for k in value if old.get(k) != value[k]))
            raise UserError(
                f"--name {name}: this comparison was begun with other settings ({changed}); give"
                " another --name, or the settings that it was begun with"
            )
