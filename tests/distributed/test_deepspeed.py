"""DeepSpeed ZeRO stages 1, 2 and 3 equal the plain single-process loop, and keep its promises at
every switch.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from lwo_dist.layers import find_layers
from tests import oracle
from tests.distributed import training, zero
from tests.distributed.collectives import CountCollectives
from tests.ranks import run_ranks

# Not imported here: the ranks import it through us, as a user's process does.
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed"
)

Weights = dict[str, torch.Tensor]
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
OVERLAP = {"overlap_comm": True}
# Stage 3 gathers a module's weights when it needs them and lets them go at once.
NOTHING_KEPT = {
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_param_persistence_threshold": 0,
    "stage3_prefetch_bucket_size": 0,
}


# ---- equal to the plain loop


def case(stage: int, *, tied: bool, accumulation: int = 1, clip: float = 0.0, **more: Any) -> tuple:
    return stage, tied, {"accumulation": accumulation, "max_grad_norm": clip}, more


AT_2 = [
    *(case(stage, tied=True, accumulation=2, clip=0.5) for stage in (1, 2, 3)),
    case(2, tied=True, accumulation=2, clip=0.5, zero=OFFLOAD),
    case(1, tied=False, late=True),
    case(3, tied=False, clip=0.5, from_start=True, zero=NOTHING_KEPT),
    case(3, tied=True, accumulation=2, zero=OVERLAP, checkpointing=True),
]
MORE_AT_2 = [
    *(case(stage, tied=False) for stage in (1, 2, 3)),
    case(3, tied=True, accumulation=2, clip=0.5, zero=OFFLOAD),
    case(3, tied=False, late=True),
    case(2, tied=True, accumulation=2, zero=OVERLAP, checkpointing=True),
]
AT_4 = [case(3, tied=False, clip=0.5)]
MORE_AT_4 = [case(3, tied=True, accumulation=2)]


def run_cases(cases: list[tuple]) -> list[tuple[list[float], Weights]]:
    results = []
    for stage, tied, settings, more in cases:
        recipe = oracle.Recipe(**settings)
        lwo = zero.attach_engine(stage, recipe, tied=tied, **more)
        if more.get("from_start"):  # made in another order, so from other random numbers
            lwo.write_layer(
                {name: p.detach() for name, p in oracle.tiny_model(tied=tied).named_parameters()}
            )
        results.append(training.train(lwo, recipe.steps))
    return results


@pytest.mark.parametrize(
    ("world_size", "cases"),
    [
        (2, AT_2),
        (4, AT_4),
        pytest.param(2, MORE_AT_2, marks=pytest.mark.long),
        pytest.param(4, MORE_AT_4, marks=pytest.mark.long),
    ],
)
def test_equals_the_plain_loop(world_size: int, cases: list[tuple]) -> None:
    """The long forms combine stages and settings that the short ones have each once."""
    ranks = run_ranks(run_cases, world_size, cases, timeout=500, deepspeed=True)
    for (stage, tied, settings, more), (losses, weights) in zip(cases, ranks[0], strict=True):
        name = f"stage {stage} tied={tied} {settings} {more}"
        model = oracle.tiny_model(tied=tied)
        layers = [layer.parameter_names for layer in find_layers(model)]
        expected = oracle.train(
            model, layers, oracle.Recipe(max_grad_norm=settings["max_grad_norm"])
        )
        assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) < 1e-5, name
        for parameter_name, parameter in model.named_parameters():
            difference = (parameter.detach() - weights[parameter_name]).abs().max().item()
            assert difference < 1e-5, f"{name}: {parameter_name} differs by {difference}"


# ---- what a step changes, sends and holds

COUNTED: list[tuple[int, dict, dict]] = [
    (1, {}, {}),
    (2, {}, {"late": True}),
    (3, {}, {}),
    (3, NOTHING_KEPT, {}),
    (3, NOTHING_KEPT | OVERLAP, {"checkpointing": True}),
]


def count_steps(cases: list[tuple[int, dict, dict]]) -> list[list[dict]]:
    results = []
    for stage, settings, more in cases:
        recipe = oracle.Recipe(steps_per_layer=2)
        lwo = zero.attach_engine(stage, recipe, tied=False, zero=settings, **more)
        layers = {layer.name: layer for layer in lwo.layers}
        numel = {n: getattr(p, "ds_numel", p.numel()) for n, p in lwo.module.named_parameters()}
        sizes = {
            name: sum(numel[n] for n in layer.parameter_names) for name, layer in layers.items()
        }
        rows = []
        for step in range(2 * len(lwo.layers) + 2):
            layer, before = lwo.active_layer, training.weights(lwo)
            tokens, labels = training.micro_batches(step, 1)[0]
            with CountPayload() as forward:
                loss = oracle.loss_sum(lwo.model, tokens, labels)
            with CountPayload() as backward:
                lwo.backward(loss)
            frozen = [
                n
                for n, p in lwo.module.named_parameters()
                if p.grad is not None and not p.requires_grad
            ]
            inner, seen = lwo.strategy.step, {}

            def spy(
                lr: float, norm: float, inner: Any = inner, seen: dict = seen, lwo: Any = lwo
            ) -> Any:
                with CountPayload() as update:  # without the switch, which comes after it
                    result = inner(lr, norm)
                seen.update(update=update.calls, **lwo.strategy.memory())
                return result

            lwo.strategy.step = spy
            report = lwo.step()
            lwo.strategy.step = inner
            after = training.weights(lwo)
            rows.append(
                {
                    "layer": layer.name,
                    "trained": sorted(layer.parameter_names),
                    "frozen_gradients": frozen,
                    "changed": sorted(n for n in after if not torch.equal(before[n], after[n])),
                    "sizes": sizes,
                    "depth": layer.depth,
                    "depths": {n: other.depth for n, other in layers.items()},
                    "forward": forward.calls,
                    "backward": backward.calls,
                    "sent": report.bytes_sent,
                    **seen,
                }
            )
        results.append(rows)
    return results


class CountPayload(CountCollectives):
    """Weights and gradients; DeepSpeed also compares lists of integers between the ranks."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = len(self.calls)
        result = super().__torch_dispatch__(func, types, args, kwargs)
        tensors = torch.utils._pytree.tree_leaves((args, kwargs))
        if not any(isinstance(t, torch.Tensor) and t.is_floating_point() for t in tensors):
            del self.calls[known:]
        return result


