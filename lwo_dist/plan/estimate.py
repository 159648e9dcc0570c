"""What a run needs, from its config alone: memory by part, time, bytes sent, checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from lwo_dist.config import Config
from lwo_dist.config.batch import micro_batch_size
from lwo_dist.errors import UserError
from lwo_dist.layers import Visit
from lwo_dist.methods import Method
from lwo_dist.models.flops import update_flops
from lwo_dist.registry import METHODS, STRATEGIES, Registry
from lwo_dist.strategies import StrategyBuilder
from lwo_dist.strategies.checks import refuse_settings_of_others
from lwo_dist.strategies.fsdp.matrices import exchanged_numel

from .gpus import UTILISATION, Cluster
from .held import Held, Storage, flat_numel, held_bytes
from .peak import Instant, peak_of
from .rehearsal import ROOT, Batch, Rehearsal
from .subject import Subject, read_architecture

__all__ = [
    "Plan",
    "Plans",
    "Refusal",
    "computes_bf16",
    "early_plan",
    "on_ranks",
    "plan_all",
    "plan_one",
    "storage_of",
    "variants",
]

_STAGES = (1, 2, 3)  # of ZeRO


@dataclass(frozen=True)
class Plan:
    """What one rank of a run needs; bytes, of the visit that needs most."""

    method: str
    strategy: str
    stage: int
    """Of ZeRO; 0 for other strategies."""
    visit: str
    """The active layer of the visit that needs most."""
    held: Held
    """Exact: what `LWO.memory()` will say in that visit."""
    peak: Instant
    """The worst moment of a step, by part."""
    logit_bytes: int
    """What lives while head and loss are computed, in the same visit."""
    host_bytes: int
    """Parks, and optimizer state that ZeRO keeps on the host; at most."""
    flops: float
    """Of an optimizer step on this rank; the mean over a cycle."""
    bytes_sent: float
    """Of weights and gradients in a step's collectives, each as a whole tensor; the mean."""
    whole_checkpoint_bytes: int
    """The first checkpoint: all weights in fp32, and the active layer's moments."""
    checkpoint_bytes: int
    """What a later one writes: the largest layer and its moments."""

    @property
    def name(self) -> str:
        return _name(self.strategy, self.stage)

    def seconds(self, cluster: Cluster) -> tuple[float, float]:
        """An estimate of a step's time: computing, and sending."""
        sent = self.bytes_sent * (cluster.world_size - 1) / cluster.world_size
        return self.flops / (UTILISATION * cluster.gpu.flops), sent / cluster.rate


def storage_of(config: Config, world_size: int, *, bf16: bool) -> Storage:
    """How the run of `config` stores what a rank holds."""
    builder: StrategyBuilder = STRATEGIES.get(config.strategy)
    zero = builder.name == "deepspeed"
    weight_bytes = 2 if zero and bf16 else 4
    if not zero and builder.stores_16_bit(config):
        weight_bytes = 2
    written: dict[str, Any] = {}  # of the DeepSpeed config, once it has been read
    if isinstance(config.deepspeed, dict):
        written = config.deepspeed.get("zero_optimization") or {}
    offload = (written.get("offload_optimizer") or {}).get("device")
    return Storage(
        builder.name,
        world_size,
        (config.zero_stage or written.get("stage") or 3) if zero else 0,
        weight_bytes,
        offloads=zero and offload == "cpu",
        keeps_moments=config.lwo.state == "keep",
        parks_masters=config.lwo.inactive_master == "host",
        accumulates=config.lwo.gradient_accumulation_steps > 1,
        updates_in_backward=config.lwo.stateless_update == "backward",
    )


