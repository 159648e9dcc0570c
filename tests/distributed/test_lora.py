"""Method lora under every strategy: it equals a plain peft loop, and its base stays as it is."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import lwo_dist
from lwo_dist.cli import main
from lwo_dist.config import Config, LoRAConfig
from lwo_dist.driver import prepare
from lwo_dist.errors import UserError
from lwo_dist.hook import LWO
from lwo_dist.memory import lora_bytes, lora_numel, padded_numel
from lwo_dist.methods.lora import LoRA
from lwo_dist.run import run
from lwo_dist.strategies.deepspeed.builder import make_engine
from lwo_dist.strategies.fsdp.builder import shard_model
from tests import oracle
from tests.distributed import test_run, zero
from tests.distributed.test_rooms import whole_run
from tests.distributed.test_run import make_config, stop_after
from tests.distributed.training import train
from tests.ranks import RanksError, run_ranks

inputs = test_run.inputs
METHOD = LoRA()
RECIPE = oracle.Recipe(steps=6, lr=1e-2, max_grad_norm=0.5)
RANK = 4
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")  # peft's own
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed"
)


def prepared(dtype: torch.dtype) -> Any:
    model = oracle.tiny_model(tied=True)
    torch.manual_seed(5)
    METHOD.prepare(model, Config(lora=LoRAConfig(rank=RANK)))
    return model.to(dtype)


def plain_loop(dtype: torch.dtype) -> tuple[list[float], dict[str, Tensor]]:
    """peft and torch as their users combine them; returns losses and adapters, by our names."""
    settings = peft.LoraConfig(r=RANK, lora_alpha=32, target_modules="all-linear")
    model: Any = peft.get_peft_model(oracle.tiny_model(tied=True).to(dtype), settings)
    ours = dict(prepared(dtype).named_parameters())
    trained = {
        name.removeprefix("base_model.model."): p
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(ours[name])
    optimizer = torch.optim.AdamW(trained.values(), lr=RECIPE.lr, eps=RECIPE.eps, weight_decay=0.01)
    losses = []
    for step in range(RECIPE.steps):
        tokens, labels = oracle.global_batch(step)
        loss = oracle.loss_sum(model, tokens, labels) / (labels[:, 1:] != -100).sum()
        loss.backward()
        nn.utils.clip_grad_norm_(trained.values(), RECIPE.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {name: p.detach() for name, p in trained.items()}


def attach(strategy: str, dtype: torch.dtype, *, checkpointing: bool = False) -> LWO:
    model = prepared(dtype)
    if checkpointing:
        model.train()
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    config = zero.lwo_config(RECIPE)
    if strategy == "fsdp":
        shard_model(model, precision="fp32", device_type="cpu")
    if strategy.startswith("zero"):
        settings = zero.settings(int(strategy[-1]), accumulation=RECIPE.accumulation)
        model = make_engine(model, config, settings, METHOD)
    return lwo_dist.attach(model, config, METHOD)


def losses_and_weights(
    strategies: list[str], dtype: torch.dtype
) -> list[tuple[list[float], dict[str, Tensor]]]:
    results = []
    for strategy in strategies:
        lwo = attach(strategy, dtype)
        losses, found = train(lwo, RECIPE.steps)
        frozen = set(lwo.rest.parameter_names)
        for name, parameter in lwo.module.named_parameters():
            if name in frozen:
                assert parameter.grad is None and not parameter.requires_grad, name
        results.append((losses, found))
        if strategy not in ("zero 1", "zero 2"):
            # The same with recomputed activations, whose inputs need no gradient.
            recomputed, _ = train(attach(strategy, dtype, checkpointing=True), 2)
            assert recomputed == pytest.approx(losses[:2], abs=1e-6)
    return results


def assert_like_the_plain_loop(
    found: tuple[list[float], dict[str, Tensor]], dtype: torch.dtype, tolerance: float
) -> None:
    losses, expected = plain_loop(dtype)
    assert found[0] == pytest.approx(losses, abs=tolerance)
    start = dict(prepared(dtype).named_parameters())
    for name, tensor in found[1].items():
        if name in expected:
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=tolerance)
            assert not torch.equal(tensor, start[name])
        elif name in start:
            assert torch.equal(tensor, start[name]), name
    assert expected.keys() <= found[1].keys()


@pytest.mark.parametrize("world_size", [1, 2])
def test_equals_a_plain_peft_loop(world_size: int) -> None:
    strategies = ["replicate", "fsdp"]
    results = run_ranks(losses_and_weights, world_size, strategies, torch.float64)[0]
    for found in results:
        assert_like_the_plain_loop(found, torch.float64, 1e-10)


@needs_deepspeed
def test_equals_a_plain_peft_loop_under_zero() -> None:
    stages = ["zero 1", "zero 2", "zero 3"]
    for found in run_ranks(losses_and_weights, 2, stages, torch.float32, deepspeed=True)[0]:
        assert_like_the_plain_loop(found, torch.float32, 1e-5)


# ---- memory and traffic


def held(strategies: list[str]) -> list[tuple[dict[str, int], int]]:
    """After a step: `LWO.memory()`, and the bytes sent."""
    rows = []
    for strategy in strategies:
        lwo = attach_bf16() if strategy == "fsdp bf16" else attach(strategy, torch.float32)
        train(lwo, 1)
        rows.append((lwo.memory(), lwo.strategy.bytes_per_step()))
    return rows


def attach_bf16() -> LWO:
    model = prepared(torch.bfloat16)
    shard_model(model, precision="bf16", device_type="cpu")
    return lwo_dist.attach(model, zero.lwo_config(RECIPE), METHOD)


def sizes() -> tuple[int, int]:
    """Parameters of the base model, each with its rows padded for two ranks, and of adapters."""
    base = oracle.tiny_model(tied=True)
    stack = base.get_submodule("model.layers")
    linear = [tuple(m.weight.shape) for m in stack.modules() if isinstance(m, nn.Linear)]
    padded = sum(p[0].numel() * padded_numel(len(p), 2) for p in base.parameters())
    return padded, lora_numel(linear, RANK)


def test_a_rank_holds_what_the_formula_says_and_sends_adapters_only() -> None:
    numel, adapters = sizes()
    ranks = run_ranks(held, 2, ["fsdp bf16", "replicate"])
    expected = lora_bytes(numel, adapters, 2)
    for key, value in expected.items():
        assert sum(rows[0][0][key] for rows in ranks) == 2 * value, key
    memory, sent = ranks[0][1]
    assert memory["optimizer_state_bytes"] == 8 * adapters // 2
    assert sent == 2 * 4 * adapters


@needs_deepspeed
def test_zero_has_state_of_adapters_only() -> None:
    _, adapters = sizes()
    ranks = run_ranks(held, 2, ["zero 2", "zero 3"], deepspeed=True)
    for number in (0, 1):
        state = sum(rows[number][0]["optimizer_state_bytes"] for rows in ranks)
        assert state == 12 * adapters


# ---- runs

SETTINGS = ["method=lora", f"lora.rank={RANK}", "lora.dropout=0.1", "lwo.lr=1e-2"]


def logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=tokens).logits


def check_exports(summary: dict[str, Any], base: Path, capsys: Any, target: Path) -> None:
    """The run's two folders, and those of the command, compute the same."""
    tokens = torch.arange(20).view(1, 20)
    merged = AutoModelForCausalLM.from_pretrained(summary["export"])
    run_folder = Path(summary["export"]).parent
    with_adapter: Any = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), str(run_folder / "adapter")
    )
    untuned = logits(AutoModelForCausalLM.from_pretrained(base), tokens)
    tuned = logits(merged, tokens)
    assert (tuned - untuned).abs().max() > 1e-2
    torch.testing.assert_close(logits(with_adapter, tokens), tuned, rtol=0, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(summary["export"])
    assert tokenizer("def")["input_ids"]
    capsys.readouterr()
    export = ["export", str(run_folder), "--to"]
    assert main([*export, str(target / "adapter"), "--adapter"]) == 0
    assert f"adapter: {target / 'adapter'}" in capsys.readouterr().out
    assert main([*export, str(target / "model")]) == 0
    for name in ("adapter/adapter_model.safetensors", "model/model.safetensors"):
        one, other = load_file(target / name), load_file(run_folder / name)
        assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(["strategy=fsdp"], marks=pytest.mark.long),
        ["strategy=fsdp", "train.precision=bf16", "fsdp.storage=bf16"],
        pytest.param(["strategy=deepspeed", "zero_stage=3"], marks=needs_deepspeed),
        pytest.param(
            ["strategy=deepspeed", "zero_stage=2", "train.precision=bf16"],
            marks=[needs_deepspeed, pytest.mark.long],
        ),
    ],
    ids=["fsdp", "fsdp-bf16", "zero3", "zero2-bf16"],
)
def test_a_run_evaluates_resumes_bitwise_and_exports(
    settings: list[str], inputs: tuple[Path, Path], tmp_path: Path, capsys: Any
) -> None:
    more = [*SETTINGS, *settings, "train.logging_steps=1", "checkpoint.steps=4"]
    more += ["train.gradient_checkpointing=true"]
    deepspeed = "strategy=deepspeed" in settings
    whole = prepare(make_config(inputs, tmp_path / "whole", *more))
    unbroken = run_ranks(whole_run, 2, whole, deepspeed=deepspeed)[0]
    summary = json.loads((tmp_path / "whole" / "r" / "summary.json").read_text())
    assert summary["eval"]["before"]["eval/loss"] > summary["eval"]["after"]["eval/loss"] + 0.1
    check_exports(summary, inputs[0], capsys, tmp_path)

    broken = prepare(make_config(inputs, tmp_path / "broken", *more))
    with pytest.raises(RanksError, match="InterruptedError"):
        run_ranks(stop_after, 2, broken, 4, deepspeed=deepspeed)
    [layer_file] = (tmp_path / "broken" / "r" / "layers").iterdir()
    assert all(".lora_" in name for name in load_file(layer_file))
    resumed = run_ranks(whole_run, 2, broken, deepspeed=deepspeed)[0]
    assert min(resumed) == 5
    assert resumed == {step: unbroken[step] for step in resumed}
    ends = [tmp_path / name / "r" / "adapter" for name in ("whole", "broken")]
    one, other = (load_file(end / "adapter_model.safetensors") for end in ends)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_name_of_no_layer_is_refused_before_anything_is_written(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="no module of Qwen2ForCausalLM is named nothing"):
        prepare(make_config(inputs, tmp_path / "runs", *SETTINGS, "lora.target_modules=[nothing]"))
    assert not (tmp_path / "runs").exists()


