"""transformers' Trainer with `use_lwo` on two ranks, under every strategy: it equals a plain loop,
and goes on from a checkpoint in mid-visit with the same bits.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, TrainerCallback

from lwo_dist.errors import UserError
from lwo_dist.integrations.transformers import use_lwo
from tests import oracle, trainers
from tests.distributed.test_hf_accelerate import sharded_at_load
from tests.ranks import run_ranks

ZERO = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "steps_per_print": 2**31,
}
BUCKETS = {
    "reduce_bucket_size": "auto",
    "stage3_prefetch_bucket_size": "auto",
    "stage3_param_persistence_threshold": "auto",
}
ADAMW = {
    "type": "AdamW",
    "params": {
        "lr": "auto",
        "betas": "auto",
        "eps": "auto",
        "weight_decay": "auto",
        "torch_adam": True,
    },
}
SCHEDULER = {
    "type": "WarmupDecayLR",
    "params": {
        "warmup_min_lr": "auto",
        "warmup_max_lr": "auto",
        "warmup_num_steps": "auto",
        "warmup_type": "linear",
        "total_num_steps": "auto",
    },
}


def make(kind: str, folder: Path, **more: Any) -> Any:
    """A trainer on this rank, the same on all."""
    dtype = torch.float64
    if kind.startswith("zero"):
        from lwo_dist.strategies.deepspeed.builder import load_deepspeed

        load_deepspeed().check_environment()
        import deepspeed

        deepspeed.init_distributed(dist_init_required=False)
        dtype = torch.float32
        stage, *sections = kind.removeprefix("zero").split("+")
        settings: dict[str, Any] = ZERO | {"zero_optimization": {"stage": int(stage), **BUCKETS}}
        if "optimizer" in sections:
            settings = settings | {"optimizer": ADAMW}
        if "scheduler" in sections:
            settings = settings | {"scheduler": SCHEDULER}
        more["deepspeed"] = settings
    arguments = trainers.arguments(folder, dist.get_world_size(), **more)
    model = oracle.tiny_model(tied=False, dtype=dtype)
    if kind == "fully_shard":
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    if kind == "distributed_config":
        model = sharded_at_load(folder / "model", dtype)
    if kind == "fsdp2_prepare_model":
        state = SimpleNamespace(fsdp_plugin=trainers.fsdp_plugin())
        accelerator = SimpleNamespace(
            state=state, mixed_precision="no", is_main_process=dist.get_rank() == 0
        )
        fsdp2_prepare_model(accelerator, model)
    trainer = trainers.InOrder(
        model=model,
        args=arguments,
        train_dataset=trainers.Rows(),
        eval_dataset=trainers.Rows(8),
        compute_loss_func=trainers.loss_in_full if dtype == torch.float64 else None,
    )
    if kind == "fsdp":
        trainers.use_fsdp(trainer.accelerator)
        trainer.is_fsdp_enabled = True
    return trainer


def zeroed(trainer: Any) -> Any:
    """Spoil the weights, so that a resume has to restore all of them."""
    for parameter in trainer.model.parameters():
        nn.init.zeros_(parameter)
    return trainer


def train(kind: str, folder: Path, method: str = "lwo") -> dict[str, Any]:
    """Two runs: one unbroken, one from its checkpoint in mid-visit."""
    unbroken = make(kind, folder, save_strategy="steps", save_steps=3)
    use_lwo(unbroken, trainers.config(), method).train()
    again = zeroed(make(kind, folder, save_strategy="no"))
    use_lwo(again, trainers.config(), method)
    again.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    again.save_model(str(folder / "saved"))
    return {
        "strategy": unbroken.lwo.strategy_name,
        "layers": [layer.parameter_names for layer in unbroken.lwo.layers],
        "unbroken": trainers.weights(unbroken.lwo),
        "again": trainers.weights(again.lwo),
        "norms": trainers.logged(unbroken, "grad_norm"),
        "rates": trainers.logged(unbroken, "learning_rate"),
        "eval_loss": again.evaluate()["eval_loss"],
    }


def check(kind: str, strategy: str, folder: Path, dtype: torch.dtype) -> None:
    results = run_ranks(train, 2, kind, folder, deepspeed=strategy == "deepspeed")
    for result in results:
        assert result["strategy"] == strategy
        # The engine's own scheduler has stepped already when the Trainer logs.
        followed = [0.0, *result["rates"][:-1]] if "+" in kind else None
        expected = trainers.plain_loop(result["layers"], dtype, rates=followed)
        tolerance = 1e-9 if dtype == torch.float64 else 2e-5
        assert expected.relative_difference(result["unbroken"]) < tolerance
        assert result["norms"] == pytest.approx(expected.norms, rel=1e-4)
        if "scheduler" not in kind:
            assert expected.rates == pytest.approx(trainers.linear_rates())
        if followed is None:
            assert result["rates"] == pytest.approx(expected.rates)
        assert_equal(result["again"], result["unbroken"])
        assert result["eval_loss"] == results[0]["eval_loss"]
    saved = AutoModelForCausalLM.from_pretrained(folder / "saved", dtype=dtype)
    assert_equal(trainers.snapshot(saved), results[0]["unbroken"])
    assert not list(folder.glob("checkpoint-3/global_step*"))


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(got[name].cpu(), weight.cpu()), name


def test_replicate_without_ddp(tmp_path: Path) -> None:
    check("replicate", "replicate", tmp_path, torch.float64)


@pytest.mark.parametrize("kind", ["fully_shard", "fsdp2_prepare_model", "fsdp"])
def test_fsdp2(tmp_path: Path, kind: str) -> None:
    """Sharded before by the user, by hand or by accelerate, and by the Trainer."""
    check(kind, "fsdp", tmp_path, torch.float64)


def train_sharded_at_load(folder: Path) -> dict[str, Any]:
    kind = "distributed_config"
    trainer = make(kind, folder, save_strategy="steps", save_steps=5, save_only_model=True)
    use_lwo(trainer, trainers.config()).train()
    with pytest.raises(UserError, match=r"checkpoint-5 has no lwo\.pt"):
        use_lwo(make(kind, folder), trainers.config()).train(
            resume_from_checkpoint=str(folder / "checkpoint-5")
        )
    return {
        "strategy": trainer.lwo.strategy_name,
        "layers": [layer.parameter_names for layer in trainer.lwo.layers],
        "weights": trainers.weights(trainer.lwo),
        "norms": trainers.logged(trainer, "grad_norm"),
    }


def test_a_model_sharded_at_load(tmp_path: Path) -> None:
    """The Trainer itself saves no more of it than the model, and does not resume."""
    for result in run_ranks(train_sharded_at_load, 2, tmp_path):
        assert result["strategy"] == "fsdp"
        expected = trainers.plain_loop(result["layers"], torch.float64)
        assert expected.relative_difference(result["weights"]) < 1e-9
        assert result["norms"] == pytest.approx(expected.norms)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-10", dtype=torch.float64)
    assert_equal(trainers.snapshot(saved), result["weights"])


class Stop(TrainerCallback):
    """In the middle of the accumulation of the fourth step."""

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step == 3


def stop(kind: str, folder: Path) -> dict[str, Any]:
    trainer = make(kind, folder)
    trainer.add_callback(Stop())
    use_lwo(trainer, trainers.config()).train()
    return {
        "layers": [layer.parameter_names for layer in trainer.lwo.layers],
        "weights": trainers.weights(trainer.lwo),
        "gradients": [p.grad is not None for p in trainer.model.parameters()],
    }


@pytest.mark.parametrize("kind", ["replicate", "fully_shard", "zero2", "zero3"])
def test_a_stop_in_mid_accumulation_drops_its_gradients(tmp_path: Path, kind: str) -> None:
    exact = not kind.startswith("zero")
    for result in run_ranks(stop, 2, kind, tmp_path, deepspeed=not exact):
        expected = trainers.plain_loop(
            result["layers"],
            torch.float64 if exact else torch.float32,
            rates=trainers.linear_rates()[:3],
            steps=trainers.groups_of_epochs()[:3],
        )
        assert expected.relative_difference(result["weights"]) < (1e-9 if exact else 2e-5)
        assert not any(result["gradients"])


def train_in_bf16(folder: Path) -> tuple[set[torch.dtype], set[str], list[str]]:
    """As a user's `bf16=True` does: accelerate's plugin would reduce in bf16."""
    trainer = make("fsdp", folder, max_steps=2)
    trainer.model.float()
    trainer.compute_loss_func = None
    trainer.accelerator.state.fsdp_plugin.set_mixed_precision("bf16")
    before = trainers.snapshot(trainer.model)
    use_lwo(trainer, trainers.config()).train()
    after = trainers.weights(trainer.lwo)
    moved = {name for name in before if not torch.equal(before[name].cpu(), after[name])}
    dtypes = {weight.dtype for weight in after.values()}
    return dtypes, moved, list(trainer.lwo.layers[0].parameter_names)


def test_bf16_under_fsdp2_keeps_fp32_masters_and_sums(tmp_path: Path) -> None:
    for dtypes, moved, trained in run_ranks(train_in_bf16, 2, tmp_path):
        assert dtypes == {torch.float32}
        assert moved == set(trained)


@pytest.mark.parametrize(
    "kind", ["zero1+scheduler", "zero2", "zero3", "zero2+optimizer", "zero3+optimizer+scheduler"]
)
def test_deepspeed(tmp_path: Path, kind: str) -> None:
    check(kind, "deepspeed", tmp_path, torch.float32)


def train_deepspeed_in_bf16(kind: str, folder: Path) -> dict[str, Any]:
    """Two runs, as `train`; the model is stored in bf16, its masters in fp32."""
    unbroken = make(kind, folder, save_strategy="steps", save_steps=3, bf16=True)
    use_lwo(unbroken, trainers.config()).train()
    again = zeroed(make(kind, folder, bf16=True))
    use_lwo(again, trainers.config()).train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    return {
        "stored": {weight.dtype for weight in unbroken.model.parameters()},
        "layers": [layer.parameter_names for layer in unbroken.lwo.layers],
        "unbroken": trainers.weights(unbroken.lwo),
        "again": trainers.weights(again.lwo),
        "norms": trainers.logged(unbroken, "grad_norm"),
    }


@pytest.mark.parametrize("kind", ["zero2", "zero3"])
def test_bf16_under_deepspeed_keeps_fp32_masters(tmp_path: Path, kind: str) -> None:
    """As near to a loop in fp32 as bf16 computes, and resumed with the same bits."""
    for result in run_ranks(train_deepspeed_in_bf16, 2, kind, tmp_path, deepspeed=True):
        assert result["stored"] == {torch.bfloat16}
        assert {weight.dtype for weight in result["unbroken"].values()} == {torch.float32}
        expected = trainers.plain_loop(result["layers"], torch.float32, stored=torch.bfloat16)
        assert expected.relative_difference(result["unbroken"]) < 0.15
        assert result["norms"] == pytest.approx(expected.norms, rel=0.02)
        assert_equal(result["again"], result["unbroken"])
