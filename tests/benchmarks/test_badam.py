"""The last update of each visit under ZeRO-3: BAdam 1.4 beside ours, on the same model, data and
layers.

    python -m pytest -s tests/benchmarks/test_badam.py

BAdam switches inside of the optimizer's step, before ZeRO has copied the updated masters into the
weights: what the last step of a visit has learned goes with the old masters. Ours switches when the
step is wholly done.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lwo_dist
from lwo_dist.methods.lwo import LayerWise
from lwo_dist.strategies.deepspeed.builder import load_deepspeed, make_engine
from tests import oracle
from tests.distributed import training, zero
from tests.ranks import run_ranks

# Not imported here: it looks at its import whether there is a DeepSpeed config of stage 3.
pytestmark = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("badam", "deepspeed")),
    reason="needs badam==1.4 and deepspeed",
)

RECIPE = oracle.Recipe(steps=24, steps_per_layer=4, lr=1e-3)
Row = tuple[tuple[str, ...], int, int]
"""The active layer's parameters, how many of them the step changed, and how many others."""


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=50,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config)


def with_badam() -> list[Row]:
    load_deepspeed().check_environment()
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    settings = zero.settings(3) | {"zero_allow_untested_optimizer": True, "gradient_clipping": 0.0}
    alive = HfDeepSpeedConfig(settings)  # BAdam asks it for the stage, as long as it lives
    from badam import BlockOptimizer

    model = llama()
    optimizer = BlockOptimizer(
        base_optimizer=torch.optim.AdamW(
            model.parameters(), lr=RECIPE.lr, eps=RECIPE.eps, weight_decay=0.0
        ),
        named_parameters_list=list(model.named_parameters()),
        switch_block_every=RECIPE.steps_per_layer,
        switch_mode="ascending",
        include_embedding=True,
        include_lm_head=True,
    )
    deepspeed.init_distributed(dist_init_required=False)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=settings, dist_init_required=False
    )
    optimizer.ds_optimizer = engine.optimizer  # as its callback for the Trainer does
    assert alive is not None

    def step(loss: torch.Tensor) -> None:
        engine.backward(loss)
        engine.step()

    return watch(engine, step)


def with_ours() -> list[Row]:
    model, config = llama(), zero.lwo_config(RECIPE)
    settings = zero.settings(3) | {"gradient_clipping": 0.0}
    lwo = lwo_dist.attach(make_engine(model, config, settings, LayerWise()), config)

    def step(loss: torch.Tensor) -> None:
        lwo.backward(loss)
        lwo.step()

    return watch(lwo.model, step)


def watch(engine: Any, step: Callable[[torch.Tensor], None]) -> list[Row]:
    rows, before = [], weights(engine)
    for i in range(RECIPE.steps):
        active = tuple(name for name, p in engine.module.named_parameters() if p.requires_grad)
        tokens, labels = training.micro_batches(i, 1)[0]
        step(oracle.loss_sum(engine, tokens, labels))
        after = weights(engine)
        changed = {name for name in after if not torch.equal(before[name], after[name])}
        rows.append((active, len(changed & set(active)), len(changed - set(active))))
        before = after
    return rows


def weights(engine: Any) -> dict[str, torch.Tensor]:
    """What the model computes with, whole."""
    import deepspeed

    parameters = dict(engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(parameters.values())):
        return {name: p.detach().clone() for name, p in parameters.items()}


def test_ours_keeps_the_last_update_of_a_visit_and_badam_loses_it() -> None:
    version = importlib.metadata.version("badam")
    lines = ["step  BAdam: layer                changed  |  lwo_dist: layer             changed"]
    rows = {
        name: run_ranks(run, 2, timeout=200, deepspeed=True)[0]
        for name, run in (("badam", with_badam), ("ours", with_ours))
    }
    for i, (theirs, ours) in enumerate(zip(rows["badam"], rows["ours"], strict=True)):
        lines.append(f"{i + 1:4}  {describe(theirs)}  |  {describe(ours)}")
    lost = {name: [row for row in found if row[1] == 0] for name, found in rows.items()}
    for name, found in lost.items():
        lines.append(f"{name}: {len(found)} of {RECIPE.steps} updates lost")
    print(
        "\n".join(
            [
                "",
                f"ZeRO-3, 2 ranks, fp32, {RECIPE.steps_per_layer} steps a visit, badam {version}",
                *lines,
            ]
        )
    )
    for active, changed, others in rows["ours"]:
        assert changed == len(active) and others == 0
    # A step is the last of its visit where the next one has another layer. BAdam's first visit is a
    # step short.
    last = [a[0] != b[0] for a, b in zip(rows["badam"], rows["badam"][1:], strict=False)]
    assert last.count(True) == RECIPE.steps // RECIPE.steps_per_layer
    for (active, changed, _), is_last in zip(rows["badam"], last, strict=False):
        assert changed == (0 if is_last else len(active))


def describe(row: Row) -> str:
    active, changed, _ = row
    return f"{active[0][:26]:26} {changed:2}/{len(active):<2}"
