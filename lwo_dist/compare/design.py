"""Which runs a comparison consists of. Every one of them is an ordinary run."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lwo_dist.config import Config
from lwo_dist.config.reading import make_config, read_values
from lwo_dist.errors import UserError
from lwo_dist.registry import METHODS, TASKS, Registry

__all__ = ["Design", "Run", "Variant", "read_variants"]

VALIDATION_FRACTION = 0.1
"""Share of the files that the learning rates are chosen on, where the config sets none."""
CURVE_POINTS = 5
"""Evaluations of a run, where `eval.steps` is not set."""

# What every method's optimizer reads. The rest of the group is the schedule of layers.
_OPTIMIZER = (
    "betas",
    "eps",
    "weight_decay",
    "max_grad_norm",
    "gradient_accumulation_steps",
    "lr_scheduler_type",
    "warmup_steps",
)
_LABEL = re.compile(r"[^A-Za-z0-9_]+")


@dataclass(frozen=True)
class Variant:
    """A method or a task to compare, and the settings that are its own."""

    label: str
    """In names of runs, tables and pictures."""
    settings: Mapping[str, Any]
    """By group, as in a config file; they override the config's."""


@dataclass(frozen=True)
class Run:
    """One run of a comparison."""

    name: str
    purpose: str
    """`sweep`, `equal_steps` or `equal_time`."""
    task: str
    """Label."""
    method: str
    """Label."""
    lr: float
    seed: int
    config: Config


@dataclass(frozen=True)
class Design:
    """All that decides which runs there are, but for what the runs themselves find out.

    Attributes:
        values: the config's values, as `config.reading.read_values` gives them.
        seeds: of the runs that are compared; the sweep uses the first.
        rates: the learning rates that every method's sweep begins with, ascending.
        sweep_steps: optimizer steps of a run of the sweep.
        equal_time: also run each method for the reference's training time.
    """

    name: str
    values: Mapping[str, Any]
    methods: tuple[Variant, ...]
    tasks: tuple[Variant, ...]
    seeds: tuple[int, ...]
    rates: tuple[float, ...]
    sweep_steps: int
    equal_time: bool = True

    @property
    def steps(self) -> int:
        """Optimizer steps of a run that is compared."""
        return int(self._values(self.tasks[0], self.methods[0])["train"]["steps"])

    @property
    def reference(self) -> str:
        """The label of the method that the others are compared with: lora, else the last."""
        labels = [method.label for method in self.methods]
        return "lora" if "lora" in labels else labels[-1]

    def sweep(self, task: Variant, method: Variant, lr: float) -> Run:
        """A run that scores a learning rate, on the validation files."""
        changes = {
            "data": {"evaluate_on": "validation"},
            "train": {"steps": self.sweep_steps},
            "eval": {"steps": 0},
        }
        return self._run("sweep", task, method, lr, self.seeds[0], f"lr{lr:g}", changes)

    def equal_steps(self, task: Variant, method: Variant, lr: float, seed: int) -> Run:
        """A run that is compared at the config's number of steps."""
        return self._run("equal_steps", task, method, lr, seed, f"seed{seed}", {})

    def equal_steps_as(
        self, task: Variant, method: Variant, lr: float, seed: int, steps: int
    ) -> Run:
        """A run of `steps` optimizer steps, which take the reference's training time."""
        every = self._values(task, method)["eval"]["steps"]
        interval = max(1, round(every * steps / self.steps))
        changes = {"train": {"steps": steps}, "eval": {"steps": interval}}
        return self._run("equal_time", task, method, lr, seed, f"seed{seed}-time", changes)

    def configs(self) -> list[Config]:
        """A config of every method on every task.

        Raises:
            UserError: settings that do not fit together.
        """
        return [
            self.equal_steps(task, method, self.rates[0], self.seeds[0]).config
            for task in self.tasks
            for method in self.methods
        ]

    def _run(
        self,
        purpose: str,
        task: Variant,
        method: Variant,
        lr: float,
        seed: int,
        ending: str,
        changes: Mapping[str, Any],
    ) -> Run:
        name = f"{self.name}-{task.label}-{method.label}-{ending}".replace("+", "")
        own = {"run_name": name, "seed": seed, "lwo": {"lr": lr, "seed": seed}}
        values = _merged(_merged(self._values(task, method), own), changes)
        return Run(name, purpose, task.label, method.label, lr, seed, make_config(values))

    def _values(self, task: Variant, method: Variant) -> dict[str, Any]:
        """The settings of a method on a task. What the config says of one method's own matters,
        such as a schedule of layers, holds for that method only.
        """
        values = copy.deepcopy(dict(self.values))
        of_config = values.get("method", Config().method)
        own = str(method.settings.get("method", of_config))
        if own != of_config:
            lwo = values.get("lwo", {})
            values["lwo"] = {key: lwo[key] for key in _OPTIMIZER if key in lwo}
        reads = METHODS.get(own).own_settings
        for key in (key for other in METHODS.all() for key in other.own_settings):
            group, _, name = key.partition(".")
            if key not in reads and name in values.get(group, {}):
                values[group] = {**values[group]}
                del values[group][name]
        values = _merged(_merged(values, task.settings), method.settings)
        train = values.setdefault("train", {})
        if train.get("epochs") is not None:
            raise UserError(
                "train.epochs: compare needs the same number of steps for all methods; set"
                " train.steps instead"
            )
        train.setdefault("steps", Config().train.steps)
        data = values.setdefault("data", {})
        data.setdefault("validation_fraction", VALIDATION_FRACTION)
        evaluation = values.setdefault("eval", {})
        if not evaluation.get("steps"):
            evaluation["steps"] = max(1, train["steps"] // CURVE_POINTS)
        values.setdefault("checkpoint", {}).setdefault("keep", 1)
        values.setdefault("tracking", {}).setdefault("log_model", False)
        return values


def read_variants(key: str, given: str) -> tuple[Variant, ...]:
    """The variants in a list such as `lwo,lora,full` or `lora,lora_r64.yaml`.

    Args:
        key: `method` or `task`.
        given: separated by commas: names, or YAML files of settings that override the config's.

    Raises:
        UserError: an unknown name, an unreadable file, one label twice.
    """
    registry: Registry = {"method": METHODS, "task": TASKS}[key]
    variants = []
    for entry in filter(None, (part.strip() for part in given.split(","))):
        if entry.endswith((".yaml", ".yml")):
            variants.append(Variant(_LABEL.sub("_", Path(entry).stem), read_values(entry)))
        else:
            try:
                registry.check(entry)
            except ValueError as error:
                raise UserError(f"--{key}s: {error}, or a YAML file of settings") from None
            variants.append(Variant(_LABEL.sub("_", entry.rpartition(":")[2]), {key: entry}))
    labels = [variant.label for variant in variants]
    if not labels or len(set(labels)) < len(labels):
        raise UserError(
            f"--{key}s = {given!r} must name at least one {key}, and none twice; give a list such"
            f" as {','.join(registry.names[:2])}"
        )
    return tuple(variants)


def _merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(dict(values))
    for key, value in changes.items():
        old = merged.get(key)
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            merged[key] = _merged(old, value)
        else:
            merged[key] = copy.deepcopy(value)
    return merged