def plan_one(
    subject: Subject, config: Config, world_size: int, *, bf16: bool, on_gpu: bool = True
) -> Plan:
    """The plan of a run.

    Args:
        config: with the method of `subject`, and one of our strategies.
        bf16: the precision of the computation; else fp32.
        on_gpu: attention with dropout is fused too; on a CPU it is not.

    Raises:
        UserError: the global batch cannot be divided evenly.
    """
    storage = replace(storage_of(config, world_size, bf16=bf16), gloo=not on_gpu)
    train, accumulation = config.train, config.lwo.gradient_accumulation_steps
    size = micro_batch_size(train.global_batch_size, world_size, accumulation)
    batch = Batch(size, train.sequence_length)
    replicated = storage.kind == "replicate"
    worst: tuple[Instant, Visit, Held, Rehearsal] | None = None
    flops = {}
    prefetches = on_gpu and not storage.offloads
    for number in subject.samples:
        visit = subject.visits[number]
        held = held_bytes(
            subject.shapes,
            subject.layers,
            visit.stateful,
            storage,
            visit.stateless,
            subject.following(number) if prefetches else (),
        )
        rehearsal = subject.rehearse(
            visit,
            batch,
            bf16=bf16 and not replicated,
            autocast=bf16 and replicated,
            own_gradients=storage.kind == "fsdp" or storage.stage in (1, 2),
            on_gpu=on_gpu,
        )
        flops[number] = rehearsal.flops
        units = subject.units(visit)
        peak = peak_of(held, rehearsal.moments, units, storage, 2 if bf16 else 4)
        if worst is None or peak.total > worst[0].total:
            worst = peak, visit, held, rehearsal
    assert worst is not None
    peak, visit, held, rehearsal = worst
    every = [
        held_bytes(subject.shapes, subject.layers, visit.stateful, storage, visit.stateless)
        for visit in subject.visits
    ]
    sent = [_bytes_sent(subject, visit, storage, accumulation, bf16) for visit in subject.visits]
    largest = max(subject.numel(visit.stateful) for visit in subject.visits)
    written = max(subject.numel(visit.layers) for visit in subject.visits)
    saved = subject.numel(subject.layers)
    moments = saved if config.lwo.state == "keep" else largest
    if not subject.method.trains_adapters:
        saved = sum(math.prod(shape) for shape in subject.shapes.values())
    return Plan(
        method=subject.method.name,
        strategy=storage.kind,
        stage=storage.stage,
        visit=visit.active.name,
        held=held,
        peak=peak,
        logit_bytes=rehearsal.logit_bytes,
        host_bytes=max(
            found.park_bytes + storage.offloads * found.optimizer_state_bytes for found in every
        ),
        flops=accumulation * _mean_on_lines(flops, len(subject.visits))
        + update_flops(subject.model, subject.visits) / world_size,
        bytes_sent=sum(sent) / len(sent),
        whole_checkpoint_bytes=4 * saved + 8 * moments,
        checkpoint_bytes=4 * written + 8 * largest,
    )


def variants(config: Config) -> Iterator[tuple[str, str, Config | str]]:
    """Every method and strategy: their names, and the config with them, or why it is refused."""
    for method in METHODS.all():
        for builder in STRATEGIES.all():
            for stage in _STAGES if "zero_stage" in builder.own_settings else (None,):
                name = _name(builder.name, stage or 0)
                other = _without_foreign(config, method, builder)
                chosen = other.model_copy(
                    update={"method": method.name, "strategy": builder.name, "zero_stage": stage}
                )
                try:
                    refuse_settings_of_others(chosen, "strategy", builder, STRATEGIES)
                    method.check(chosen)
                    builder.check(chosen)
                except UserError as error:
                    yield method.name, name, str(error)
                else:
                    yield method.name, name, chosen


@dataclass(frozen=True)
class Plans:
    """The plans of all methods and strategies."""

    config: Config
    world_size: int
    bf16: bool
    parameters: int
    """Of the base model."""
    layers: int
    """That the config's method trains."""
    own: tuple[str, str]
    """Method and strategy of the config."""
    rows: Sequence[Plan | Refusal]


@dataclass(frozen=True)
class Refusal:
    """A method and a strategy that cannot be had, and why."""

    method: str
    name: str
    why: str


def on_ranks(config: Config, world_size: int) -> Config:
    """`config` on another number of ranks, each with the micro-batch that it has now."""
    workers = config.cluster.max_workers
    if workers == world_size:
        return config
    accumulation = config.lwo.gradient_accumulation_steps
    micro = micro_batch_size(config.train.global_batch_size, workers, accumulation)
    update = {"global_batch_size": micro * world_size * accumulation}
    cluster = config.cluster.model_copy(update={"num_workers": world_size})
    return config.model_copy(
        update={"train": config.train.model_copy(update=update), "cluster": cluster}
    )


def computes_bf16(config: Config) -> bool:
    """`train.precision`; auto counts as bf16, which every GPU of the table computes."""
    return config.train.precision != "fp32"