def payload(calls: list[tuple[str, int]], *kinds: str) -> int:
    return sum(size for kind, size in calls if size > 8 and (not kinds or kind in kinds))


def test_a_step_changes_sends_and_holds_the_active_layer_only() -> None:
    world_size = 2
    ranks = run_ranks(count_steps, world_size, COUNTED, timeout=400, deepspeed=True)
    for (stage, settings, more), rows in zip(COUNTED, ranks[0], strict=True):
        for step, row in enumerate(rows):
            where = f"stage {stage} {settings} {more} step {step} {row['layer']}"
            layer_bytes = 4 * row["sizes"][row["layer"]]
            # The last step of a visit too: it is the odd one.
            assert row["changed"] == row["trained"], where
            assert not row["frozen_gradients"], where
            reduced = payload(row["backward"], "all_reduce", "reduce_scatter")
            assert layer_bytes <= reduced <= layer_bytes + 4 * world_size * len(row["trained"]), (
                where
            )
            everything = payload(row["forward"]) + payload(row["backward"]) + payload(row["update"])
            assert row["sent"] == everything, where
            if stage < 3:
                assert payload(row["forward"]) == 0 and everything <= 2 * layer_bytes + 64, where
            held, formula = (
                row["optimizer_state_bytes"],
                12 * row["sizes"][row["layer"]] // world_size,
            )
            assert formula <= held <= formula + 12 * 4 * len(row["trained"]), where
            if (
                stage == 3 and settings
            ):  # nothing stays gathered, so backward has to gather what it needs
                needed = sum(
                    size for n, size in row["sizes"].items() if row["depths"][n] >= row["depth"]
                )
                if more:  # recomputed, but for the last matrix, whose output nobody needs
                    above = [
                        n
                        for n in row["sizes"]
                        if n.startswith("layer") and row["depths"][n] >= row["depth"]
                    ]
                    needed += sum(row["sizes"][n] - 24 * 50 for n in above)
                assert payload(row["backward"], "all_gather") == 4 * needed, where


