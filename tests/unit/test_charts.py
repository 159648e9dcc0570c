import math
import random

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from lwo_dist.memory import lora_numel
from lwo_dist.report.charts import (
    _shades,
    figures,
    layers_figure,
    loss_figure,
    memory_figure,
    memory_parts_figure,
    save_pictures,
)
from lwo_dist.report.history import History, Visit, layer_bands
from lwo_dist.spool import Spool, read_spool

GB = 10**9


def layer_names(count):
    return ["embed", *(f"layers.{i}" for i in range(count - 2)), "head"]


def visits(layers, steps_per_layer, steps):
    return [
        (s, layers[s // steps_per_layer % len(layers)]) for s in range(0, steps, steps_per_layer)
    ]


def falling_loss(steps, every):
    draw = random.Random(0)
    return [
        (s, 1 + 2 * math.exp(-3 * s / steps) + draw.gauss(0, 0.05))
        for s in range(every, steps + 1, every)
    ]


def rendered(figure):
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return canvas


def overlaps(boxes):
    return [(a, b) for i, a in enumerate(boxes) for b in boxes[i + 1 :] if a.overlaps(b)]


def test_bands_follow_the_switches():
    switches = [(0, "a"), (10, "b"), (20, "a"), (30, "a"), (40, "b")]
    assert layer_bands(switches, 45) == [(0, 10, "a"), (10, 20, "b"), (20, 40, "a"), (40, 45, "b")]
    assert layer_bands(switches, 40) == [(0, 10, "a"), (10, 20, "b"), (20, 40, "a")]
    assert layer_bands([], 40) == []


def test_each_visit_is_drawn_in_its_layers_colour_behind_the_curve():
    layers = layer_names(10)
    bands = layer_bands(visits(layers, 50, 1000), 1000)
    figure = loss_figure(falling_loss(1000, 10), bands, layers, [(0, 3.0), (500, 2.0), (1000, 1.5)])
    canvas = rendered(figure)
    pixels = np.asarray(canvas.buffer_rgba())[..., :3] / 255
    top, gantt = figure.axes
    assert [label.get_text() for label in gantt.get_yticklabels()] == layers
    shades = _shades(layers)
    height = pixels.shape[0]
    for start, end, layer in bands:
        x, y = gantt.transData.transform(((start + end) / 2, layers.index(layer)))
        assert np.allclose(pixels[height - 1 - int(y), int(x)], to_rgb(shades[layer]), atol=0.02), (
            start,
            layer,
        )
        x = top.transData.transform(((start + end) / 2, 0))[0]
        y = top.transAxes.transform((0, 0.03))[1]  # below the curve
        tint = 1 - 0.22 * (1 - np.array(to_rgb(shades[layer])))
        assert np.allclose(pixels[height - 1 - int(y), int(x)], tint, atol=0.02), (start, layer)
    x, y = top.transData.transform((500, 2.0))
    assert np.allclose(
        pixels[height - 1 - int(y), int(x)], to_rgb("#d6336c"), atol=0.05
    )  # the held-out mark


def test_layer_names_never_overlap():
    for count in (2, 10, 42):
        layers = layer_names(count)
        figure = loss_figure(falling_loss(100, 1), layer_bands(visits(layers, 3, 100), 100), layers)
        canvas = rendered(figure)
        boxes = [
            label.get_window_extent(canvas.get_renderer())
            for label in figure.axes[1].get_yticklabels()
        ]
        assert not overlaps(boxes), count
        assert min(label.get_fontsize() for label in figure.axes[1].get_yticklabels()) > 5
        assert all(box.x0 >= 0 and box.y0 >= 0 for box in boxes)


def test_a_non_finite_loss_spoils_no_other_point():
    loss = [(s, math.inf if s == 50 else 2.0) for s in range(400)]
    raw, mean = loss_figure(loss, [], ["all"]).axes[0].lines
    assert len(raw.get_ydata()) == 399
    assert np.allclose(mean.get_ydata(), 2.0)


def test_few_points_are_drawn():
    for loss in ([(1, math.nan)], [(1, 2.0)], [(1, 2.0), (2, math.inf), (3, 1.0)], []):
        rendered(loss_figure(loss, [], ["all"]))


def test_memory_stacks_its_parts_below_the_peak():
    x = [0.1, 0.2, 0.3]
    points = {
        "memory/parameter_bytes": [(t, 2 * GB) for t in x],
        "memory/gradient_bytes": [(t, 1 * GB) for t in x],
        "memory/optimizer_state_bytes": [(t, 3 * GB) for t in x],
        "memory/peak_bytes": [(t, 8 * GB) for t in x],
    }
    figure = memory_figure(points, "training time", hours=True, full=24 * GB)
    rendered(figure)
    (axes,) = figure.axes
    tops = [area.get_datalim(axes.transData).ymax for area in axes.collections]
    assert tops == [2, 3, 6, 8]
    full = next(
        line for line in axes.lines if line.get_label() == "full fine-tuning: at least 24 GB"
    )
    assert set(full.get_ydata()) == {24} and axes.get_ylim()[1] > 24
    assert axes.get_ylabel() == "GB"
    assert axes.get_xlabel() == "training time (minutes)"
    assert [text.get_text() for text in axes.get_legend().get_texts()][-1] == "parameters"


def test_pictures_are_made_from_a_spool_alone(tmp_path):
    layers = layer_names(5)
    spool = Spool(tmp_path / "metrics.jsonl")
    spool.append("run", layers=layers)
    for step in range(1, 101):
        metrics = {
            "train/loss": 3 / step,
            "lwo/active_layer": (step - 1) // 20,
            "train/elapsed_seconds": step * 2.0,
        }
        spool.append_metrics(step, metrics | {"memory/peak_bytes": 1e9})
        if step % 20 == 0 and step < 100:
            spool.append_switch(step, layers[step // 20])
    files = save_pictures(History.read(read_spool(spool.path)), tmp_path / "pictures")
    assert [file.name for file in files] == ["loss_by_layer.png", "memory.png"]
    for file in files:
        assert imread(file).shape[1] == 1650  # a whole PNG
    assert save_pictures(History(), tmp_path / "none") == []
    assert not (tmp_path / "none").exists()


def test_layers_are_sorted_by_what_their_visits_brought():
    layers = layer_names(4)
    drops = {"embed": [0.1, 0.3], "layers.0": [0.5], "head": [-0.1]}
    visits = [
        Visit(step, layer, {"loss_drop": drop, "grad_norm": 1.0, "seconds": 2.0})
        for layer, found in drops.items()
        for step, drop in enumerate(found)
    ]
    figure = layers_figure(visits, layers)
    rendered(figure)
    first = figure.axes[0]
    assert [label.get_text() for label in first.get_yticklabels()] == ["head", "embed", "layers.0"]
    assert [bar.get_width() for bar in first.patches] == [-0.1, 0.2, 0.5]
    assert (0.1, 0.3) in [tuple(line.get_xdata()) for line in first.lines]
    shades = _shades(layers)
    assert [bar.get_facecolor()[:3] for bar in first.patches] == [
        to_rgb(shades[n]) for n in ("head", "embed", "layers.0")
    ]
    rendered(layers_figure([], layers))


def test_what_full_fine_tuning_needs_is_the_highest_lower_bound(tmp_path):
    spool = Spool(tmp_path / "metrics.jsonl")
    spool.append("run", layers=["a", "b"], layer_sizes=[10, 30], model_size=100)
    for step, layer, peak in ((1, 0, 1000), (2, 1, 1500)):
        size = (10, 30)[layer]
        memory = {"memory/gradient_bytes": 4 * size, "memory/optimizer_state_bytes": 8 * size}
        spool.append_metrics(step, {"lwo/active_layer": layer, "memory/peak_bytes": peak, **memory})
    history = History.read(read_spool(spool.path))
    # Of 100 parameters: 12 bytes each, in place of the 12 of each parameter of the active layer.
    assert history.full_fine_tuning() == max(1000 + 12 * 90, 1500 + 12 * 70)
    history.run["layer_sizes"] = [100]  # this is full fine-tuning
    assert history.full_fine_tuning() is None


def test_memory_by_part_compares_this_run_with_what_others_would_train(tmp_path):
    spool = Spool(tmp_path / "metrics.jsonl")
    sizes = {"layers": ["a", "b"], "layer_sizes": [10, 30], "model_size": 100, "lora_size": 20}
    spool.append("run", device="H100", **sizes)
    for step, layer, peak in ((1, 0, 1000), (2, 1, 1500)):
        size = (10, 30)[layer]
        metrics = {
            "memory/parameter_bytes": 400,
            "memory/gradient_bytes": 4 * size,
            "memory/optimizer_state_bytes": 8 * size,
            "memory/park_bytes": 50 * step,
        }
        active = {"lwo/active_layer": layer, "memory/peak_bytes": peak}
        spool.append_metrics(step, metrics | active)
    history = History.read(read_spool(spool.path))
    this, lora, full = history.memory_parts().values()
    assert this == {
        "weights": 400,
        "gradients": 120,
        "optimizer state": 240,
        "parks, in host memory": 100,
        "activations and the rest": 1500 - 760,
    }
    assert lora == {"weights": 480, "gradients": 80, "optimizer state": 160}
    assert full == {"weights": 400, "gradients": 400, "optimizer state": 800}
    figure = memory_parts_figure(history.memory_parts())
    rendered(figure)
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "this run (measured)",
        "LoRA, rank 16 (computed)",
        "full fine-tuning (computed)",
    ]
    assert [text.get_text() for text in axes.texts] == [" 1.6 KB", " 720 B", " 1.6 KB"]
    # A process on a CPU holds Python and its libraries: that is no part of training.
    history.run["device"] = "CPU"
    assert "activations and the rest" not in history.memory_parts()["this run (measured)"]
    legend = figures(history)["memory"].axes[0].get_legend()
    assert "peak" not in [text.get_text() for text in legend.get_texts()]
    history.run["layer_sizes"] = [100]  # this is full fine-tuning
    assert list(history.memory_parts()) == ["this run (measured)"]
    assert History().memory_parts() == {}


def test_lora_trains_two_thin_matrices_for_each_matrix():
    assert lora_numel([(4, 6), (8,), (2, 2)], rank=3) == 3 * (4 + 6) + 3 * (2 + 2)
