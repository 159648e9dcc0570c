"""The memory formulas against the models' published sizes, the shipped configs, and what autograd
keeps.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from lwo_dist.config.batch import check_world_sizes
from lwo_dist.config.reading import load_config
from lwo_dist.memory import DecoderSize, fsdp_bytes, local_bytes, step_bytes
from lwo_dist.methods import Method
from lwo_dist.models.source import _enable_checkpointing
from lwo_dist.registry import METHODS
from lwo_dist.schedule import make_schedule
from lwo_dist.strategies.checks import check_config
from tests import sizes

CONFIGS = Path(__file__).parents[2] / "launch" / "configs"
GPU_CONFIGS = sorted(CONFIGS.glob("*gpu*.yaml"))


@pytest.mark.parametrize(
    ("size", "billions"), [("1.5B", 1.54), ("7B", 7.62), ("14B", 14.77), ("32B", 32.76)]
)
def test_the_sizes_are_the_published_ones(size: str, billions: float) -> None:
    found = sizes.size_of(sizes.model_of(size))
    assert round(found.parameters / 1e9, 2) == billions
    assert found.outside_parameters / 1e9 == pytest.approx(
        found.hidden * found.vocabulary * (1 if size == "1.5B" else 2) / 1e9, rel=1e-4
    )


def test_there_are_configs_for_one_gpu_and_for_eight() -> None:
    names = [path.name for path in GPU_CONFIGS]
    assert names == [
        "1.5b_1gpu_24gb.yaml",
        "32b_8gpu_80gb.yaml",
        "7b_1gpu_80gb.yaml",
        "7b_8gpu_80gb.yaml",
    ]


@pytest.mark.parametrize("path", GPU_CONFIGS, ids=lambda path: path.name)
def test_a_config_fits_the_gpus_that_it_names_and_trains_every_layer(path: Path) -> None:
    size, gpus, gigabytes = re.fullmatch(r"([\d.]+b)_(\d)gpu_(\d+)gb", path.stem).groups()  # type: ignore[union-attr]
    config = load_config(path)
    check_config(config)
    check_world_sizes(config)
    assert config.model.name == f"Qwen/Qwen2.5-Coder-{size.upper()}"
    assert config.cluster.num_workers == int(gpus)
    model = sizes.model_of(size.upper())
    peak = sizes.lwo_peak(model, config, int(gpus)) / 1e9
    assert peak <= sizes.USABLE * int(gigabytes)
    text = path.read_text()
    assert f"# Computed: {peak:.0f} GB of {gigabytes} GB" in text
    assert f"launch/configs/{path.name} data.source=DIR" in text
    micro_batch = config.train.global_batch_size // int(gpus)
    micro_batch //= config.lwo.gradient_accumulation_steps
    assert micro_batch == 1 or f"{micro_batch} sequences" in text
    method: Method = METHODS.get(config.method)
    layers = method.layers(model, config.lwo)
    schedule = make_schedule(config.lwo, [layer.name for layer in layers])
    assert f"{config.train.steps} steps are two cycles over the {len(layers)} layers" in text
    assert round(config.train.steps / schedule.steps_per_cycle) == 2
    assert schedule.never_active(config.train.steps) == []


def test_what_16_bit_storage_saves_is_as_the_config_says() -> None:
    path = CONFIGS / "7b_1gpu_80gb.yaml"
    bf16 = load_config(path, ["fsdp.storage=bf16", "train.precision=bf16"])
    model = sizes.model_of("7B")
    saved = sizes.lwo_peak(model, load_config(path), 1) - sizes.lwo_peak(model, bf16, 1)
    parks = 2 * sizes.size_of(model).parameters
    said = f"saves\n# {saved / 1e9:.0f} GB of it, and parks {parks / 1e9:.0f} GB"
    assert said in path.read_text()


# ---- by hand

HAND = DecoderSize(
    parameters=1000,
    stack_layers=4,
    stack_layer_parameters=200,
    hidden=8,
    intermediate=16,
    vocabulary=50,
)


def test_the_formulas_by_hand() -> None:
    assert fsdp_bytes(1000, 200, 2) == {
        "parameter_bytes": 2000,
        "gradient_bytes": 400,
        "optimizer_state_bytes": 800,
    }
    assert fsdp_bytes(1000, 200, 2, storage_bytes=2)["parameter_bytes"] == 1000 + 200
    held = (4 + 3) * 30 * 2 * 8  # four layers' inputs of 3 x 10 tokens, and the final norm
    layer = 30 * 2 * (15 * 8 + 4 * 16)
    common = {"sequences": 3, "length": 10}
    assert step_bytes(HAND, gradient_numel=200, **common) == {
        "gathered_bytes": 2 * (200 + 600),
        "activation_bytes": held + max(12 * 30 * 50, layer + 6 * 200),
    }
    assert step_bytes(HAND, gradient_numel=2000, **common)["activation_bytes"] == (
        held + layer + 6 * 2000  # more than the logits, 18,000
    )
    plain = step_bytes(HAND, gradient_numel=0, checkpointing=False, gathers=False, **common)
    assert plain == {"gathered_bytes": 0, "activation_bytes": 3 * 480 + 4 * layer + 12 * 30 * 50}


# ---- activations


def kept_bytes(model: Qwen2ForCausalLM, tokens: torch.Tensor) -> int:
    """Bytes that autograd keeps of a forward through the layers, but for the weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model.model(input_ids=tokens).last_hidden_state
    assert output.requires_grad
    return local_bytes(kept)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_estimate_of_activations_is_an_upper_one_and_close(checkpointing: bool) -> None:
    settings = Qwen2Config(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    model = Qwen2ForCausalLM(settings).to(torch.bfloat16).train()
    if checkpointing:
        _enable_checkpointing(model)
    tokens = torch.randint(64, (2, 128), generator=torch.Generator().manual_seed(0))
    estimate = step_bytes(
        DecoderSize(
            parameters=sizes.size_of(model).parameters,
            stack_layers=6,
            stack_layer_parameters=sizes.size_of(model).stack_layer_parameters,
            hidden=64,
            intermediate=176,
            vocabulary=0,
        ),
        sequences=2,
        length=128,
        gradient_numel=0,
        checkpointing=checkpointing,
    )["activation_bytes"]
    if checkpointing:  # the forward keeps the layers' inputs; one layer comes in backward
        estimate -= 2 * 128 * 2 * (15 * 64 + 4 * 176)
    kept = kept_bytes(model, tokens)
    # Beside the layers there is the rotary embedding.
    assert 0.8 * estimate < kept < 1.02 * estimate, (kept, estimate)
