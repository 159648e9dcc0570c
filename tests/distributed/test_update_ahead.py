"""`step(wait=False)` under `replicate`: the new weights are sent during the next forward pass, with
the same numbers, and nothing reads them before they are whole.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lwo_dist.hook import LWO
from tests import oracle
from tests.distributed.collectives import CountCollectives
from tests.distributed.training import attach, micro_batches, train, train_step
from tests.ranks import run_ranks

CASES = [(False, 1, "lwo"), (True, 2, "lwo"), (False, 1, "full")]  # tied, accumulation, method


def ahead(**options) -> LWO:
    lwo = attach("replicate", **options)
    lwo.step = partial(lwo.step, wait=False)
    return lwo


def train_both_ways() -> list:
    found = []
    for tied, accumulation, method in CASES:
        recipe = oracle.Recipe(accumulation=accumulation, max_grad_norm=0.5, steps_per_layer=2)
        options = {"recipe": recipe, "tied": tied, "dtype": torch.float32, "method": method}
        results = [train(lwo, 13) for lwo in (attach("replicate", **options), ahead(**options))]
        found.append(results)
    return found


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_numbers_are_the_same_bit_for_bit(world_size: int) -> None:
    for results in run_ranks(train_both_ways, world_size)[0]:
        (losses, weights), (losses_ahead, weights_ahead) = results
        assert losses == losses_ahead
        assert weights.keys() == weights_ahead.keys()
        assert all(torch.equal(weights[name], weights_ahead[name]) for name in weights)


def is_absent(lwo: LWO, names: tuple[str, ...]) -> bool:
    parameters = dict(lwo.model.named_parameters())
    return any(bool(parameters[name].isnan().any()) for name in names)


def watch_the_next_forward() -> list[dict[str, bool]]:
    """Where in the pass after each step the layer that it updated is still absent."""
    recipe = oracle.Recipe(steps_per_layer=2)
    lwo = ahead(recipe=recipe, tied=False, dtype=torch.float32)
    rows = []
    for layer in lwo.layers:
        train_step(lwo, 0)
        seen = {"after the step": is_absent(lwo, layer.parameter_names)}

        def look(module: nn.Module, _: object, *, place: str, seen=seen, layer=layer) -> None:
            seen[place] = is_absent(lwo, layer.parameter_names)

        places = {"embed": lwo.model.model.embed_tokens, "head": lwo.model.lm_head}
        places |= {f"layer_{i}": module for i, module in enumerate(lwo.model.model.layers)}
        hooks = [
            module.register_forward_hook(
                lambda module, inputs, output, place=place: look(module, inputs, place=place)
            )
            for place, module in places.items()
        ]
        train_step(lwo, 1)
        for hook in hooks:
            hook.remove()
        rows.append(seen)
    return rows


def test_only_layers_below_run_before_the_weights_are_there() -> None:
    rows = run_ranks(watch_the_next_forward, 2)[0]
    below = ["embed", "layer_0", "layer_1", "layer_2", "layer_3", "head"]
    for index, row in enumerate(rows):
        assert row.pop("after the step")
        absent = [place for place in below if row[place]]
        # Outside of the stack nothing is hidden: the whole pass may read embedding and head.
        assert absent == ([] if index in (0, 5) else below[:index])


def read_in_every_way() -> dict[str, bool]:
    """Whether each way to read the updated layer gives its new weights."""
    recipe = oracle.Recipe(steps_per_layer=2)
    found = {}
    for way in (
        "flush", "state_dict", "read_layer", "evaluation", "detach", "memory", "step",
    ):  # fmt: skip
        lwo = ahead(recipe=recipe, tied=True, dtype=torch.float32)
        waiting = attach("replicate", recipe, tied=True, dtype=torch.float32)
        layer = lwo.active_layer
        for other in (lwo, waiting):
            train_step(other, 0)
        assert is_absent(lwo, layer.parameter_names)
        new = {name: dict(waiting.model.named_parameters())[name] for name in layer.parameter_names}
        read = dict(lwo.model.named_parameters())
        if way == "flush":
            lwo.flush()
        elif way == "state_dict":
            read = lwo.model.state_dict()
        elif way == "read_layer":
            read = lwo.read_layer(layer)
        elif way == "evaluation":
            lwo.model.eval()
            with torch.no_grad():
                lwo.model(input_ids=torch.zeros(1, 4, dtype=torch.long))
        elif way == "detach":
            lwo.detach()
        elif way == "memory":
            assert lwo.memory() == waiting.memory()
        elif way == "step":  # the last of the visit: the switch waits
            for other in (lwo, waiting):
                train_step(other, 1)
        found[way] = all(torch.equal(read[name], new[name]) for name in new)
    return found


def test_whatever_reads_the_weights_waits_for_them() -> None:
    for rank in run_ranks(read_in_every_way, 2):
        assert rank == dict.fromkeys(rank, True)


def move_too_early() -> str:
    lwo = ahead(recipe=oracle.Recipe(steps_per_layer=2), tied=False, dtype=torch.float32)
    train_step(lwo, 0)
    lwo.model.double()
    with pytest.raises(RuntimeError) as raised:
        lwo.flush()
    return str(raised.value)


def test_a_model_that_is_moved_too_early_is_an_error() -> None:
    for message in run_ranks(move_too_early, 2):
        assert "embed_tokens.weight was moved or set before its update was complete" in message


def count_ahead() -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    kinds = []
    for lwo in (
        attach("replicate", oracle.Recipe(), tied=False, dtype=torch.float32),
        ahead(recipe=oracle.Recipe(), tied=False, dtype=torch.float32),
    ):
        with CountCollectives() as counter:
            for _ in range(2):
                tokens, labels = micro_batches(0, 1)[0]
                lwo.backward(oracle.loss_sum(lwo.model, tokens, labels) / dist.get_world_size())
                lwo.step()
        kinds.append(counter.calls)
    return kinds[0], kinds[1]


def test_the_same_is_sent() -> None:
    waiting, early = run_ranks(count_ahead, 2)[0]
    assert waiting == early and len(early) == 6
