"""DeepSpeed engines: which are supported, who sets the learning rate, how a run builds its own."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.config import DeepSpeedConfigError
from deepspeed.runtime.engine import DeepSpeedEngine
from pydantic import ValidationError
from torch import nn
from torch.utils.cpp_extension import get_default_build_root

from lwo_dist import distributed
from lwo_dist.errors import UserError

from .private import ZERO_OPTIMIZERS, partition_function
from .settings import refuse_settings

__all__ = [
    "RateOfEngine",
    "build_engine",
    "check_engine",
    "check_environment",
    "partitioner",
    "refuse_own_checkpoints",
    "warn",
    "warn_overruled",
]


def check_engine(engine: Any, accumulation: int) -> None:
    """Refuse an engine that cannot be trained layer by layer.

    Raises:
        UserError: with reason and remedy.
    """
    name = type(engine).__name__
    if type(engine) is not DeepSpeedEngine:
        raise UserError(
            f"a {name} cannot be trained layer by layer; pass the engine of deepspeed.initialize"
        )
    if engine.optimizer is None or engine.basic_optimizer is None:
        raise UserError(
            "the engine has no optimizer; pass optimizer=torch.optim.AdamW(...) to"
            " deepspeed.initialize"
        )
    if type(engine.optimizer) not in ZERO_OPTIMIZERS:
        raise UserError(
            f"the engine's optimizer is a {type(engine.optimizer).__name__}; set"
            " zero_optimization.stage to 1, 2 or 3 in the deepspeed config, in bf16 or fp32"
        )
    refuse_settings(engine._config._param_dict)
    inner = type(engine.basic_optimizer).__name__
    if "adam" not in inner.lower():
        raise UserError(
            f"the engine's optimizer is {inner}; layers are trained with AdamW: make the engine"
            " with AdamW"
        )
    if engine.gradient_accumulation_steps() != accumulation:
        raise UserError(
            f"the engine's gradient_accumulation_steps = {engine.gradient_accumulation_steps()},"
            f" but LWOConfig's = {accumulation}; set them alike"
        )
    if engine.micro_steps % accumulation:
        raise UserError(
            "the engine is inside a gradient accumulation; attach right after a whole optimizer"
            " step"
        )
    for parameter_name, parameter in engine.module.named_parameters():
        if parameter.dtype not in (torch.float32, torch.bfloat16):
            raise UserError(
                f"parameter {parameter_name} is stored in {parameter.dtype}; use bf16 or fp32"
            )


def refuse_own_checkpoints(engine: Any) -> Callable[[], None]:
    """Make the engine refuse to save and load its own checkpoints, and its module to load weights:
    they have the optimizer of one layer, and ZeRO's masters would overwrite loaded weights.

    Returns:
        A function that ends it.
    """
    remedy = (
        "while lwo_dist is attached; save lwo.state_dict() and lwo.read_layer(layer) for the"
        " weights, and set them with lwo.load_state_dict and lwo.write_layer"
    )

    def refuse(name: str) -> Callable[..., None]:
        def refused(*_: Any, **__: Any) -> None:
            raise RuntimeError(f"{name} cannot be used {remedy}")

        return refused

    for name in ("save_checkpoint", "load_checkpoint"):
        setattr(engine, name, refuse(f"engine.{name}"))
    hook = engine.module.register_load_state_dict_pre_hook(refuse("load_state_dict"))

    def end() -> None:
        for name in ("save_checkpoint", "load_checkpoint"):
            delattr(engine, name)
        hook.remove()

    return end


class RateOfEngine:
    """Keeps the engine's learning-rate scheduler, or one of its optimizer, on that optimizer.

    That optimizer is emptied at the first switch and no longer trains anything: it only holds the
    rate.
    """

    def __init__(self, engine: Any):
        scheduler = engine.lr_scheduler
        inner = engine.basic_optimizer
        self._inner = inner
        self._holder: torch.optim.Optimizer | None = None
        self._before = [group["lr"] for group in inner.param_groups]
        if scheduler is None:
            if any("initial_lr" in group for group in inner.param_groups):  # set by schedulers
                self._follow("the scheduler of the optimizer that the engine was made with")
            return
        name = type(scheduler).__name__
        held = getattr(scheduler, "optimizer", None)
        if held is engine.optimizer:
            scheduler.optimizer = inner
        elif held is not inner:
            raise UserError(
                f"the engine's scheduler {name} does not hold the engine's optimizer, so it cannot"
                " go on across switches; make the engine without it and set lr_scheduler_type in"
                " LWOConfig"
            )
        if getattr(scheduler, "cycle_momentum", False):
            raise UserError(
                f"the engine's scheduler {name} changes the betas, which are LWOConfig's; set"
                " cycle_momentum: false"
            )
        self._follow(f"the engine's scheduler {name}")

    @property
    def follows(self) -> bool:
        """Whether a scheduler of the engine, or of its optimizer, sets the rate."""
        return self._holder is not None

    def now(self, scheduled: float) -> float:
        """The next step's rate.

        Raises:
            RuntimeError: the rate of the engine's optimizer was changed, and nothing reads it.
        """
        rates = [group["lr"] for group in self._inner.param_groups]
        if self._holder is not None:
            return float(rates[0])
        if rates != self._before:
            raise RuntimeError(
                "the learning rate of the optimizer that the engine was made with changed after"
                f" attach ({self._before[0]} -> {rates[0]}), without effect; make its scheduler"
                " before attach, or call lwo.step(lr=...)"
            )
        return scheduled

    def _follow(self, scheduler: str) -> None:
        if len({group["lr"] for group in self._inner.param_groups}) > 1:
            raise UserError(
                f"{scheduler} sets several learning rates; a layer has one: use one group"
            )
        self._holder = self._inner
        warn(f"{scheduler} sets the learning rate; lr and its schedule in LWOConfig are not used")


def warn_overruled(engine: Any, made: torch.optim.Optimizer, *, rate: bool) -> None:
    """Warn where LWOConfig overrides the engine's optimizer."""
    other = []
    for key in ["betas", "eps", "weight_decay", *(["lr"] if rate else [])]:
        ours = _plain(made.defaults[key])
        theirs = {
            _plain(group.get(key, ours)): None for group in engine.basic_optimizer.param_groups
        }  # keeps the order
        if set(theirs) != {ours}:
            other.append(f"{key} {' and '.join(map(str, theirs))} -> {ours}")
    if other:
        warn(f"LWOConfig wins over the engine's optimizer: {', '.join(other)}")


