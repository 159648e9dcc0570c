"""The planned memory of the shipped configs, with the models' published sizes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from lwo_dist.config.batch import check_world_sizes
from lwo_dist.config.reading import load_config
from lwo_dist.methods import Method
from lwo_dist.plan.estimate import plan_one
from lwo_dist.plan.gpus import USABLE
from lwo_dist.registry import METHODS
from lwo_dist.schedule import make_schedule
from lwo_dist.strategies.checks import check_config
from tests import sizes

CONFIGS = Path(__file__).parents[2] / "launch" / "configs"
GPU_CONFIGS = sorted(CONFIGS.glob("*gpu*.yaml"))


@pytest.mark.parametrize(
    ("size", "billions"), [("1.5B", 1.54), ("7B", 7.62), ("14B", 14.77), ("32B", 32.76)]
)
def test_the_sizes_are_the_published_ones(size: str, billions: float) -> None:
    assert round(sizes.numel(sizes.model_of(size)) / 1e9, 2) == billions


def test_there_are_configs_for_one_gpu_and_for_eight() -> None:
    names = [path.name for path in GPU_CONFIGS]
    assert names == [
        "1.5b_1gpu_24gb.yaml",
        "32b_8gpu_80gb.yaml",
        "7b_1gpu_80gb.yaml",
        "7b_8gpu_80gb.yaml",
    ]


@pytest.mark.parametrize("path", GPU_CONFIGS, ids=lambda path: path.name)
def test_a_config_fits_the_gpus_that_it_names_and_trains_every_layer(path: Path) -> None:
    size, gpus, gigabytes = re.fullmatch(r"([\d.]+b)_(\d)gpu_(\d+)gb", path.stem).groups()  # type: ignore[union-attr]
    config = load_config(path)
    check_config(config)
    check_world_sizes(config)
    assert config.model.name == f"Qwen/Qwen2.5-Coder-{size.upper()}"
    assert config.cluster.num_workers == int(gpus)
    model = sizes.model_of(size.upper())
    plan = sizes.plan(size.upper(), config, int(gpus))
    assert plan.host_bytes == 0  # nothing is parked
    peak = plan.peak.total / 1e9
    assert peak <= USABLE * int(gigabytes)
    text = path.read_text()
    assert f"# Computed: {peak:.0f} GB of {gigabytes} GB" in text
    assert f"launch/configs/{path.name} data.source=DIR" in text
    micro_batch = config.train.global_batch_size // int(gpus)
    micro_batch //= config.lwo.gradient_accumulation_steps
    assert micro_batch == 1 or f"{micro_batch} sequences" in text
    method: Method = METHODS.get(config.method)
    visits = method.cycle(method.layers(model, config.lwo), config.lwo)
    schedule = make_schedule(config.lwo, [visit.active.name for visit in visits])
    assert config.lwo.stateless == "all" and "Each step trains all" in text
    assert schedule.never_active(config.train.steps) == []


@pytest.mark.parametrize("path", GPU_CONFIGS, ids=lambda path: path.name)
def test_one_layer_at_a_time_needs_what_the_config_says(path: Path) -> None:
    size, gpus, _ = re.fullmatch(r"([\d.]+b)_(\d)gpu_(\d+)gb", path.stem).groups()  # type: ignore[union-attr]
    comment = " ".join(line.strip("# ") for line in path.read_text().splitlines() if "#" in line)
    changed, needed = re.search(  # type: ignore[union-attr]
        r"((?:[\w.]+=\w+ )+)trains one(?: layer)? at a time, and needs (\d+) GB", comment
    ).groups()
    settings = changed.split()
    assert "lwo.stateless=none" in settings
    plain = load_config(path, settings)
    check_config(plain)
    assert needed == f"{sizes.peak(size.upper(), plain, int(gpus)) / 1e9:.0f}"
    if more := re.search(r"; with ([^ ]+ [^ ]+) (\d+) GB, and (\d+) GB on the host", comment):
        bf16 = sizes.plan(size.upper(), load_config(path, [*settings, *more[1].split()]), int(gpus))
        assert more[2] == f"{bf16.peak.total / 1e9:.0f}"
        assert more[3] == f"{bf16.host_bytes / 1e9:.0f}"


def test_moments_that_are_kept_are_in_checkpoints() -> None:
    short = ["train.sequence_length=64", "train.global_batch_size=1"]
    config, kept = (
        load_config(None, [f"lwo.state={state}", *short]) for state in ("reset", "keep")
    )
    model = sizes.model_of("1.5B")
    others = sizes.numel(model) - sizes.largest_layer(model, config)
    bytes_of = [sizes.plan("1.5B", found, 1).whole_checkpoint_bytes for found in (config, kept)]
    assert bytes_of[1] - bytes_of[0] == 8 * others


@pytest.mark.parametrize(
    ("settings", "bytes_each"),
    [("lwo.state=reset", 0), ("lwo.state=keep", 8), ("fsdp.storage=bf16", 2)],
)
def test_what_the_next_visit_needs_is_on_the_gpu_during_the_last_step_of_this_one(
    settings: str, bytes_each: int
) -> None:
    plain = ["lwo.stateless=none", "lwo.stateless_update=step", "strategy=fsdp", settings]
    model: Any = sizes.model_of("7B")
    layer = sizes.numel(model.model.layers[0])
    head = sizes.numel(model.lm_head) + sizes.numel(model.model.norm)
    for order, following in [("ascending", layer), ("random", head)]:
        config = load_config(CONFIGS / "7b_1gpu_80gb.yaml", [*plain, f"lwo.order={order}"])
        plan = sizes.plan("7B", config, 1)
        assert plan.visit == "embed"
        assert plan.held.prefetched_bytes == bytes_each * following
        held = plan.held.optimizer_state_bytes
        assert plan.peak.optimizer_state == held + bytes_each * following
    # Nothing is copied where the shards are on the host.
    on_cpu = plan_one(sizes.subject("7B", config), config, 1, bf16=True, on_gpu=False)
    assert on_cpu.peak.optimizer_state == held
