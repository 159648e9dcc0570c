"""What makes the hook's view of the model untrue after `attach` is followed, or is an error that
says what happened.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import lwo_dist
from lwo_dist import LWOConfig, UserError
from lwo_dist.hook import LWO
from lwo_dist.names import clean_name
from tests.unit.test_hook import STEPS_PER_LAYER, Tiny, attach, loss_of, tiny, train

Change = Callable[[Tiny], object]


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def move_one(model: Tiny) -> None:
    model.embed.weight.data = model.embed.weight.detach().clone()


@pytest.mark.parametrize("method", ["lwo", "full"])
@pytest.mark.parametrize("state", ["reset", "keep"])
@pytest.mark.parametrize("change", [lambda model: model.to("cpu:0"), move_one])
def test_a_moved_model_trains_the_same(change: Change, state: str, method: str) -> None:
    def run(steps_of_change: set[int]) -> dict[str, torch.Tensor]:
        config = LWOConfig(lr=1e-2, steps_per_layer=3, max_grad_norm=0.5, state=state)
        lwo = lwo_dist.attach(tiny(), config, method)
        for step in range(20):
            loss = loss_of(lwo.model, step)
            if step in steps_of_change:
                change(lwo.model)
            lwo.backward(loss)
            lwo.step()
            if step + 1 in steps_of_change:
                change(lwo.model)
        return weights(lwo.model)

    still, moved = run(set()), run({1, 4, 9, 10, 17})
    assert all(torch.equal(still[name], moved[name]) for name in still)


def test_a_layer_that_is_wrapped_later_trains_the_same() -> None:
    def run(step_of_change: int) -> dict[str, torch.Tensor]:
        lwo = attach()
        for step in range(12):
            if step == step_of_change:
                for i in (0, 1):
                    lwo.model.layers[i] = checkpoint_wrapper(lwo.model.layers[i])
            train(lwo, step, step + 1)
        return {clean_name(name): p for name, p in weights(lwo.model).items()}

    bare, wrapped = run(99), run(3)  # inside the visit of layer 0
    assert all(torch.equal(bare[name], wrapped[name]) for name in bare)


def assign(model: Tiny) -> None:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def resize(model: Tiny) -> None:
    larger = nn.Embedding(13, 6).double()
    model.embed = larger


def exchange(model: Tiny) -> None:
    model.layers[0] = nn.Linear(6, 6).double()


def tie(model: Tiny) -> None:
    model.head.weight = model.embed.weight


def untie(model: Tiny) -> None:
    model.embed.weight = nn.Parameter(model.embed.weight.detach().clone())


def wrap(model: Tiny) -> None:
    model.layers[0] = nn.Sequential(model.layers[0])


def extend(model: Tiny) -> None:
    model.extra = nn.Parameter(torch.zeros(3, dtype=torch.float64))


def parametrise(model: Tiny) -> None:
    nn.utils.parametrizations.weight_norm(model.layers[0])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (assign, "layers.0.weight was replaced"),
        (resize, "embed.weight was replaced"),
        (untie, "embed.weight was replaced"),
        (exchange, "layers.0.weight was replaced"),
        (tie, "head.weight was replaced"),
        (wrap, "layers.0.weight was replaced"),
        (parametrise, "layers.0.weight was replaced"),
        (extend, "extra was added"),
        (lambda model: model.float(), "went from torch.float64 to torch.float32"),
    ],
)
def test_a_changed_model_is_an_error_before_it_trains_wrongly(change: Change, named: str) -> None:
    lwo = attach()
    train(lwo, 0, STEPS_PER_LAYER + 1)  # inside the visit of the first layer of the stack
    change(lwo.model)
    before = weights(lwo.model)
    with pytest.raises(RuntimeError, match=named) as error:
        train(lwo, STEPS_PER_LAYER + 1, 20)
    assert "changed after attach" in str(error.value) and "before attach" in str(error.value)
    # At the next step if the layer itself is concerned, and before the next visit at the latest.
    assert lwo.step_count <= 2 * STEPS_PER_LAYER
    after = weights(lwo.model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved <= {"layers.0.weight", "layers.0.bias"}


@pytest.mark.parametrize("method", ["lwo", "full"])
def test_a_backward_pass_of_someone_else_is_an_error(method: str) -> None:
    lwo = lwo_dist.attach(tiny(), LWOConfig(lr=1e-2, steps_per_layer=2), method)
    optimizer = torch.optim.AdamW(lwo.model.parameters())
    for step in range(5):
        train(lwo, step, step + 1)
        with pytest.raises(RuntimeError, match=r"outside of lwo\.backward"):
            loss_of(lwo.model, step).backward()
    lwo.detach()
    loss_of(lwo.model, 0).backward()
    optimizer.step()


def test_a_trainer_that_does_not_know_the_hook_is_an_error(tmp_path: object) -> None:
    from transformers import Trainer, TrainingArguments

    from tests import oracle

    model = oracle.tiny_model(tied=True)
    lwo = lwo_dist.attach(model, LWOConfig(lr=1e-3))
    rows = [{"input_ids": row, "labels": row} for row in oracle.global_batch(0)[0]]
    arguments = TrainingArguments(str(tmp_path), max_steps=2, use_cpu=True, report_to=[])
    with pytest.raises(RuntimeError, match=r"lwo\.detach"):
        Trainer(model, arguments, train_dataset=rows).train()
    assert lwo.step_count == 0


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_a_step_of_someone_elses_optimizer_is_an_error(
    kind: Callable[..., torch.optim.Optimizer],
) -> None:
    lwo = attach()
    mine = kind(lwo.model.layers[2].parameters(), lr=1e-3)
    other = nn.Linear(2, 2)
    unrelated = kind(other.parameters(), lr=1e-3)
    before = weights(lwo.model)
    lwo.backward(loss_of(lwo.model, 0))
    with pytest.raises(
        RuntimeError, match=rf"an optimizer \({kind.__name__}\) that holds parameters"
    ):
        mine.step()
    assert all(torch.equal(before[name], p) for name, p in lwo.model.named_parameters())
    other(torch.ones(2)).sum().backward()
    unrelated.step()
    lwo.step()
    lwo.allow(mine)
    mine.step()
    lwo.detach()
    mine.step()


def test_one_hook_a_model() -> None:
    model = tiny()
    lwo = attach(model)
    with pytest.raises(UserError, match="attached to another LWO"):
        attach(model)
    train(lwo, 0, 1)
    lwo.detach()
    second = attach(model)
    train(second, 1, 2)


def test_a_hook_that_is_gone_holds_nothing() -> None:
    model = tiny()
    lwo: LWO | None = attach(model)
    del lwo
    gc.collect()
    loss_of(model, 0).backward()
    torch.optim.AdamW(model.parameters()).step()
    train(attach(model), 0, 3)