def build_engine(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    settings: dict[str, Any],
) -> Any:
    """`deepspeed.initialize` in an existing process group, from torchrun, Ray Train or a test.

    Args:
        model: plain, or with parameters divided by `partitioner`; its trainable parameters are
            `parameters`.
        optimizer: over `parameters`.
        settings: the complete DeepSpeed config, as `settings.resolve` returns it.
    """
    _join()
    settings = {**settings, "zero_force_ds_cpu_optimizer": False}
    with _refusals():
        engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=list(parameters),
            optimizer=optimizer,
            config=settings,
            dist_init_required=False,
        )
    return engine


def partitioner(settings: dict[str, Any]) -> Callable[[nn.Parameter], None]:
    """A collective function that reduces a whole parameter to this rank's part of rank 0's values.

    This is stage 3 from the start; pass the resulting model to `build_engine` with the same
    `settings`.
    """
    _join()
    with _refusals():
        partition = partition_function(settings)
    dtype = torch.bfloat16 if settings.get("bf16", {}).get("enabled") else torch.float32

    def keep_part(parameter: nn.Parameter) -> None:
        parameter.data = parameter.data.to(dtype)
        partition([parameter])

    return keep_part


@contextmanager
def _refusals() -> Iterator[None]:
    """Turn DeepSpeed's config errors (e.g. a misspelt `zero_optimization` key) into one line."""
    try:
        yield
    except (ValidationError, DeepSpeedConfigError) as error:
        raise UserError(f"deepspeed config: {' '.join(str(error).split())}") from None


def _join() -> None:
    """Let DeepSpeed use the existing process group."""
    check_environment()
    os.environ.setdefault("LOCAL_RANK", "0")
    deepspeed.init_distributed(dist_init_required=False, verbose=False)


def check_environment() -> None:
    """Avoid needing a compiler or waiting for a dead one; call before DeepSpeed joins the group.

    Raises:
        UserError: a compile of a DeepSpeed operator was killed and left its lock behind.
    """
    lock = _dead_lock(Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()))
    if lock is not None:
        raise UserError(
            f"{lock} was left by a compile of DeepSpeed's operators that was killed, and the next"
            " one would wait for it for ever; delete that file, unless another machine that shares"
            " the folder compiles now"
        )
    # An all-reduce through shared memory on CPUs: DeepSpeed compiles it at startup, but works
    # without it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _dead_lock(root: Path) -> Path | None:
    """A lock among torch's compiled extensions that no process on this machine holds open."""
    locks = {str(path) for path in [*root.glob("*/lock"), *root.glob("*/*/lock")]}
    if not locks:
        return None
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            locks.discard(str(link.readlink()))
        except OSError:
            continue  # the process has ended or belongs to another user
    return Path(min(locks)) if locks else None


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else value


def warn(message: str) -> None:
    if distributed.rank() == 0:
        warnings.warn(message, stacklevel=3)
