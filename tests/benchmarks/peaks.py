"""The peak memory of real steps, counted, against `lwo-dist plan`: models x strategies x methods.

    python tests/benchmarks/peaks.py --json FILE

Tiny models on two gloo ranks. Every tensor's bytes are counted while two cycles run, the buffers of
collectives included; the largest of the second cycle is the peak.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import transformers

from lwo_dist import distributed
from lwo_dist.config import Config
from lwo_dist.config.reading import load_config
from lwo_dist.hook import LWO, attach
from lwo_dist.losses import IGNORED_LABEL, summed_loss
from lwo_dist.models.source import _enable_checkpointing
from lwo_dist.plan.estimate import Plan, plan_one, storage_of
from lwo_dist.plan.held import Held, held_bytes
from lwo_dist.plan.live import LiveBytes
from lwo_dist.plan.subject import Subject, read_architecture
from lwo_dist.registry import METHODS
from lwo_dist.strategies.fsdp.builder import shard_model
from lwo_dist.strategies.replicate import compute_in_bf16
from tests.ranks import run_ranks

__all__ = ["METHOD_NAMES", "MODELS", "STRATEGY_NAMES", "compare", "config_of", "make", "measure"]

_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False}
_LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    **_TOKENS,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "gpt2": {
        "n_embd": 64,
        "n_layer": 4,
        "n_head": 4,
        "vocab_size": 384,
        "n_positions": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "use_cache": False,
    },
    "qwen2": _LLAMA
    | {"hidden_size": 48, "num_hidden_layers": 4, "vocab_size": 8192, "tie_word_embeddings": True},
    "qwen3_moe": _LLAMA
    | {
        "num_hidden_layers": 4,
        "moe_intermediate_size": 32,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "head_dim": 16,
    },
    "t5": {
        "d_model": 64,
        "d_ff": 160,
        "d_kv": 16,
        "num_layers": 3,
        "num_decoder_layers": 3,
        "num_heads": 4,
        "vocab_size": 512,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
        "use_cache": False,
    },
}
"""Differently shaped; that of qwen2 has a large vocabulary."""
METHOD_NAMES = ("lwo", "full", "lora")
STRATEGY_NAMES = ("replicate", "fsdp", "zero 1", "zero 2", "zero 3")
LENGTH = 96
_SEQUENCES = 2  # of a rank
_RANKS = 2


def config_of(
    strategy: str, method: str, *more: str, accumulation: int = 1, precision: str = "fp32"
) -> Config:
    name, _, stage = strategy.partition(" ")
    settings = [
        f"method={method}",
        f"strategy={'deepspeed' if stage else name}",
        f"train.precision={precision}",
        f"train.sequence_length={LENGTH}",
        f"train.global_batch_size={_SEQUENCES * _RANKS * accumulation}",
        "lwo.steps_per_layer=2",
        f"lwo.gradient_accumulation_steps={accumulation}",
        f"cluster.num_workers={_RANKS}",
        *([f"zero_stage={stage}"] if stage else []),
    ]
    return load_config(None, [*settings, *more])


def settings_of(model: str) -> Any:
    return transformers.AutoConfig.for_model(model, **MODELS[model])


def make(name: str) -> Any:
    settings = settings_of(name)
    kind = (
        transformers.AutoModelForSeq2SeqLM
        if settings.is_encoder_decoder
        else transformers.AutoModelForCausalLM
    )
    torch.manual_seed(0)
    return kind.from_config(settings)


def _attach(name: str, config: Config) -> LWO:
    model = make(name)
    METHODS.get(config.method).prepare(model, config)
    if config.train.gradient_checkpointing:
        _enable_checkpointing(model)
    model.train()
    if config.strategy == "fsdp":
        shard_model(model, precision=config.train.precision, device_type="cpu")
    elif config.strategy == "replicate":
        if config.train.precision == "bf16":
            compute_in_bf16(model, "cpu")
    else:
        from lwo_dist.strategies.deepspeed import settings
        from lwo_dist.strategies.deepspeed.builder import make_engine

        resolved = settings.resolve(config, distributed.world_size())
        model = make_engine(model, config.lwo, resolved, METHODS.get(config.method))
    return attach(model, config.lwo, config.method)


def _step(lwo: LWO) -> int:
    """Returns the bytes sent."""
    tokens = torch.ones((_SEQUENCES, LENGTH), dtype=torch.int64)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    settings: Any = lwo.module.config
    if settings.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.ones_like(tokens)
    for _ in range(lwo.config.gradient_accumulation_steps):
        lwo.backward(_loss(lwo, inputs, torch.ones_like(tokens)))
        report = lwo.step()
    return report.bytes_sent


def _loss(lwo: LWO, inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    labels[:, -1] = IGNORED_LABEL  # the last token of a sequence predicts nothing
    return summed_loss(lwo.model, inputs, labels) / labels.numel()


def measure(cases: list[tuple[str, Config]]) -> list[dict[str, Any]]:
    """On one rank, for each case: of the second cycle the `peak` in bytes, the mean of bytes `sent`
    in a step, and what `LWO.memory` says in each visit after its first step.
    """
    transformers.logging.set_verbosity_error()
    rows = []
    for name, config in cases:
        with LiveBytes() as live:
            lwo = _attach(name, config)
            cycle = 2 * len(lwo.visits)
            for _ in range(cycle):
                _step(lwo)
            gc.collect()
            live.peak = live.now
            memory = {}
            sent = 0
            peaks: dict[str, int] = {}
            for step in range(cycle):
                visit = lwo.active_layer.name
                sent += _step(lwo)
                peaks[visit] = max(live.peak, peaks.get(visit, 0))
                live.peak = live.now
                if step % 2 == 0:
                    memory[visit] = lwo.memory()
            # On a CPU, what is parked on the host is counted, too.
            on_device = [peaks[visit] - memory[visit]["park_bytes"] for visit in peaks]
            rows.append({"peak": max(on_device), "memory": memory, "sent": sent / cycle})
            lwo.detach()
        del lwo
        gc.collect()
    return rows


def predict(name: str, config: Config) -> tuple[Plan, dict[str, Held]]:
    """The plan of a case, and what a rank holds in each visit."""
    bf16 = config.train.precision == "bf16"
    with tempfile.TemporaryDirectory() as folder:
        settings_of(name).save_pretrained(folder)
        model = config.model.model_copy(update={"name": folder})
        config = config.model_copy(update={"model": model})
        found = Subject(config, METHODS.get(config.method), *read_architecture(config))
        plan = plan_one(found, config, _RANKS, bf16=bf16, on_gpu=False)
    storage = storage_of(config, _RANKS, bf16=bf16)
    held = {
        visit.active.name: held_bytes(
            found.shapes, found.layers, visit.stateful, storage, visit.stateless
        )
        for visit in found.visits
    }
    return plan, held


def compare(
    strategy: str,
    names: Sequence[str],
    *more: str,
    methods: Sequence[str] = METHOD_NAMES,
    **settings: Any,
) -> list[dict[str, Any]]:
    """A row for each model and method: what was measured, and what the plan says."""
    cases = [
        (name, config_of(strategy, method, *more, **settings))
        for name in names
        for method in methods
    ]
    zero = strategy.startswith("zero")
    ranks = run_ranks(measure, _RANKS, cases, timeout=600, deepspeed=zero)
    rows = []
    for (name, config), *both in zip(cases, *ranks, strict=True):
        plan, held = predict(name, config)
        measured = max(row["peak"] for row in both)
        rows.append(
            {
                "model": name,
                "strategy": strategy,
                "method": config.method,
                "precision": config.train.precision,
                "checkpointing": config.train.gradient_checkpointing,
                "measured": measured,
                "plan": plan.peak.total,
                "ratio": round(plan.peak.total / measured, 3),
                "sent": both[0]["sent"],
                "plan_sent": plan.bytes_sent,
                "memory": both[0]["memory"],
                "held": {visit: asdict(found) for visit, found in held.items()},
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    arguments = parser.parse_args()
    rows = []
    for strategy in STRATEGY_NAMES:
        for more in ([], ["train.gradient_checkpointing=true"]):
            rows += compare(strategy, list(MODELS), *more)
    arguments.json.write_text(json.dumps({"cases": rows}, indent=1))
    for row in rows:
        kept = "recomputed" if row["checkpointing"] else "kept"
        print(f"{row['model']:<10}{row['strategy']:<10}{row['method']:<5}{kept:<11}{row['ratio']}")


if __name__ == "__main__":
    main()