# ---- bf16

BF16 = oracle.Recipe(steps=40, steps_per_layer=3, max_grad_norm=1.0, lr=1e-3)
FP32_SUMS = {"communication_data_type": "fp32", "data_types": {"grad_accum_dtype": "fp32"}}
BF16_CASES = [
    (1, {}),
    (1, FP32_SUMS),
    (2, FP32_SUMS),
    (3, FP32_SUMS),
]  # the second is DeepSpeed's BF16_Optimizer


def train_bf16(cases: list[tuple[int, dict]]) -> list[tuple[list[float], Weights, bool]]:
    results = []
    for stage, settings in cases:
        lwo = zero.attach_engine(stage, BF16, tied=False, precision="bf16", **settings)
        losses, masters = training.train(lwo, BF16.steps)
        # Weights that are written come back exactly, active or not, parked or not.
        noise = torch.Generator().manual_seed(1)
        written = {
            name: master + torch.rand(master.shape, generator=noise)
            for name, master in masters.items()
        }
        lwo.write_layer(written)
        back = training.weights(lwo)
        kept = all(torch.equal(written[name], back[name]) for name in written)
        for step in range(2):  # to the end of the visit, where the switch unparks what was written
            assert training.train_step(lwo, step)[1].switched == (step == 1)
        unparked = training.weights(lwo)
        kept &= all(torch.equal(written[n], unparked[n]) for n in lwo.active_layer.parameter_names)
        results.append((losses, masters, kept))
    return results


