"""transformers' Trainer with `use_lwo`, in one process: it equals a plain loop; what cannot work is
refused by name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback

from lwo_dist.errors import UserError
from lwo_dist.integrations.transformers import LWOTrainerMixin, use_lwo
from tests import oracle, trainers


def make(folder: Path, dtype: torch.dtype = torch.float64, **more: Any) -> Any:
    return trainers.InOrder(
        model=oracle.tiny_model(tied=False, dtype=dtype),
        args=trainers.arguments(folder, **more),
        train_dataset=trainers.Rows(),
        eval_dataset=trainers.Rows(8),
        compute_loss_func=trainers.loss_in_full if dtype == torch.float64 else None,
    )


def test_the_trainer_equals_a_plain_loop(tmp_path: Path) -> None:
    trainer = use_lwo(make(tmp_path), trainers.config())
    trainer.train()
    names = [layer.parameter_names for layer in trainer.lwo.layers]
    expected = trainers.plain_loop(names, torch.float64)
    assert expected.relative_difference(trainers.snapshot(trainer.model)) < 1e-9
    # Its logs say what each step did.
    assert trainers.logged(trainer, "grad_norm") == pytest.approx(expected.norms)
    assert trainers.logged(trainer, "learning_rate") == pytest.approx(expected.rates)
    assert trainers.logged(trainer, "lwo/active_layer") == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    moments = trainers.logged(trainer, "memory/optimizer_state_bytes")
    assert all(moments[::2]) and not any(moments[1::2])  # a new layer has none yet
    assert trainer.lwo.step_count == trainer.state.global_step == trainers.STEPS
    # The model and the accelerator are as before.
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())
    assert not set(vars(trainer.accelerator)) & {"backward", "clip_grad_norm_", "get_state_dict"}


def test_one_layer_that_holds_all_equals_the_ordinary_trainer(tmp_path: Path) -> None:
    ordinary = make(tmp_path)
    ordinary.train()
    trainer = use_lwo(make(tmp_path), trainers.config(), method="full")
    trainer.train()
    ours, theirs = trainers.snapshot(trainer.model), trainers.snapshot(ordinary.model)
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=0, atol=1e-12)
    for key in ("loss", "grad_norm", "learning_rate"):
        assert trainers.logged(trainer, key) == pytest.approx(trainers.logged(ordinary, key))


def test_a_resume_in_mid_visit_is_bitwise(tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 3}
    unbroken = use_lwo(make(tmp_path, **settings), trainers.config())
    unbroken.train()
    # Another model: all of it comes from the checkpoint.
    again = make(tmp_path)
    for parameter in again.model.parameters():
        nn.init.zeros_(parameter)
    use_lwo(again, trainers.config()).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    expected = trainers.snapshot(unbroken.model)
    for name, weight in trainers.snapshot(again.model).items():
        assert torch.equal(weight, expected[name]), name
    assert again.lwo.step_count == trainers.STEPS
    # Users load the model as always.
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-10", dtype=torch.float64)
    for name, weight in trainers.snapshot(saved).items():
        assert torch.equal(weight, expected[name]), name


class Stop(TrainerCallback):
    """Stops in the middle of the accumulation of a step, or of the epoch."""

    def __init__(self, step: int, what: str):
        self._step, self._what = step, what

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self._step:
            setattr(control, self._what, True)


def cut_off(folder: Path, case: str, **more: Any) -> Any:
    """A trainer whose training ends in the middle of an accumulation."""
    if case == "the data end":
        here = {"dispatch_batches": False}  # else accelerate fails at an empty epoch
        trainer = make(folder, max_steps=6, accelerator_config=here, **more)
        trainer.train_dataset = trainers.Stream(epochs=2)
        return trainer
    trainer = make(folder, **more)
    trainer.add_callback(Stop(3, case))
    return trainer


@pytest.mark.parametrize("case", ["the data end", "should_training_stop", "should_epoch_stop"])
def test_a_stop_in_mid_accumulation_ends_as_in_the_ordinary_trainer(
    tmp_path: Path, case: str
) -> None:
    """Unfinished gradients count in the first step of the next epoch, or are dropped."""
    ordinary = cut_off(tmp_path, case)
    ordinary.train()
    trainer = use_lwo(cut_off(tmp_path, case), trainers.config(), method="full")
    trainer.train()
    theirs = trainers.snapshot(ordinary.model)
    for name, weight in trainers.snapshot(trainer.model).items():
        torch.testing.assert_close(weight, theirs[name], rtol=0, atol=1e-12)
    assert trainer.state.global_step == ordinary.state.global_step < trainers.STEPS
    for key in ("grad_norm", "learning_rate", "train_loss"):
        assert trainers.logged(trainer, key) == pytest.approx(trainers.logged(ordinary, key))
    assert all(p.requires_grad and p.grad is None for p in trainer.model.parameters())
    trainer.train()  # the hook is gone, as for any other attempt


def test_a_stream_that_ends_in_mid_accumulation_equals_a_plain_loop(tmp_path: Path) -> None:
    """With what each epoch saves."""
    trainer = use_lwo(cut_off(tmp_path, "the data end", save_strategy="epoch"), trainers.config())
    trainer.train()
    names = [layer.parameter_names for layer in trainer.lwo.layers]
    for step in (2, 4):
        expected = trainers.plain_loop(
            names,
            torch.float64,
            rates=trainers.linear_rates(6)[:step],
            steps=trainers.groups_of_stream(step),
        )
        saved = torch.load(tmp_path / f"checkpoint-{step}" / "lwo.pt", weights_only=True)
        assert saved["lwo"]["step"] == step
        assert expected.relative_difference(saved["weights"]) < 1e-9
    assert expected.relative_difference(trainers.snapshot(trainer.model)) < 1e-9
    assert trainers.logged(trainer, "grad_norm") == pytest.approx(expected.norms)


def test_an_error_in_mid_accumulation_leaves_the_model_free(tmp_path: Path) -> None:
    class Fails(TrainerCallback):
        def on_substep_end(self, *_: Any, **__: Any) -> None:
            raise ZeroDivisionError

    trainer = make(tmp_path)
    trainer.add_callback(Fails())
    with pytest.raises(ZeroDivisionError):
        use_lwo(trainer, trainers.config()).train()
    assert all(p.requires_grad and p.grad is None for p in trainer.model.parameters())
    trainer.remove_callback(Fails)
    trainer.train()
    assert trainer.lwo.step_count == trainers.STEPS


def test_a_resume_needs_a_checkpoint_of_ours(tmp_path: Path) -> None:
    make(tmp_path, save_strategy="steps", save_steps=5).train()
    trainer = use_lwo(make(tmp_path), trainers.config())
    with pytest.raises(UserError, match=r"checkpoint-5 has no lwo\.pt"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    trainer = make(
        tmp_path,
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=2,
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # so that the best is not the last
    )
    use_lwo(trainer, trainers.config()).train()
    best = trainer.state.best_model_checkpoint
    assert best == str(tmp_path / "checkpoint-2")
    saved = torch.load(Path(best, "lwo.pt"), weights_only=True)["weights"]
    for name, weight in trainers.snapshot(trainer.model).items():
        assert torch.equal(weight, saved[name]), name
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric)


class WithMixin(LWOTrainerMixin, trainers.InOrder):
    pass


def test_the_mixin_takes_the_config_in_its_constructor(tmp_path: Path) -> None:
    trainer = WithMixin(
        model=oracle.tiny_model(tied=False, dtype=torch.float64),
        args=trainers.arguments(tmp_path, max_steps=3),
        train_dataset=trainers.Rows(),
        lwo_config=trainers.config(),
    )
    before = trainers.snapshot(trainer.model)
    trainer.train()
    after = trainers.snapshot(trainer.model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    trained = [name for layer in trainer.lwo.layers[:2] for name in layer.parameter_names]
    assert moved == set(trained)
    with pytest.raises(UserError, match="max_grad_norm = 2.0, but max_grad_norm = 0.5, which"):
        WithMixin(
            model=oracle.tiny_model(tied=False),
            args=trainers.arguments(tmp_path),
            lwo_config=trainers.config(max_grad_norm=2.0),
        )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_bf16_and_checkpointing_of_activations(tmp_path: Path, checkpointing: bool) -> None:
    """Under autocast, the masters stay fp32; what checkpointing computes again is the same."""
    trained = []
    for on in (checkpointing, False):
        trainer = make(tmp_path, torch.float32, bf16=True, max_steps=3, gradient_checkpointing=on)
        use_lwo(trainer, trainers.config()).train()
        trained.append(trainers.snapshot(trainer.model))
    assert all(weight.dtype == torch.float32 for weight in trained[0].values())
    for name, weight in trained[0].items():
        assert torch.equal(weight, trained[1][name]), name
    plain = use_lwo(make(tmp_path, torch.float32, max_steps=3), trainers.config())
    plain.train()
    other = trainers.snapshot(plain.model)
    assert any(not torch.equal(weight, other[name]) for name, weight in trained[0].items())


def test_a_trainer_can_train_again(tmp_path: Path) -> None:
    trainer = use_lwo(make(tmp_path, max_steps=3), trainers.config())
    trainer.train()
    first = trainers.logged(trainer, "learning_rate")
    trainer.train()
    assert trainers.logged(trainer, "learning_rate") == first
    # And after an error in mid-run.
    fails = make(tmp_path, max_steps=3)
    fails.log = _Failing(fails.log)
    use_lwo(fails, trainers.config())
    with pytest.raises(ZeroDivisionError):
        fails.train()
    fails.train()
    assert fails.lwo.step_count == 3


class _Failing:
    """Fails at its first call."""

    def __init__(self, log: Any):
        self._log = log
        self._calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self._calls += 1
        if self._calls == 1:
            raise ZeroDivisionError
        self._log(*args, **kwargs)


class OwnOptimizer(trainers.InOrder):
    def create_optimizer(self, model: Any = None) -> Any:
        return super().create_optimizer(model)


class OwnBackward(trainers.InOrder):
    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        loss = self.compute_loss(model, self._prepare_inputs(inputs))
        loss.backward()
        return loss.detach()


@pytest.mark.parametrize(
    ("arguments", "config", "said"),
    [
        ({"optim": "adafactor"}, {}, "optim = adafactor cannot be used"),
        ({"optim": "sgd"}, {}, "optim = sgd cannot be used"),
        ({"auto_find_batch_size": True}, {}, "auto_find_batch_size"),
        ({"enable_jit_checkpoint": True}, {}, "enable_jit_checkpoint saves in the middle"),
        ({"torch_compile": True}, {}, "torch.compile of the whole model"),
        (
            {
                "gradient_checkpointing": True,
                "gradient_checkpointing_kwargs": {"use_reentrant": True},
            },
            {},
            "use_reentrant = True loses",
        ),
        ({}, {"lr": 1e-4}, "LWOConfig sets lr = 0.0001, but learning_rate = 0.001, which counts"),
        ({}, {"betas": (0.8, 0.9)}, "LWOConfig sets betas"),
        ({}, {"eps": 1e-8}, "but adam_epsilon = 1e-06"),
        ({}, {"weight_decay": 0.1}, "but weight_decay = 0.0"),
        ({}, {"max_grad_norm": 1.0}, "but max_grad_norm = 0.5"),
        ({}, {"gradient_accumulation_steps": 4}, "but gradient_accumulation_steps = 2"),
        ({}, {"lr_scheduler_type": "cosine"}, "but lr_scheduler_type = linear"),
        ({}, {"warmup_steps": 5}, "but warmup_steps = 2"),
        ({}, {"lr_schedule_over": "visit"}, "but the schedule of TrainingArguments = run"),
        ({}, {"max_steps": 7}, "but max_steps = -1"),
        ({}, {"batches": "cycle"}, "the Trainer's sampler gives new ones"),
        (
            {},
            {"stateless": "all", "stateless_update": "backward"},
            "needs the learning rate before",
        ),
    ],
)
def test_what_cannot_work_is_refused_by_name(
    tmp_path: Path, arguments: dict[str, Any], config: dict[str, Any], said: str
) -> None:
    trainer = make(tmp_path, **arguments)
    with pytest.raises(UserError, match=said):
        use_lwo(trainer, trainers.config(**config))


def test_use_after_training_is_refused(tmp_path: Path) -> None:
    trainer = make(tmp_path, max_steps=1)
    trainer.train()
    with pytest.raises(UserError, match="has trained already; call use_lwo before train"):
        use_lwo(trainer, trainers.config())


def test_what_is_no_config_or_trainer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a dict is not an LWOConfig"):
        use_lwo(make(tmp_path), {"steps_per_layer": 2})  # type: ignore[arg-type]
    with pytest.raises(UserError, match="put LWOTrainerMixin first"):
        type("Late", (Trainer, LWOTrainerMixin), {})


def test_layers_that_a_run_never_trains_are_told(tmp_path: Path) -> None:
    trainer = use_lwo(make(tmp_path, max_steps=2), trainers.config(steps_per_layer=2))
    with pytest.warns(UserWarning, match="2 steps never train layer_0, .* a cycle takes"):
        trainer.train()


def test_what_agrees_is_no_contradiction(tmp_path: Path) -> None:
    agreed = trainers.config(lr=trainers.LR, eps=1e-6, max_grad_norm=0.5, warmup_steps=2)
    use_lwo(make(tmp_path), agreed)


def test_several_gpus_of_one_process_are_refused(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    trainer.args._n_gpu = 2
    with pytest.raises(UserError, match="this process uses 2 GPUs by DataParallel"):
        use_lwo(trainer, trainers.config())


def test_optimizers_of_ones_own_are_refused(tmp_path: Path) -> None:
    model = oracle.tiny_model(tied=False)
    adamw = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.ConstantLR(adamw)
    arguments = trainers.arguments(tmp_path)
    for given, said in (
        ({"optimizers": (adamw, None)}, r"was given an optimizer \(AdamW\)"),
        ({"optimizers": (None, scheduler)}, r"was given a scheduler \(ConstantLR\)"),
        ({"optimizer_cls_and_kwargs": (torch.optim.SGD, {})}, "optimizer_cls_and_kwargs"),
    ):
        with pytest.raises(UserError, match=said):
            use_lwo(Trainer(model=model, args=arguments, **given), trainers.config())
    with pytest.raises(UserError, match=r"OwnOptimizer\.create_optimizer makes an optimizer"):
        use_lwo(OwnOptimizer(model=model, args=arguments), trainers.config())
    with pytest.raises(UserError, match=r"a Linear is not a transformers\.Trainer"):
        use_lwo(nn.Linear(1, 1), trainers.config())


def test_models_that_cannot_be_trained_are_refused(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    arguments = trainers.arguments(tmp_path)
    spread = oracle.tiny_model(tied=False)
    spread.hf_device_map = {"model": "cpu", "lm_head": "disk"}
    adapters = get_peft_model(oracle.tiny_model(tied=False), LoraConfig(target_modules=["q_proj"]))
    compiled = torch.compile(oracle.tiny_model(tied=False), backend="eager")
    for model, said in (
        (spread, "spread over several devices"),
        (adapters, 'pass method="lora"'),
        (compiled, "compiled as a whole"),
    ):
        with pytest.raises(UserError, match=said):
            use_lwo(Trainer(model=model, args=arguments), trainers.config())
    stored = make(tmp_path, torch.bfloat16)
    with pytest.raises(UserError, match="load the model with dtype=torch.float32"):
        use_lwo(stored, trainers.config()).train()


def test_adapters_are_trained_by_lora_and_resumed(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    def make_adapters(**more: Any) -> Any:
        model = oracle.tiny_model(tied=False)
        torch.manual_seed(3)
        adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"]))
        trainer = trainers.InOrder(
            model=adapted,
            args=trainers.arguments(tmp_path, **more),
            train_dataset=trainers.Rows(),
        )
        return use_lwo(trainer, trainers.config(), method="lora")

    unbroken = make_adapters(save_strategy="steps", save_steps=3)
    before = trainers.snapshot(unbroken.model)
    unbroken.train()
    after = trainers.snapshot(unbroken.model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if "lora_" in name}
    again = make_adapters()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for name, weight in trainers.snapshot(again.model).items():
        assert torch.equal(weight, after[name]), name


def test_gradients_that_accelerate_has_not_seen_are_an_error(tmp_path: Path) -> None:
    trainer = OwnBackward(
        model=oracle.tiny_model(tied=False),
        args=trainers.arguments(tmp_path, average_tokens_across_devices=False),
        train_dataset=trainers.Rows(),
    )
    with pytest.raises(RuntimeError, match=r"outside of lwo\.backward\(\)"):
        use_lwo(trainer, trainers.config()).train()


def test_weight_decay_of_norms_is_said(tmp_path: Path) -> None:
    trainer = use_lwo(make(tmp_path, weight_decay=0.1, max_steps=1), trainers.config())
    with pytest.warns(UserWarning, match="weight_decay = 0.1 counts for every parameter"):
        trainer.train()


def test_the_ramp_of_a_visit_counts_with_the_trainers_schedule(tmp_path: Path) -> None:
    """At half the rate in the first step of each visit, but for the last, weights differ."""
    settings = {"lr_scheduler_type": "constant", "warmup_steps": 0, "max_steps": 1}
    half = use_lwo(make(tmp_path, **settings), trainers.config(visit_ramp_steps=2))
    half.train()
    trainer = make(tmp_path, **(settings | {"learning_rate": trainers.LR / 2}))
    use_lwo(trainer, trainers.config()).train()
    expected = trainers.snapshot(trainer.model)
    for name, weight in trainers.snapshot(half.model).items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-15)
