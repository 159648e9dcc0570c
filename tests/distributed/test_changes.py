"""Under every strategy, what changes the model after `attach` is followed, or is an error that says
what happened.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from lwo_dist.hook import LWO
from tests import oracle
from tests.distributed import training, zero
from tests.ranks import run_ranks

RECIPE = oracle.Recipe(steps_per_layer=2)


def message(call: Callable[[], Any]) -> str:
    """What `call` raises, in one line, or its end without an error."""
    try:
        call()
    except (RuntimeError, ValueError) as error:
        return str(error)
    return "no error"


def next_steps(lwo: LWO, change: Callable[[Any], Any], steps: int = 3) -> str:
    """Change the module after the first step, and go on."""
    training.train_step(lwo, 0)
    change(lwo.module)
    return message(lambda: [training.train_step(lwo, 1 + step) for step in range(steps)])


def assign(module: torch.nn.Module) -> None:
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    module.load_state_dict(state, assign=True)


def of_fsdp() -> dict[str, str]:
    def sharded() -> LWO:
        return training.attach("fsdp", RECIPE, tied=False, dtype=torch.float32)

    found = {
        "assigned": next_steps(sharded(), assign),
        "moved": next_steps(sharded(), lambda module: module._apply(torch.clone)),
    }
    lwo = sharded()
    optimizer = torch.optim.SGD(lwo.module.parameters())
    tokens, labels = training.micro_batches(0, 1)[0]
    found["backward"] = message(oracle.loss_sum(lwo.model, tokens, labels).backward)
    lwo = sharded()
    training.train_step(lwo, 0)
    found["not its model"] = message(optimizer.step)
    found["optimizer"] = message(torch.optim.SGD(lwo.module.parameters()).step)
    return found


def test_a_sharded_model() -> None:
    found = run_ranks(of_fsdp, 2)[0]
    for change in ("assigned", "moved"):
        assert "changed after attach" in found[change], change
    assert "outside of lwo.backward()" in found["backward"]
    assert found["not its model"] == "no error"
    assert "an optimizer (SGD) that holds parameters of the model was stepped" in found["optimizer"]


def in_ddp() -> list[str]:
    found = []
    for method in ("lwo", "full"):
        lwo = training.attach("replicate", RECIPE, tied=True, dtype=torch.float32, method=method)
        outer = DistributedDataParallel(lwo.model)
        tokens, _ = oracle.global_batch(0)
        found.append(message(lambda outer=outer, tokens=tokens: outer(input_ids=tokens)))
        other = DistributedDataParallel(torch.nn.Linear(2, 2))
        other(torch.ones(2)).sum().backward()
        training.train_step(lwo, 0)
    return found


def test_a_model_wrapped_in_ddp_after_attach() -> None:
    for said in run_ranks(in_ddp, 2)[0]:
        assert "wrapped in DistributedDataParallel after attach" in said


# ---- DeepSpeed


needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed"
)


def of_engines(stage: int) -> dict[str, Any]:
    def attached(**more: Any) -> LWO:
        return zero.attach_engine(stage, RECIPE, tied=True, **more)

    lwo = attached()
    training.train_step(lwo, 0)
    before = training.weights(lwo)
    found: dict[str, Any] = {
        "save": message(lambda: lwo.model.save_checkpoint("nowhere")),
        "load": message(lambda: lwo.model.load_checkpoint("nowhere")),
        "weights": message(lambda: lwo.module.load_state_dict(lwo.module.state_dict())),
    }
    after = training.weights(lwo)
    found["same"] = all(torch.equal(before[name], after[name]) for name in before)
    tokens, labels = training.micro_batches(0, 1)[0]
    loss = oracle.loss_sum(lwo.model, tokens, labels)
    found["backward"] = message(lambda: lwo.model.backward(loss))
    lwo = attached()
    training.train_step(lwo, 0)
    lwo.detach()
    found["save after detach"] = "save_checkpoint" in vars(lwo.model)
    if stage == 2:
        found["moved"] = next_steps(attached(), lambda module: module.to("cpu:0"))
        found["assigned"] = next_steps(
            attached(),
            lambda module: setattr(
                module.lm_head, "weight", torch.nn.Parameter(module.lm_head.weight.detach().clone())
            ),
            steps=1,
        )
    # "auto" is resolved by transformers; in a loop of one's own, the hook's own value counts.
    automatic = {"gradient_clipping": "auto", "zero": {"reduce_bucket_size": "auto"}}
    lwo = attached(**automatic)
    found["auto"] = message(lambda: training.train(lwo, 4))
    return found


@needs_deepspeed
@pytest.mark.parametrize("stage", [2, 3])
def test_an_engine(stage: int) -> None:
    found = run_ranks(of_engines, 2, stage, timeout=200, deepspeed=True)[0]
    assert "engine.save_checkpoint cannot be used while lwo_dist is attached" in found["save"]
    assert "engine.load_checkpoint cannot be used while lwo_dist is attached" in found["load"]
    assert "load_state_dict cannot be used while lwo_dist is attached" in found["weights"]
    assert "lwo.write_layer" in found["weights"]
    assert found["same"]
    assert "outside of lwo.backward()" in found["backward"]
    assert not found["save after detach"]
    assert found["auto"] == "no error"
    if stage == 2:
        assert "was moved" in found["moved"]
        assert "was replaced" in found["assigned"]


def rates_of_others(stage: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    engine = zero.make_engine(stage, RECIPE, tied=True)
    inner = engine.basic_optimizer
    scheduler = torch.optim.lr_scheduler.LambdaLR(inner, lambda step: 1 / (1 + step))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        lwo = zero.lwo_dist.attach(engine, zero.lwo_config(RECIPE))
    found["warnings"] = " ".join(str(w.message) for w in said)
    found["rates"] = []
    for step in range(5):
        found["rates"].append(training.train_step(lwo, step)[1].lr)
        scheduler.step()
    found["weights"] = training.weights(lwo)
    engine = zero.make_engine(stage, RECIPE, tied=True)
    inner = engine.basic_optimizer
    lwo = zero.lwo_dist.attach(engine, zero.lwo_config(RECIPE))
    training.train_step(lwo, 0)
    torch.optim.lr_scheduler.LambdaLR(inner, lambda step: 0.5)
    found["late"] = message(lambda: training.train_step(lwo, 1))
    found["own"] = lwo.step(lr=1e-3).lr
    return found


@needs_deepspeed
@pytest.mark.parametrize("stage", [2, 3])
def test_a_scheduler_of_the_engines_optimizer_is_followed(stage: int) -> None:
    found = run_ranks(rates_of_others, 2, stage, timeout=200, deepspeed=True)[0]
    assert found["rates"] == pytest.approx([RECIPE.lr / (1 + step) for step in range(5)])
    assert "the scheduler of the optimizer" in found["warnings"]
    assert " lr " not in found["warnings"].partition("wins over")[2]
    model = oracle.tiny_model(tied=True)
    from lwo_dist.layers import find_layers

    layers = [layer.parameter_names for layer in find_layers(model)]
    recipe = oracle.Recipe(steps=5, steps_per_layer=2)
    oracle.train(model, layers, recipe, rate=lambda step: RECIPE.lr / (1 + step))
    expected = dict(model.named_parameters())
    for name, tensor in found["weights"].items():
        if name in expected:
            torch.testing.assert_close(tensor, expected[name].detach(), rtol=1e-4, atol=1e-6)
    assert "make its scheduler before attach, or call lwo.step(lr=...)" in found["late"]
    assert found["own"] == 1e-3