def plan_all(config: Config, world_size: int) -> Plans:
    """The plans of every method and strategy, for the model and the settings of `config`.

    Raises:
        UserError: no such model, or the global batch cannot be divided evenly.
    """
    folder, architecture = read_architecture(config)
    bf16 = computes_bf16(config)
    subjects: dict[str, Subject | str] = {}
    rows: list[Plan | Refusal] = []
    for method, strategy, chosen in variants(config):
        if method not in subjects:
            try:
                how = METHODS.get(method)
                own_config = _without(config, _foreign(how, METHODS))
                subjects[method] = Subject(own_config, how, folder, architecture)
            except UserError as error:
                subjects[method] = str(error)
        found = subjects[method]
        if isinstance(chosen, str):
            rows.append(Refusal(method, strategy, chosen))
        elif isinstance(found, str):
            rows.append(Refusal(method, strategy, found))
        else:
            rows.append(plan_one(found, chosen, world_size, bf16=bf16))
    own = subjects.get(config.method)
    known = [found for found in subjects.values() if isinstance(found, Subject)]
    if not known:
        raise UserError(f"model.name {config.model.name!r} cannot be planned: {own}")
    storage = storage_of(config, world_size, bf16=bf16)
    strategy = _name(storage.kind, storage.stage)
    return Plans(
        config=config,
        world_size=world_size,
        bf16=bf16,
        parameters=min(found.parameters for found in known),
        layers=len(own.layers) if isinstance(own, Subject) else 0,
        own=(config.method, strategy),
        rows=rows,
    )


def early_plan(config: Config) -> Plan | None:
    """The plan of the run of `config` itself; None for a method or a strategy of somebody's own,
    of which nothing is known.

    Raises:
        UserError: the model cannot be read.
    """
    if config.method not in METHODS.names or config.strategy not in STRATEGIES.names:
        return None
    found = Subject(config, METHODS.get(config.method), *read_architecture(config))
    return plan_one(found, config, config.cluster.max_workers, bf16=computes_bf16(config))


def _without_foreign(config: Config, method: Method, builder: StrategyBuilder) -> Config:
    """Without the settings that only other methods and strategies read."""
    own = {*method.own_settings, *builder.own_settings}
    foreign = _foreign(method, METHODS) | (_foreign(builder, STRATEGIES) - own)
    config = _without(config, foreign)
    if method.name != "lwo" and config.lwo.state == "keep":  # it says how layers are switched
        config = config.model_copy(update={"lwo": config.lwo.model_copy(update={"state": "reset"})})
    return config


def _foreign(chosen: Method | StrategyBuilder, registry: Registry) -> set[str]:
    """The settings that only others of its kind read."""
    others: list[Method | StrategyBuilder] = registry.all()
    return {key for other in others for key in other.own_settings} - set(chosen.own_settings)


def _without(config: Config, keys: Iterable[str]) -> Config:
    """With the defaults of these settings."""
    for key in keys:
        group, _, name = key.partition(".")
        default = getattr(Config(), group)
        value = default
        if name:
            field = getattr(default, name)
            value = getattr(config, group).model_copy(update={name: field})
        config = config.model_copy(update={group: value})
    return config


def _name(strategy: str, stage: int) -> str:
    return f"{strategy} zero {stage}" if stage else strategy


def _bytes_sent(
    subject: Subject, visit: Visit, storage: Storage, accumulation: int, bf16: bool
) -> int:
    """A step's collectives over weights and gradients, as `LWO.step` reports them, on average."""
    size = storage.world_size
    if size == 1:
        return 0
    compute_bytes = 2 if bf16 else 4
    if storage.kind == "replicate":
        numel = sum(flat_numel(subject.shapes, layer, size) for layer in visit.layers)
        return 2 * 4 * numel
    trained = subject.numel(visit.layers)
    if storage.kind == "deepspeed" and storage.stage < 3:
        return (4 + storage.weight_bytes) * trained
    gathered = reduced = 0
    units = subject.units(visit)
    once = (ROOT, max(units))  # the last layer stays gathered for backward, as the root does
    for number, unit in units.items():
        passes = 2 if unit.in_backward and number not in once and storage.kind == "fsdp" else 1
        gathered += passes * unit.gathered(size, compute_bytes)
        reduced += unit.reduced(size)
    gathered *= accumulation
    if storage.stage == 3 and len(subject.visits) > 1:
        steps = subject.config.lwo.steps_per_layer
        gathered += compute_bytes * subject.gathered_again(visit, size) // steps
    without_state = [
        subject.shapes[name] for layer in visit.stateless for name in layer.parameter_names
    ]
    return gathered + reduced + 4 * exchanged_numel(without_state, size)


def _mean_on_lines(known: Mapping[int, float], count: int) -> float:
    """The mean over `count` values, of which some are known and the others lie between them."""
    numbers = sorted(known)
    total = sum(known.values())
    for low, high in pairwise(numbers):
        total += (high - low - 1) * (known[low] + known[high]) / 2
    return total / count
