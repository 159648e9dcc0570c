"""How a comparison is designed, and what is read from its runs; nothing is trained here."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from transformers import LlamaConfig, LlamaForCausalLM

from lwo_dist.cli import main
from lwo_dist.compare.design import Design, read_variants
from lwo_dist.compare.page import comparison_page, verdicts
from lwo_dist.compare.rates import best_rate
from lwo_dist.compare.readings import differences, means, time_to_loss
from lwo_dist.config import LWOConfig
from lwo_dist.errors import UserError
from lwo_dist.methods.full import FullFineTuning
from lwo_dist.methods.lwo import LayerWise
from lwo_dist.models.flops import flops_per_sequence
from lwo_dist.report.comparison import task_figure
from lwo_dist.storage import RunFolder
from lwo_dist.tasks.completion import LineCompletion
from lwo_dist.tasks.intervals import paired_interval


def design(values: dict[str, Any] | None = None, **changes: Any) -> Design:
    settings = {
        "name": "cmp",
        "values": {"data": {"source": "src"}, **(values or {})},
        "methods": read_variants("method", "lwo,full"),
        "tasks": read_variants("task", "completion"),
        "seeds": (3, 4),
        "rates": (1e-4, 3e-4),
        "sweep_steps": 20,
    }
    return Design(**{**settings, **changes})


# ---- learning rates


def search(rates: tuple[float, ...], optimum: float) -> tuple[float | None, list[float]]:
    tried = []

    def loss_of(rate: float) -> float:
        tried.append(rate)
        return abs(math.log(rate / optimum))

    return best_rate(rates, loss_of), tried


def test_the_best_rate_inside_the_grid_is_taken_without_more_runs():
    assert search((1e-4, 3e-4, 1e-3), 3e-4) == (3e-4, [1e-4, 3e-4, 1e-3])


@pytest.mark.parametrize(
    ("optimum", "best", "more"),
    [(3e-3, 3.3e-3, [3.3e-3, 1.1e-2]), (1e-5, 1.1e-5, [3.3e-5, 1.1e-5, 3.7e-6])],
)
def test_the_grid_grows_until_the_best_rate_has_a_worse_one_beyond_it(optimum, best, more):
    """Both ways alike: no method is stopped at the edge of a grid that suits another."""
    assert search((1e-4, 3e-4, 1e-3), optimum) == (best, [1e-4, 3e-4, 1e-3, *more])


def test_the_grid_stops_growing():
    best, tried = search((1e-4, 3e-4), 1.0)
    assert len(tried) == 5
    assert best == max(tried)


def test_diverged_rates_lose_and_if_all_diverge_there_is_none():
    losses = {1e-4: 2.0, 1e-3: math.nan, 1e-5: 3.0}
    assert best_rate((1e-4, 1e-3), losses.__getitem__) == 1e-4
    assert best_rate((1e-4, 1e-3), lambda rate: math.nan) is None


# ---- which runs there are


def test_every_run_has_the_same_data_and_its_own_name_seed_and_rate():
    plan = design({"train": {"steps": 40}})
    (task,), (lwo, full) = plan.tasks, plan.methods
    runs = [
        plan.sweep(task, lwo, 3e-4),
        plan.sweep(task, full, 3e-4),
        plan.equal_steps(task, lwo, 1e-3, 3),
        plan.equal_steps(task, lwo, 1e-3, 4),
        plan.equal_steps_as(task, lwo, 1e-3, 4, 60),
    ]
    assert [run.name for run in runs] == [
        "cmp-completion-lwo-lr0.0003",
        "cmp-completion-full-lr0.0003",
        "cmp-completion-lwo-seed3",
        "cmp-completion-lwo-seed4",
        "cmp-completion-lwo-seed4-time",
    ]
    assert [run.config.seed for run in runs] == [3, 3, 3, 4, 4]
    assert [run.config.train.steps for run in runs] == [20, 20, 40, 40, 60]
    # The decay of the learning rate ends where the run does.
    assert [run.config.lwo.max_steps for run in runs] == [20, 20, 40, 40, 60]
    assert [run.config.lwo.lr for run in runs] == [3e-4, 3e-4, 1e-3, 1e-3, 1e-3]
    assert [run.config.method for run in runs] == ["lwo", "full", "lwo", "lwo", "lwo"]
    assert {run.config.data.validation_fraction for run in runs} == {0.1}
    assert [run.config.data.evaluate_on for run in runs] == ["validation"] * 2 + ["held_out"] * 3


def test_the_schedule_of_layers_holds_for_the_configs_own_method_only():
    """`lwo.state: keep` would otherwise be refused by full, and take the comparison down."""
    lwo = {"state": "keep", "steps_per_layer": 7, "weight_decay": 0.1, "warmup_steps": 5}
    plan = design({"lwo": lwo})
    first, second = (
        plan.equal_steps(plan.tasks[0], method, 1e-3, 3).config.lwo for method in plan.methods
    )
    assert (first.state, first.steps_per_layer) == ("keep", 7)
    assert (second.state, second.steps_per_layer) == ("reset", LWOConfig().steps_per_layer)
    assert first.weight_decay == second.weight_decay == 0.1
    assert first.warmup_steps == second.warmup_steps == 5


def test_settings_of_one_method_alone_reach_that_method_only():
    plan = design({"lora": {"rank": 64}}, methods=read_variants("method", "lora,lwo,full"))
    ranks = [config.lora.rank for config in plan.configs()]
    assert ranks == [64, 16, 16]
    assert plan.reference == "lora"


def test_a_variant_is_a_name_or_a_file_of_settings(tmp_path):
    file = tmp_path / "long visits.yaml"
    file.write_text("lwo: {steps_per_layer: 50}\n")
    variants = read_variants("method", f"full,{file}")
    assert [variant.label for variant in variants] == ["full", "long_visits"]
    plan = design(methods=variants)
    config = plan.equal_steps(plan.tasks[0], variants[1], 1e-3, 3).config
    assert (config.method, config.lwo.steps_per_layer) == ("lwo", 50)
    assert plan.reference == "long_visits"  # the last, where lora is not compared


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("lwo,lwo", "none twice"),
        ("", "at least one method"),
        ("lwa", "'lwa' must be one of lwo"),
        ("nowhere.yaml", "nowhere.yaml: No such file"),
    ],
)
def test_a_bad_list_of_methods_is_one_line(given, words):
    with pytest.raises(UserError, match=words) as error:
        read_variants("method", given)
    assert "\n" not in str(error.value)


def test_epochs_are_refused():
    plan = design({"train": {"epochs": 2}})
    with pytest.raises(UserError, match=r"train\.epochs: compare needs the same number of steps"):
        plan.configs()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rates", "0,1"], "--rates '0,1' must be learning rates above 0"),
        (["--rates", "fast"], "--rates 'fast' must be learning rates above 0"),
        (["--seeds", "0"], "--seeds 0 must be at least 1"),
        (["--sweep-steps", "-1"], "--sweep-steps -1 must be at least 1"),
        (["--methods", "magic"], "'magic' must be one of"),
        (["run_name=x"], "run_name = x: the runs of a comparison are named after it"),
        (["data.source=/nowhere"], "/nowhere"),
        (["train.epochs=1"], "compare needs the same number of steps"),
        (["eval.metric=beauty"], "eval.metric = 'beauty' is not a score of the task completion"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(arguments, words, tmp_path, capsys):
    storage = tmp_path / "runs"
    common = ["--name", "c", "--methods", "lwo,full", "--without-ray", f"storage={storage}"]
    source = ["tracking.enabled=false", f"data.source={tmp_path}"]
    # What comes later goes before what came earlier.
    assert main(["compare", *common, *source, *arguments]) == 2
    printed = capsys.readouterr().err.strip()
    assert words in printed
    assert "\n" not in printed
    assert not storage.exists()


def test_torchrun_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["compare", "--name", "c", "--without-ray", "data.source=x"]) == 2
    assert "call it without torchrun" in capsys.readouterr().err


# ---- readings


def curve(*points: tuple[float, float]) -> list[dict[str, Any]]:
    return [{"training_seconds": t, "scores": {"loss": loss}} for t, loss in points]


@pytest.mark.parametrize(
    ("target", "seconds"),
    [(3.0, 0.0), (2.5, 5.0), (2.0, 10.0), (1.75, 15.0), (1.5, 20.0), (1.4, None)],
)
def test_time_to_a_loss_is_read_between_two_evaluations(target, seconds):
    points = curve((0.0, 3.0), (10.0, 2.0), (20.0, 1.5), (30.0, 1.6))
    assert time_to_loss(points, target) == seconds


def test_a_diverged_evaluation_is_no_way_to_a_loss():
    points = curve((0.0, 3.0), (10.0, math.nan), (20.0, 1.0))
    assert time_to_loss(points, 2.0) == 20.0
    assert time_to_loss(curve((0.0, math.nan)), 2.0) is None


def write_run(folder: Path, columns: dict[str, list[float]], tokens: list[int]) -> RunFolder:
    (folder / "evaluations").mkdir(parents=True)
    record = {"lines": columns, "tokens": tokens, "scores": {}}
    (folder / "evaluations" / "step_000040.json").write_text(json.dumps(record))
    scores = {score.key: 0.0 for score in LineCompletion.scores}
    summary = {
        "eval": {"curve": [{"step": 40}], "before": scores, **LineCompletion().sheet.record()}
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    return RunFolder.at(str(folder))


def test_differences_are_paired_by_example_after_the_mean_over_seeds(tmp_path):
    """A gain in loss is a lower one, and weighs each line by its tokens."""
    random = np.random.RandomState(0)
    tokens = random.randint(1, 20, 30).tolist()
    sides: dict[str, list[dict[str, list[float]]]] = {
        side: [
            {
                "exact_match": (100.0 * random.randint(0, 2, 30)).tolist(),
                "loss": random.rand(30).tolist(),
            }
            for _ in range(2)
        ]
        for side in ("lora", "lwo")
    }
    runs = {
        side: [
            write_run(tmp_path / f"{side}{i}", columns, tokens) for i, columns in enumerate(both)
        ]
        for side, both in sides.items()
    }
    found = differences(runs["lora"], runs["lwo"])

    def mean(side: str, name: str) -> np.ndarray:
        return np.mean([columns[name] for columns in sides[side]], axis=0)

    expected = paired_interval(mean("lora", "exact_match"), mean("lwo", "exact_match"))
    assert tuple(found["exact_match"].values()) == pytest.approx(expected)
    expected = paired_interval(-mean("lora", "loss"), -mean("lwo", "loss"), tokens)
    assert tuple(found["loss"].values()) == pytest.approx(expected)


def row(method: str, seed: int, seconds: float, loss: float, **changes: Any) -> dict[str, Any]:
    scores = {"loss": loss, "edit_similarity": 50.0 - loss, "lines": 12.0}
    before = {"loss": 3.0, "edit_similarity": 40.0, "lines": 12.0}
    return {
        "purpose": "equal_steps",
        "task": "completion",
        "method": method,
        "seed": seed,
        "lr": 1e-3,
        "run_name": f"cmp-{method}-{seed}",
        "status": "done",
        "device": "CPU",
        "data": {"train_files": 7, "skipped": {"binary": 3}},
        "never_trained": ["layer_2"] if method == "lwo" else [],
        "world_size": 1,
        "count": "lines",
        "examples": 12,
        "labels": {"loss": "loss", "edit_similarity": "edit similarity"},
        "headings": {"loss": "loss, nats per token", "edit_similarity": "edit similarity, %"},
        "steps": 40,
        "flops_per_step": 1e12,
        "training_seconds": seconds,
        "step_seconds": seconds / 40,
        "peak_memory_bytes": 1e9,
        "optimizer_state_bytes": 1e6,
        "bytes_sent_per_step": 0.0,
        "serve_bytes": 5e8,
        "before": before,
        "scores": scores,
        "curve": [
            {"step": 0, "training_seconds": 0.0, "scores": before},
            {"step": 40, "training_seconds": seconds, "scores": scores},
        ],
        **changes,
    }


def test_seeds_become_medians_of_seconds_and_means_of_scores():
    rows = [
        row("lwo", seed, seconds, 1.0 + seed) for seed, seconds in enumerate((10.0, 12.0, 40.0))
    ]
    mean = means(rows)
    assert (mean["training_seconds"], mean["scores"]["loss"]) == (12.0, 2.0)
    assert (mean["low"]["loss"], mean["high"]["loss"]) == (1.0, 3.0)
    assert mean["curve"][1]["training_seconds"] == pytest.approx(62 / 3)


def found(gain: tuple[float, float, float]) -> dict[str, Any]:
    rows = [row("lora", 0, 20.0, 2.0), row("lwo", 0, 15.0, 2.1)]
    against = {"loss": dict(zip(("mean", "low", "high"), gain, strict=True))}
    reading = {
        "lora": {"mean": means(rows[:1]), "against": {}, "time_to_loss": 20.0},
        "lwo": {"mean": means(rows[1:]), "against": against, "time_to_loss": None},
    }
    config = {
        "model": {"name": "somewhere/SmolLM2"},
        "train": {"steps": 40, "global_batch_size": 4, "sequence_length": 256},
        "strategy": "fsdp",
    }
    failed = {"status": "failed", "error": "no room", "run_name": "cmp-full-0", "method": "full"}
    return {
        "design": {
            "name": "cmp",
            "methods": {"lwo": {}, "lora": {}},
            "config": config,
            "seeds": [0],
            "rates": [3e-4, 1e-3],
            "sweep_steps": 20,
            "equal_time": True,
            "reference": "lora",
        },
        "complete": True,
        "command": "lwo-dist compare --name cmp",
        "rates": {"completion": {"lwo": 1e-3, "lora": 1e-3}},
        "sweep": [],
        "rows": [*rows, {**failed, "task": "completion", "purpose": "equal_steps"}],
        "readings": {"completion": {"equal_steps": reading, "equal_time": {}}},
    }


@pytest.mark.parametrize(
    ("gain", "word"),
    [
        ((0.1, 0.05, 0.2), "better"),
        ((-0.1, -0.2, -0.05), "worse"),
        ((0.1, -0.05, 0.2), "no clear difference"),
    ],
)
def test_a_difference_is_called_one_only_where_its_interval_says_so(gain, word):
    (sentence,) = verdicts(found(gain))
    assert word in sentence
    assert "in 75 % of its training time" in sentence


def test_the_page_has_losses_failures_and_the_command():
    page = comparison_page(found((-0.1, -0.2, -0.05)), ["comparison-completion.png"])
    assert "| lwo | 2.100 |" in page
    assert "-0.1 (-0.2 to -0.05, **worse**)" in page
    assert "| 12 held-out lines | loss, nats per token | edit similarity, % |" in page
    assert "| better than lora by | loss, nats per token |" in page
    assert "best of the same search (20 steps a try)" in page and "seed 0." in page
    assert "not reached" in page
    assert "lwo: 1 of its layers never trained in 40 steps" in page
    assert "Examples: 7 train files. Skipped: 3 binary." in page
    assert "| cmp-full-0 | no room |" in page
    assert "lwo-dist compare --name cmp\n" in page
    assert "![completion](comparison-completion.png)" in page


def test_the_page_says_that_rates_were_given_and_that_a_task_has_no_finished_run():
    results = found((-0.1, -0.2, -0.05))
    results["design"]["rates"] = [1e-3]
    results["design"]["seeds"] = [0, 1]
    results["readings"]["repair"] = {"equal_steps": {}, "equal_time": {}}
    page = comparison_page(results, [])
    assert "The learning rate was given: 0.001 for every method." in page
    assert "search" not in page and "seeds 0, 1." in page
    assert "Not complete yet" not in page
    assert "Not complete yet" in comparison_page({**results, "complete": False}, [])
    assert "## repair\n\nNo run has finished.\n" in page


def test_in_the_picture_the_bars_of_a_score_share_a_unit_and_no_label_covers_another():
    results = found((0.1, 0.05, 0.2))
    results["design"]["methods"]["full"] = {}
    of_task = results["readings"]["completion"]
    lwo = of_task["equal_steps"]["lwo"]
    larger = {"mean": 0.4, "low": 0.3, "high": 0.5}
    scores = ("exact_match", "edit_similarity", "bleu", "loss")
    by_method = {
        "lwo": {**lwo, "against": dict.fromkeys(scores, lwo["against"]["loss"])},
        "full": {**lwo, "against": dict.fromkeys(scores, larger)},
    }
    of_task["equal_steps"] |= by_method
    of_task["equal_time"] = by_method
    figure = task_figure(results, "completion", results["rows"][:2])
    FigureCanvasAgg(figure).draw()
    axes = figure.axes[1]
    ends = [line.get_xdata()[-1] for line in axes.lines if len(line.get_xdata()) == 2]
    assert ends[:4] == pytest.approx([0.4, 1.0, 0.4, 1.0])
    boxes = [label.get_window_extent() for label in axes.get_yticklabels()]
    assert len(boxes) == len(scores) * 5
    assert all(upper.y0 > lower.y1 for upper, lower in pairwise(boxes))


def test_operations_that_could_not_be_counted_do_not_take_the_page_down():
    whole = found((-0.1, -0.2, -0.05))
    reading = whole["readings"]["completion"]["equal_steps"]
    reading["lwo"]["mean"]["flops_per_step"] = None
    assert "not counted" in comparison_page(whole, [])


# ---- operations


@pytest.mark.parametrize("labels", [24, 7, 1])
def test_operations_of_a_step_are_those_of_the_formula(labels: int) -> None:
    """Llama by hand: 2 operations per weight and token forward, as many again for the gradient of
    the inputs and of the weights; attention's two products likewise, over all pairs; the head for
    labelled positions only.
    """
    length, layers, hidden, middle, vocabulary = 24, 3, 32, 64, 96
    settings = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=middle,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=vocabulary,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(settings)
    model.config.use_cache = False
    weights = 4 * hidden * hidden + 3 * hidden * middle
    attention = 2 * 2 * length * length * hidden  # both products, forward
    layer, head = 2 * length * weights, 2 * labels * hidden * vocabulary
    forward = layers * (layer + attention) + head

    full = FullFineTuning()
    visits = full.visits(full.layers(model, LWOConfig()))
    assert flops_per_sequence(model, visits, length, labels) == 3 * forward

    lwo = LayerWise()
    visits = lwo.visits(lwo.layers(model, LWOConfig()))
    # Backward ends at the active layer's first norm.
    through = layer + 2 * attention
    ends = layer + through
    backward = [layers * through + head]  # down to the embedding, whose own gradient is no product
    backward += [above * through + head + ends for above in range(layers)]
    backward += [2 * head]
    expected = forward + sum(backward) / len(visits)
    assert flops_per_sequence(model, visits, length, labels) == expected

    # From layer_2 on a pass starts at the input of the layer below the active one.
    expected -= sum(range(1, layers)) * (layer + attention) / len(visits)
    found = flops_per_sequence(model, visits, length, labels, batches="cycle")
    assert found == pytest.approx(expected, rel=1e-12)
