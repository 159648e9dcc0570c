"""What `speed.py` and `links.py` compare: each method as a function that takes one optimizer step.

All clip to the same norm, use the same fused AdamW without weight decay, and share `loss_of`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import random
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import peft
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import lwo_dist
from lwo_dist import distributed
from lwo_dist.config import Config, LoRAConfig
from lwo_dist.layers import find_layers
from lwo_dist.methods.lora import LoRA
from lwo_dist.strategies.fsdp.builder import shard_model
from tests import sizes

__all__ = [
    "METHODS",
    "PREFIX",
    "RANK",
    "SHAPES",
    "SUFFIX",
    "Contender",
    "Job",
    "Rival",
    "Shape",
    "hooked",
    "loss_of",
    "make_model",
    "plain_step",
    "why_not",
]

LR = 1e-4
MAX_NORM = 1.0
RANK = 16
LISA_LAYERS = 2
"""The layers that LISA trains at a time besides embedding and head (the paper's gamma)."""


# ---- models


@dataclass(frozen=True)
class Shape:
    """A model of random weights, and what it is trained on."""

    config: Callable[[], Any]
    """transformers' config."""
    sequences: int
    length: int
    """Of each sequence, in tokens."""
    methods: tuple[str, ...] | None = None
    """None: all."""
    checkpointing: tuple[bool, ...] = (False, True)
    together: bool = True
    """Whether the methods' models are in memory at the same time, to take turns step by step."""


def _llama(**settings: Any) -> Callable[[], Any]:
    return lambda: LlamaConfig(**settings)


def _qwen_half_billion() -> Any:
    return Qwen2Config(
        vocab_size=151_936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )


def _qwen(size: str) -> Callable[[], Any]:
    return lambda: sizes.model_of(size).config


_TINY = _llama(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
_46M = _llama(
    vocab_size=8192,
    hidden_size=512,
    intermediate_size=1376,
    num_hidden_layers=12,
    num_attention_heads=8,
    num_key_value_heads=8,
)
_SMOLLM2_135M = _llama(
    vocab_size=49_152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)
_LARGE = ("lwo", "lwo+prefix", "lwo+suffix", "lwo+prefix+suffix", "lora", "lora+suffix")

SHAPES = {
    "tiny": Shape(_TINY, 2, 16),
    "46M": Shape(_46M, 2, 256),
    "SmolLM2-135M": Shape(_SMOLLM2_135M, 2, 256),
    "Qwen2.5-Coder-0.5B": Shape(_qwen_half_billion, 4, 2048),
    "Qwen2.5-Coder-1.5B": Shape(_qwen("1.5B"), 4, 2048),
    # As NVIDIA's NeMo AutoModel measures LoRA: qwen2_5_7b_peft_benchmark.yaml.
    "Qwen2.5-Coder-7B": Shape(_qwen("7B"), 2, 4096, _LARGE),
    "Qwen2.5-Coder-32B": Shape(_qwen("32B"), 1, 2048, _LARGE, (True,), together=False),
}


@dataclass(frozen=True)
class Job:
    """How the methods train in one case."""

    shape: Shape
    checkpointing: bool = False
    device: str = "cpu"
    steps_per_visit: int = 3
    """Of the methods that change what they train."""
    loss: Literal["own", "chunked"] = "own"
    """The model's own, or that of `lwo_dist.causal_lm_loss`."""

    @property
    def on_gpu(self) -> bool:
        return torch.device(self.device).type == "cuda"

    def autocast(self) -> torch.autocast:
        device = torch.device(self.device).type
        return torch.autocast(device, torch.bfloat16, enabled=self.on_gpu)


def make_model(job: Job, dtype: torch.dtype = torch.float32) -> Any:
    """The same random weights at every call."""
    config = job.shape.config()
    config.use_cache = False
    kind: Any = Qwen2ForCausalLM if isinstance(config, Qwen2Config) else LlamaForCausalLM
    torch.manual_seed(0)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(job.device):
            model = kind(config)
    finally:
        torch.set_default_dtype(usual)
    if job.checkpointing:
        # transformers renames this; 5.10 has the old name only.
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
        # Else backward would go through all layers, whichever are trained.
        model.disable_input_require_grads()
    return model.train()


def loss_of(job: Job, model: Any, tokens: Tensor) -> Tensor:
    """The mean loss of the next token."""
    batch = {"input_ids": tokens, "labels": tokens}
    if job.loss == "chunked":
        return lwo_dist.causal_lm_loss(model, batch)
    loss: Tensor = model(**batch).loss
    return loss


# ---- methods


@dataclass
class Contender:
    """A model and the function that takes one optimizer step on a batch of tokens."""

    model: nn.Module
    step: Callable[[Tensor], Any]
    visits: int = 1
    """Of a cycle; 1: all steps are alike."""
    switches: list[float] = field(default_factory=list)
    """Seconds that each switch took so far."""


@dataclass(frozen=True)
class Rival:
    make: Callable[[Job], Contender]
    levers: tuple[str, ...] = ()
    """The fields of LWOConfig that it needs."""
    package: str | None = None
    """That it needs besides ours."""


def why_not(rival: Rival) -> str | None:
    """Why a method cannot be measured here; None if it can."""
    missing = [lever for lever in rival.levers if lever not in lwo_dist.LWOConfig.model_fields]
    if missing:
        return f"LWOConfig has no field {missing[0]}"
    if rival.package is not None and importlib.util.find_spec(rival.package) is None:
        return f"{rival.package} is not installed"
    return None


def lwo(job: Job, **levers: Any) -> Contender:
    """One layer at a time, by the hook; on a GPU sharded over one rank and stored in bf16."""
    if not job.on_gpu:
        return hooked(job, make_model(job), "lwo", **levers)
    distributed.init_process_group(600)
    model = make_model(job, torch.bfloat16)
    shard_model(model, precision="bf16", device_type="cuda")
    return hooked(job, model, "lwo", **levers)


def lwo_stateless(job: Job, **levers: Any) -> Contender:
    """With other layers updated without state, by the hook, on whole fp32 weights."""
    own: dict[str, Any] = {"order": "random", "state": "reset", "head_rows": "all"}
    return hooked(job, make_model(job), "lwo", **own, **levers)


def full(job: Job) -> Contender:
    """All parameters, by the hook."""
    return hooked(job, make_model(job), "full")


def lora_by_the_hook(job: Job, **levers: Any) -> Contender:
    model = make_model(job, torch.bfloat16 if job.on_gpu else torch.float32)
    LoRA().prepare(model, Config(lora=LoRAConfig(rank=RANK)))
    return hooked(job, model.to(job.device), "lora", **levers)


def hooked(job: Job, model: Any, method: str, **levers: Any) -> Contender:
    """Through `lwo_dist.attach`."""
    config = lwo_dist.LWOConfig(
        lr=LR, max_grad_norm=MAX_NORM, steps_per_layer=job.steps_per_visit, **levers
    )
    hook = lwo_dist.attach(model, config, method)
    # FSDP2 casts by itself.
    casts = hook.strategy_name == "replicate"
    contender = Contender(model, lambda tokens: None, len(hook.visits))

    def step(tokens: Tensor) -> Any:
        before = hook.switch_seconds
        with job.autocast() if casts else contextlib.nullcontext():
            loss = loss_of(job, hook.model, tokens)
        hook.backward(loss)
        report = hook.step()
        if report.switched:
            contender.switches.append(hook.switch_seconds - before)
        return report

    contender.step = step
    return contender


def plain_full(job: Job) -> Contender:
    """All parameters, in a plain loop."""
    model = make_model(job)
    return Contender(model, plain_step(job, model, list(model.parameters())))


def lora(job: Job) -> Contender:
    """As peft's users run it: get_peft_model, rank 16, all linear layers, a plain loop."""
    model = make_model(job, torch.bfloat16 if job.on_gpu else torch.float32)
    settings = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    model = peft.get_peft_model(model, settings)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Contender(model, plain_step(job, model, trained))


def plain_step(
    job: Job, model: Any, trained: Sequence[nn.Parameter]
) -> Callable[[Tensor], torch.Tensor]:
    optimizer = adamw(trained)

    def step(tokens: Tensor) -> Tensor:
        backward(job, model, tokens, trained)
        optimizer.step()
        optimizer.zero_grad()
        return torch.zeros(())

    return step


def plain_lwo(job: Job) -> Contender:
    """One layer at a time, in a plain loop: what the hook is measured against."""
    model = make_model(job)
    parameters = dict(model.named_parameters())
    layers = [[parameters[name] for name in layer.parameter_names] for layer in find_layers(model)]
    contender = Contender(model, lambda tokens: None, len(layers))
    done = 0
    trained = layers[0]
    optimizer = switch_to(model, trained)

    def step(tokens: Tensor) -> None:
        nonlocal done, trained, optimizer
        backward(job, model, tokens, trained)
        optimizer.step()
        optimizer.zero_grad()
        done += 1
        if done % job.steps_per_visit == 0:
            started = time.perf_counter()
            trained = layers[done // job.steps_per_visit % len(layers)]
            optimizer = switch_to(model, trained)
            contender.switches.append(time.perf_counter() - started)

    contender.step = step
    return contender


def badam(job: Job) -> Contender:
    """BAdam 1.4 (Luo, Yu and Li, 2024), its embedding and head among the blocks."""
    from badam import BlockOptimizer

    model = make_model(job, torch.bfloat16 if job.on_gpu else torch.float32)
    with quiet():
        optimizer = BlockOptimizer(
            base_optimizer=adamw(list(model.parameters())),
            named_parameters_list=list(model.named_parameters()),
            switch_block_every=job.steps_per_visit,
            switch_mode="ascending",
            include_embedding=True,
            include_lm_head=True,
        )
    contender = Contender(model, lambda tokens: None, optimizer.block_num)
    switch = optimizer.switch_trainable_params

    def timed_switch() -> None:
        started = time.perf_counter()
        with quiet():
            switch()
        contender.switches.append(time.perf_counter() - started)

    optimizer.switch_trainable_params = timed_switch

    def step(tokens: Tensor) -> None:
        backward(job, model, tokens, [p for p in model.parameters() if p.requires_grad])
        optimizer.step()
        optimizer.zero_grad()

    contender.step = step
    return contender


def lisa(job: Job) -> Contender:
    """LISA (Pan et al., 2024): embedding and head always, and a few layers drawn every K steps."""
    model = make_model(job, torch.bfloat16 if job.on_gpu else torch.float32)
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    always = list({id(p): p for module in ends for p in module.parameters()}.values())
    layers = [list(layer.parameters()) for layer in model.model.layers]
    generator = random.Random(0)

    def draw() -> list[nn.Parameter]:
        chosen = generator.sample(layers, min(LISA_LAYERS, len(layers)))
        return [parameter for layer in chosen for parameter in layer]

    contender = Contender(model, lambda tokens: None)
    done = 0
    drawn = draw()
    of_ends, of_drawn = adamw(always), switch_to(model, drawn, always)

    def step(tokens: Tensor) -> None:
        nonlocal done, drawn, of_drawn
        backward(job, model, tokens, [*always, *drawn])
        for optimizer in (of_ends, of_drawn):
            optimizer.step()
            optimizer.zero_grad()
        done += 1
        if done % job.steps_per_visit == 0:
            started = time.perf_counter()
            drawn = draw()
            of_drawn = switch_to(model, drawn, always)
            contender.switches.append(time.perf_counter() - started)

    contender.step = step
    return contender


def backward(job: Job, model: Any, tokens: Tensor, trained: Sequence[nn.Parameter]) -> None:
    with job.autocast():
        loss = loss_of(job, model, tokens)
    loss.backward()
    nn.utils.clip_grad_norm_(trained, MAX_NORM)


def switch_to(
    model: nn.Module, trained: Sequence[nn.Parameter], always: Iterable[nn.Parameter] = ()
) -> torch.optim.Optimizer:
    """Freeze all but `trained` and `always`; an optimizer for `trained`."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in (*trained, *always):
        parameter.requires_grad_(True)
    return adamw(trained)


def adamw(parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0, fused=True)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """BAdam prints what it trains, and warns of weights in fp32."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


PREFIX: dict[str, Any] = {"batches": "cycle"}
SUFFIX: dict[str, Any] = {"suffix_backward": 0.25}
ALL: dict[str, Any] = {"stateless": "all", "embeddings": "always"}
ABOVE: dict[str, Any] = {"stateless": "suffix"}

METHODS: dict[str, Rival] = {
    "lwo": Rival(lwo),
    "lwo+prefix": Rival(partial(lwo, **PREFIX), tuple(PREFIX)),
    "lwo+suffix": Rival(partial(lwo, **SUFFIX), tuple(SUFFIX)),
    "lwo+prefix+suffix": Rival(partial(lwo, **PREFIX, **SUFFIX), (*PREFIX, *SUFFIX)),
    "lwo+stateless": Rival(partial(lwo_stateless, **ALL), tuple(ALL)),
    "lwo+stateless suffix": Rival(
        partial(lwo_stateless, embeddings="visit", **ABOVE), tuple(ABOVE)
    ),
    "plain_lwo": Rival(plain_lwo),
    "lora": Rival(lora),
    "lora+suffix": Rival(partial(lora_by_the_hook, **SUFFIX), tuple(SUFFIX)),
    "full": Rival(full),
    "plain_full": Rival(plain_full),
    "badam": Rival(badam, package="badam"),
    "lisa": Rival(lisa),
}
