"""Models that are read shard by shard are the models that `from_pretrained` reads whole."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from lwo_dist.config import ModelConfig, TrainConfig
from lwo_dist.errors import UserError
from lwo_dist.models import weights as loading
from tests import families
from tests.loading import load_model
from tests.ranks import run_ranks

SIZES = {
    "vocab_size": 67,  # Odd, and no multiple of anything: the ranks' shards differ in size.
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def make(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "tied":
        return Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True))
    if kind == "untied":
        return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False))
    if kind == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=67, n_positions=64, n_embd=16, n_layer=2, n_head=4)
        )
    if kind == "mixtral":
        return MixtralForCausalLM(
            MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
        )
    return families.make(kind)


def load(folder: Path) -> nn.Module:
    return load_model(ModelConfig(name=str(folder)), TrainConfig(), strategy="fsdp")


def predict(model: Any) -> torch.Tensor:
    tokens = torch.arange(40).view(2, 20)
    more = {"decoder_input_ids": tokens.flip(0)} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=tokens, **more).logits
    return found


def logits(folder: Path) -> tuple[torch.Tensor, bool]:
    """What the loaded model computes, and whether rank 0 had to read it whole."""
    whole = []
    receive, loading.receive = loading.receive, lambda *args: (whole.append(1), receive(*args))
    values = predict(load(folder))
    loading.receive = receive
    return values, bool(whole)


def all_logits(folders: list[Path]) -> list[tuple[torch.Tensor, bool]]:
    return [logits(folder) for folder in folders]


@pytest.mark.parametrize("world_size", [2, 3])
def test_logits(tmp_path: Path, world_size: int) -> None:
    kinds = ["tied", "untied", "gpt2", "mixtral", "zamba2", "t5", "bart"]
    folders = [tmp_path / kind for kind in kinds]
    for kind, folder in zip(kinds, folders, strict=True):
        make(kind).save_pretrained(folder)
    of_ranks = run_ranks(all_logits, world_size, folders)
    for i, (kind, folder) in enumerate(zip(kinds, folders, strict=True)):
        auto = AutoModelForSeq2SeqLM if kind in ("t5", "bart") else AutoModelForCausalLM
        expected = predict(auto.from_pretrained(folder))
        for values, whole in (found[i] for found in of_ranks):
            # Each layer is gathered to the very numbers of the checkpoint: nothing may differ.
            assert torch.equal(values, expected), kind
            assert whole == (kind == "mixtral"), kind


def refused(folders: list[Path]) -> str:
    with pytest.raises(UserError) as caught:
        load(folders[dist.get_rank()])
    return str(caught.value)


def test_refused_together(tmp_path: Path) -> None:
    """One rank alone sees the problem; the others must not wait for it."""
    whole, partial, fused = tmp_path / "whole", tmp_path / "partial", tmp_path / "fused"
    for folder in (whole, partial):
        make("untied").save_pretrained(folder, max_shard_size="10KB")
    next(iter(partial.glob("*.safetensors"))).unlink()
    assert "download or save the folder again" in one_message(
        run_ranks(refused, 2, [whole, partial])
    )
    assert "nowhere' is not a folder" in one_message(
        run_ranks(refused, 2, [whole, tmp_path / "nowhere"])
    )

    make("mixtral").save_pretrained(fused)
    weights = load_file(fused / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, fused / "model.safetensors", metadata={"format": "pt"})
    assert "1 missing weights, first model.norm.weight" in one_message(
        run_ranks(refused, 2, [fused, fused])
    )


def one_message(messages: list[str]) -> str:
    assert len(set(messages)) == 1
    return messages[0]


def write_llama(folder: Path, *, vocab_size: int, hidden_size: int, num_layers: int) -> int:
    """Save a random untied Llama; its size in bytes."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {
            name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()
        }
    save_file(
        {name: torch.rand(shape) for name, shape in shapes.items()}, folder / "model.safetensors"
    )
    return sum(4 * shape.numel() for shape in shapes.values())


def memory_growth(folder: Path) -> int:
    """Bytes that loading adds to this process at its peak, mapped pages of the file included."""
    load(folder.parent / "first")  # Imports what a first load imports.
    before = int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0])
    model = load(folder)
    assert all(p.to_local().count_nonzero() > 0 for p in model.parameters())
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


@pytest.mark.parametrize(
    ("vocab_size", "hidden_size", "num_layers", "allowed"),
    [
        (40000, 320, 5, 40e6),
        pytest.param(62000, 1024, 8, 300e6, marks=pytest.mark.long),
    ],
)
def test_memory(
    tmp_path: Path, vocab_size: int, hidden_size: int, num_layers: int, allowed: float
) -> None:
    """A rank's peak is its share of the fp32 weights and little more, whatever the largest
    tensor.
    """
    make("untied").save_pretrained(tmp_path / "first")
    size = write_llama(
        tmp_path / "large", vocab_size=vocab_size, hidden_size=hidden_size, num_layers=num_layers
    )
    grown = run_ranks(memory_growth, 2, tmp_path / "large")
    print(f"{size / 1e6:.0f} MB; grown by {[round(g / 1e6) for g in grown]} MB")
    assert max(grown) <= size / 2 + allowed