def test_a_run_goes_on_elsewhere_and_from_the_same_base_only(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    """From two ranks with fsdp to one with replicate."""
    model = tmp_path / "base"
    shutil.copytree(inputs[0], model)
    more = ["train.logging_steps=1", "checkpoint.steps=4", "lora.dropout=0"]
    first = prepare(make_config((model, inputs[1]), tmp_path, *SETTINGS, "strategy=fsdp", *more))
    with pytest.raises(RanksError, match="InterruptedError"):
        run_ranks(stop_after, 2, first, 8)
    here = (model, inputs[1])
    then = [*SETTINGS, "strategy=replicate", "cluster.num_workers=1", *more]
    for change, message in (
        ("lora.alpha=16", "its checkpoint was made with lora.alpha = 32.0, and now it is 16.0"),
        ("lora.rank=2", "its checkpoint was made with lora.rank = 4, and now it is 2"),
    ):
        with pytest.raises(RanksError, match=message):
            run_ranks(run, 1, prepare(make_config(here, tmp_path, *then, change)))
    lwo = [setting for setting in then if not setting.startswith(("lora", "method"))]
    with pytest.raises(RanksError, match="was made with method: lora, and method is lwo"):
        run_ranks(run, 1, prepare(make_config(here, tmp_path, *lwo)))
    weights_file = model / "model.safetensors"
    kept = weights_file.read_bytes()
    other = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        other.get_submodule("model.layers.1.mlp.up_proj").weight.mul_(1.001)
    other.save_pretrained(model)
    with pytest.raises(RanksError, match="has other weights than when its checkpoint was made"):
        run_ranks(run, 1, prepare(make_config(here, tmp_path, *then)))
    weights_file.write_bytes(kept)
    resumed = run_ranks(whole_run, 1, prepare(make_config(here, tmp_path, *then)))[0]
    # Under another strategy adapters start with the same values.
    settings = [*SETTINGS, "strategy=replicate", *more]
    unbroken = prepare(make_config(here, tmp_path / "unbroken", *settings))
    expected = run_ranks(whole_run, 2, unbroken)[0]
    assert min(resumed) == 9
    for step, loss in resumed.items():
        assert loss == pytest.approx(expected[step], abs=1e-5)
