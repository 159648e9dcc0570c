"""`prepare` for a loop of accelerate, in one process: it equals a plain loop; what cannot work is
refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType, DynamoBackend
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader
from transformers import get_linear_schedule_with_warmup

from lwo_dist.config import LWOConfig
from lwo_dist.errors import UserError
from lwo_dist.integrations.accelerate import prepare
from lwo_dist.integrations.settings import refuse_accelerator
from lwo_dist.schedule import learning_rate
from tests import oracle, trainers


@pytest.fixture(autouse=True)
def one_accelerator_at_a_time() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def make(config: LWOConfig | None = None) -> tuple[Any, list[Any]]:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=trainers.ACCUMULATION)
    model = oracle.tiny_model(tied=False, dtype=torch.float64)
    loader = DataLoader(trainers.Rows(), batch_size=trainers.ROWS)
    config = config or trainers.config(lr=trainers.LR, eps=1e-6)
    return accelerator, list(prepare(accelerator, model, config, loader))


def with_scheduler(accelerator: Any, parts: list[Any]) -> list[Any]:
    scheduler = get_linear_schedule_with_warmup(parts[1], trainers.WARMUP, trainers.STEPS)
    return [*parts, accelerator.prepare(scheduler)]


def test_the_loop_equals_a_plain_loop_and_goes_on_from_a_state(tmp_path: Path) -> None:
    accelerator, parts = make()
    parts = with_scheduler(accelerator, parts)
    norms, rates = trainers.accelerate_loop(accelerator, parts, save=tmp_path / "state")
    assert rates == pytest.approx(trainers.linear_rates())
    names = [layer.parameter_names for layer in parts[1].lwo.layers]
    expected = trainers.plain_loop(names, torch.float64, count=trainers.LABELS)
    trained = trainers.snapshot(parts[0])
    assert expected.relative_difference(trained) < 1e-9
    assert norms == pytest.approx(expected.norms)

    accelerator, parts = make()
    parts = with_scheduler(accelerator, parts)
    for parameter in parts[0].parameters():
        nn.init.zeros_(parameter)
    accelerator.load_state(str(tmp_path / "state"))
    assert parts[1].lwo.step_count == 3
    trainers.accelerate_loop(accelerator, parts, done=3)
    for name, weight in trainers.snapshot(parts[0]).items():
        assert torch.equal(weight, trained[name]), name


def bare_loop(accelerator: Any, model: Any, optimizer: Any, loader: Any) -> dict[str, torch.Tensor]:
    """An epoch of a loop that knows nothing of layers."""
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), trainers.CLIP)
            optimizer.step()
            optimizer.zero_grad()
    return trainers.snapshot(accelerator.unwrap_model(model))


def settings(**more: Any) -> LWOConfig:
    return trainers.config(lr=trainers.LR, eps=1e-6, **more)


def adapters() -> Any:
    from peft import LoraConfig, get_peft_model

    model = oracle.tiny_model(tied=False, dtype=torch.float64)
    torch.manual_seed(3)
    return get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"]))


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_method_for_all_layers_equals_the_ordinary_loop(method: str, tmp_path: Path) -> None:
    """And goes on from a state with the same bits."""

    def make_model() -> Any:
        if method == "lora":
            return adapters().double()
        return oracle.tiny_model(tied=False, dtype=torch.float64)

    def make_accelerator() -> Any:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        return Accelerator(cpu=True, gradient_accumulation_steps=trainers.ACCUMULATION)

    loader = DataLoader(trainers.Rows(), batch_size=trainers.ROWS)
    accelerator, model = make_accelerator(), make_model()
    trained = [p for p in model.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(trained, lr=trainers.LR, eps=1e-6, weight_decay=0.0)
    before = trainers.snapshot(model)
    ordinary = bare_loop(accelerator, *accelerator.prepare(model, adamw, loader))

    accelerator = make_accelerator()
    parts = prepare(accelerator, make_model(), settings(), loader, method=method)
    ours = bare_loop(accelerator, *parts)
    moved = {name for name in before if not torch.equal(before[name], ours[name])}
    assert moved == {name for name, p in make_model().named_parameters() if p.requires_grad}
    for name, weight in ordinary.items():
        torch.testing.assert_close(ours[name], weight, rtol=0, atol=1e-12)
    accelerator.save_state(str(tmp_path))
    unbroken = bare_loop(accelerator, *parts)

    accelerator = make_accelerator()
    again = prepare(accelerator, make_model(), settings(), loader, method=method)
    accelerator.load_state(str(tmp_path))
    for name, weight in bare_loop(accelerator, *again).items():
        assert torch.equal(weight, unbroken[name]), name


def test_bf16_equals_a_plain_loop_under_autocast() -> None:
    """The masters stay fp32, and so do the gradients that the layer is updated with."""
    accelerator = Accelerator(
        cpu=True, mixed_precision="bf16", gradient_accumulation_steps=trainers.ACCUMULATION
    )
    loader = DataLoader(trainers.Rows(), batch_size=trainers.ROWS)
    model = oracle.tiny_model(tied=False)
    parts = prepare(accelerator, model, settings(steps_per_layer=5), loader)
    ours = bare_loop(accelerator, *parts)

    plain = oracle.tiny_model(tied=False)
    before = trainers.snapshot(plain)
    names = parts[1].lwo.layers[0].parameter_names
    mine = [p for name, p in plain.named_parameters() if name in names]
    for parameter in plain.parameters():
        parameter.requires_grad_(any(parameter is p for p in mine))
    adamw = torch.optim.AdamW(mine, lr=trainers.LR, eps=1e-6, weight_decay=0.0)
    for i, batch in enumerate(loader):
        with torch.autocast("cpu", torch.bfloat16):
            logits = plain(input_ids=batch["input_ids"]).logits
        loss = plain.loss_function(logits.float(), batch["labels"], vocab_size=61)
        (loss / trainers.ACCUMULATION).backward()
        if i % 2 or i == trainers.MICRO_BATCHES - 1:
            nn.utils.clip_grad_norm_(mine, trainers.CLIP)
            adamw.step()
            adamw.zero_grad()
    expected = trainers.snapshot(plain)
    assert all(weight.dtype == torch.float32 for weight in ours.values())
    assert {n for n in before if not torch.equal(before[n], ours[n])} == set(names)
    for name in names:
        torch.testing.assert_close(ours[name], expected[name], rtol=0, atol=1e-6)
        assert (expected[name] - before[name]).abs().max() > 1e-3


def test_checkpointing_of_activations_changes_no_bit() -> None:
    found = []
    for on in (False, True):
        accelerator, parts = make(settings())
        if on:
            parts[0].train()
            parts[0].gradient_checkpointing_enable({"use_reentrant": False})
        found.append(bare_loop(accelerator, *parts))
    assert all(torch.equal(found[0][name], weight) for name, weight in found[1].items())
    _, (model, _, loader) = make(settings())
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises((RuntimeError, UserError), match="reentrant"):
        model(**next(iter(loader)))


def test_without_a_scheduler_the_config_sets_the_rate() -> None:
    config = LWOConfig(lr=1e-3, warmup_steps=2, lr_scheduler_type="linear", max_steps=10)
    accelerator, (model, optimizer, loader) = make(config)
    rates = []
    for batch in list(loader)[:8]:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            rates.append(optimizer.report.lr)
    schedule = optimizer.lwo.schedule
    assert rates == [learning_rate(config, schedule, step) for step in range(4)]
    assert rates[0] == 5e-4


def test_a_loop_may_accumulate_by_no_sync() -> None:
    accelerator, (model, optimizer, loader) = make()
    first, second = list(loader)[:2]
    with accelerator.no_sync(model):
        accelerator.backward(model(**first).loss)
    with pytest.raises(RuntimeError, match=r"within accelerator\.no_sync only"):
        optimizer.step()
    assert accelerator.clip_grad_norm_(model.parameters(), 1.0) is None
    accelerator.backward(model(**second).loss)
    assert float(accelerator.clip_grad_norm_(model.parameters(), 1.0)) > 0
    optimizer.step()
    assert optimizer.lwo.step_count == 1


def test_a_model_is_saved_whole_while_attached_and_after(tmp_path: Path) -> None:
    """accelerate saves one tensor of each storage, and a layer that was active has one."""
    accelerator, (model, optimizer, _) = make(trainers.config(order="descending"))
    accelerator.save_model(model, str(tmp_path / "attached"))
    optimizer.detach()
    accelerator.save_model(model, str(tmp_path / "detached"))
    for folder in ("attached", "detached"):
        saved = load_file(tmp_path / folder / "model.safetensors")
        assert saved.keys() == model.state_dict().keys()
        for name, weight in model.state_dict().items():
            assert torch.equal(weight, saved[name]), name
    # The accelerator is as it was.
    model(**next(iter(DataLoader(trainers.Rows(4), batch_size=4)))).loss.backward()
    assert float(accelerator.clip_grad_norm_(model.parameters(), 1.0)) > 0


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    accelerator, _ = make()
    accelerator.save_state(str(tmp_path))
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    prepare(accelerator, oracle.tiny_model(tied=False, num_layers=5), trainers.config())
    with pytest.raises(
        UserError, match=r"the checkpoint has no model\.layers\.4\..* another model"
    ):
        accelerator.load_state(str(tmp_path))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"distributed_type": DistributedType.MULTI_XPU}, "distributed_type MULTI_XPU"),
        ({"distributed_type": DistributedType.FSDP}, "FSDP with version 1"),
        ({"mixed_precision": "fp16"}, "mixed precision fp16 is not supported"),
        ({"mixed_precision": "fp8"}, "mixed precision fp8 is not supported"),
        ({"compiled": DynamoBackend.INDUCTOR}, "torch.compile of the whole model"),
        ({"parallelism_config": SimpleNamespace(tp_size=2)}, "tp_size = 2"),
        ({"parallelism_config": SimpleNamespace(cp_size=2)}, "cp_size = 2"),
        ({"parallelism_config": SimpleNamespace(sp_size=2)}, "sp_size = 2"),
    ],
)
def test_accelerators_that_cannot_work_are_refused(settings: dict[str, Any], said: str) -> None:
    fine = {
        "distributed_type": DistributedType.NO,
        "mixed_precision": "no",
        "parallelism_config": None,
        "compiled": DynamoBackend.NO,
    }
    given = fine | settings
    state = SimpleNamespace(
        fsdp_plugin=SimpleNamespace(fsdp_version=1),
        dynamo_plugin=SimpleNamespace(backend=given.pop("compiled")),
    )
    with pytest.raises(UserError, match=said):
        refuse_accelerator(SimpleNamespace(state=state, **given))


def test_what_the_loop_cannot_do_is_refused() -> None:
    accelerator = Accelerator(cpu=True)
    model = oracle.tiny_model(tied=False)
    adamw = torch.optim.AdamW(model.parameters())
    with pytest.raises(UserError, match="AdamW cannot be prepared here"):
        prepare(accelerator, model, trainers.config(), adamw)
    with pytest.raises(UserError, match="the third argument is AdamW; it must be an LWOConfig"):
        prepare(accelerator, model, adamw)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="gradient_accumulation_steps = 4, but the accelerator's"):
        make(trainers.config(gradient_accumulation_steps=4))
    with pytest.raises(UserError, match="needs the learning rate before the backward pass"):
        make(trainers.config(stateless="all", stateless_update="backward"))

    accelerator, (model, optimizer, loader) = make(trainers.config(max_grad_norm=1.0))
    with pytest.raises(UserError, match="clip_grad_value_ is not supported"):
        accelerator.clip_grad_value_(model.parameters(), 1.0)
    with pytest.raises(UserError, match="norm_type=1"):
        accelerator.clip_grad_norm_(model.parameters(), 1.0, 1)
    with pytest.raises(RuntimeError, match=r"without accelerator\.backward"):
        optimizer.step()
    batch = next(iter(loader))
    accelerator.backward(model(**batch).loss)
    with pytest.raises(UserError, match="given 1 of the 1|given 0 of the 1"):
        accelerator.clip_grad_norm_([], 1.0)
    with pytest.raises(UserError, match="max_grad_norm = 1.0, but max_norm = 0.5"):
        accelerator.clip_grad_norm_(model.parameters(), 0.5)

    accelerator, parts = make(trainers.config(warmup_steps=3))
    parts = with_scheduler(accelerator, parts)
    with pytest.raises(UserError, match="LWOConfig sets warmup_steps, but a scheduler sets"):
        trainers.accelerate_loop(accelerator, parts)