def plain_bf16() -> tuple[list[float], Weights]:
    """One process, bf16 weights, fp32 masters that outlive their visit."""
    model = oracle.tiny_model(tied=False, dtype=torch.bfloat16)
    parameters, losses = dict(model.named_parameters()), []
    masters = {name: p.detach().float() for name, p in parameters.items()}
    layers = [layer.parameter_names for layer in find_layers(model)]
    for step in range(BF16.steps):
        if step % BF16.steps_per_layer == 0:
            active = layers[step // BF16.steps_per_layer % len(layers)]
            mine = [torch.nn.Parameter(masters[name]) for name in active]
            optimizer = torch.optim.AdamW(mine, lr=BF16.lr, eps=BF16.eps, weight_decay=0.01)
            for name, parameter in parameters.items():
                parameter.requires_grad_(name in active)
        tokens, labels = oracle.global_batch(step)
        loss = oracle.loss_sum(model, tokens, labels) / (labels[:, 1:] != -100).sum()
        loss.backward()
        for master, name in zip(mine, active, strict=True):
            master.grad, parameters[name].grad = parameters[name].grad.float(), None
        torch.nn.utils.clip_grad_norm_(mine, BF16.max_grad_norm)
        optimizer.step()
        for master, name in zip(mine, active, strict=True):
            masters[name] = master.detach()
            parameters[name].data.copy_(masters[name])
        losses.append(loss.item())
    return losses, masters


def test_bf16_follows_one_process_and_keeps_its_masters() -> None:
    expected, expected_masters = plain_bf16()
    results = run_ranks(train_bf16, 2, BF16_CASES, timeout=300, deepspeed=True)[0]
    for (stage, settings), (losses, masters, kept) in zip(BF16_CASES, results, strict=True):
        where = f"stage {stage} {settings}"
        assert max(abs(a - b) / b for a, b in zip(losses, expected, strict=True)) < 0.02, where
        for name, master in masters.items():
            assert not torch.equal(master, master.bfloat16().float()), f"{where} {name}"
            assert (master - expected_masters[name]).abs().max() < 0.01, f"{where} {name}"
        assert kept, where


# ---- steps that are not finite

POISONED = [(1, "fp32", {}), (2, "fp32", OFFLOAD), (3, "fp32", {}), (3, "fp32", OFFLOAD)]
POISONED += [(1, "bf16", FP32_SUMS), (2, "bf16", {})]


def poison(cases: list[tuple[int, str, dict]]) -> list[list[tuple]]:
    results = []
    for stage, precision, settings in cases:
        more = settings if precision == "bf16" else {"zero": settings}
        recipe = oracle.Recipe(steps_per_layer=6, accumulation=2)
        lwo = zero.attach_engine(stage, recipe, tied=False, precision=precision, **more)
        rows = []
        for step in range(6):
            before, moments = training.weights(lwo), lwo.state_dict()["moments"]
            for i, (tokens, labels) in enumerate(training.micro_batches(step, 2)):
                loss = oracle.loss_sum(lwo.model, tokens, labels)
                if step in (2, 3) and i == 0 and torch.distributed.get_rank() == 1:
                    loss = loss * float("nan") if step == 2 else loss + float("inf")
                lwo.backward(loss)
                report = lwo.step()
            after, after_moments = training.weights(lwo), lwo.state_dict()["moments"]
            same = all(torch.equal(before[name], after[name]) for name in before)
            kept = bool(moments) and moments.keys() == after_moments.keys()
            kept = kept and all(
                torch.equal(moments[n][k], after_moments[n][k]) for n in moments for k in moments[n]
            )
            rows.append(
                (
                    float(report.skipped),
                    same,
                    kept,
                    float(lwo.skipped_in_a_row),
                    lwo.model.skipped_steps,
                )
            )
        results.append(rows)
    return results


def test_a_non_finite_step_on_one_rank_is_skipped_on_all() -> None:
    for ranks in run_ranks(poison, 2, POISONED, timeout=300, deepspeed=True):
        for rows in ranks:
            assert [row[0] for row in rows] == [0, 0, 1, 1, 0, 0]
            assert [row[1] for row in rows] == [False, False, True, True, False, False]
            assert [row[2] for row in rows[:5]] == [False, False, True, True, False]
            assert [row[3] for row in rows] == [0, 0, 1, 2, 0, 0] and rows[-1][4] == 2


# ---- state that any strategy resumes from


def first_half(strategy: str, steps: int) -> tuple[dict, Weights, list[float], Weights]:
    lwo = make(strategy)
    half = training.train(lwo, steps // 2)[1]
    state = lwo.state_dict()
    losses = [training.train_step(lwo, step)[0] for step in range(steps // 2, steps)]
    return state, half, losses, training.weights(lwo)


def second_half(
    strategies: list[str], state: dict, half: Weights, steps: int
) -> list[tuple[list[float], Weights]]:
    results = []
    for strategy in strategies:
        lwo = make(strategy)
        training.train_step(lwo, 0)  # so that there is something to overwrite
        lwo.write_layer(half)
        lwo.load_state_dict(state)
        losses = [training.train_step(lwo, step)[0] for step in range(steps // 2, steps)]
        results.append((losses, training.weights(lwo)))
    return results


def make(strategy: str) -> Any:
    recipe = oracle.Recipe(max_grad_norm=0.5)
    if strategy.startswith("zero"):
        return zero.attach_engine(
            int(strategy[-1]), recipe, tied=True, zero=OFFLOAD if "offload" in strategy else {}
        )
    return training.attach(strategy, recipe, tied=True, dtype=torch.float32)


@pytest.mark.parametrize(
    ("first", "then", "ranks"),
    [
        ("fsdp", ["zero_1", "zero_2", "zero_3", "zero_offload_2"], 2),
        ("zero_3", ["fsdp", "zero_3"], 1),
    ],
)
def test_any_strategy_resumes_from_any_other(first: str, then: list[str], ranks: int) -> None:
    steps = 18  # the middle is inside of the third visit
    state, half, losses, weights = run_ranks(
        first_half, 2, first, steps, timeout=200, deepspeed=True
    )[0]
    assert state["moments"] and all(moments["step"] == 1 for moments in state["moments"].values())
    for name, (found, found_weights) in zip(
        then,
        run_ranks(second_half, ranks, then, state, half, steps, timeout=300, deepspeed=True)[0],
        strict=True,
    ):
        assert max(abs(a - b) for a, b in zip(losses, found, strict=True)) < 1e-5, name
        assert max((weights[n] - found_weights[n]).abs().max() for n in weights) < 1e-5, name
