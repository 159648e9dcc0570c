"""DeepSpeed settings without DeepSpeed: what is filled in, what is honoured, what is refused in one
line.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from lwo_dist import extras
from lwo_dist.config import Config
from lwo_dist.config.reading import load_config
from lwo_dist.errors import UserError
from lwo_dist.registry import STRATEGIES
from lwo_dist.strategies.checks import check_config, require_extras
from lwo_dist.strategies.deepspeed.builder import load_deepspeed
from lwo_dist.strategies.deepspeed.settings import read_config, refuse_settings, resolve


def make(settings: Any = None, *overrides: str) -> Config:
    config = load_config(
        None, ["strategy=deepspeed", "train.global_batch_size=16", "train.steps=5", *overrides]
    )
    return config.model_copy(update={"deepspeed": settings})


def test_what_is_left_open_is_filled_in() -> None:
    settings = resolve(
        make(
            None,
            "lwo.gradient_accumulation_steps=2",
            "lwo.max_grad_norm=0.5",
            "train.precision=fp32",
        ),
        world_size=4,
    )
    assert settings["zero_optimization"] == {"stage": 3}
    assert settings["train_batch_size"] == 16 and settings["train_micro_batch_size_per_gpu"] == 2
    assert settings["gradient_accumulation_steps"] == 2
    assert settings["bf16"] == {"enabled": False} and "communication_data_type" not in settings
    # DeepSpeed 0.19.8 clips at 1.0 where this is absent.
    assert settings["gradient_clipping"] == 0.5
    assert resolve(make(None, "lwo.max_grad_norm=0"), 1)["gradient_clipping"] == 0


def test_bf16_reduces_in_fp32_unless_the_config_says_otherwise() -> None:
    settings = resolve(make(None, "train.precision=bf16"), 2)
    assert settings["bf16"]["enabled"] and settings["communication_data_type"] == "fp32"
    assert settings["data_types"] == {"grad_accum_dtype": "fp32"}
    own = {"communication_data_type": "bf16", "data_types": {"grad_accum_dtype": "bf16"}}
    settings = resolve(make(own, "train.precision=bf16"), 2)
    assert {key: settings[key] for key in own} == own


def test_the_users_settings_are_honoured() -> None:
    theirs = {
        "zero_optimization": {
            "stage": 2,
            "reduce_bucket_size": 12345,
            "allgather_bucket_size": 999,
            "overlap_comm": False,
            "offload_optimizer": {"device": "cpu", "pin_memory": False},
        },
        "gradient_clipping": 0.25,
        "communication_data_type": "fp32",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": 16,
        "steps_per_print": 7,
    }
    settings = resolve(make(theirs, "zero_stage=2"), 2)
    assert settings["zero_optimization"] == theirs["zero_optimization"]
    for key in ("gradient_clipping", "communication_data_type", "steps_per_print"):
        assert settings[key] == theirs[key]
    assert settings["gradient_accumulation_steps"] == 1
    assert (
        theirs["gradient_accumulation_steps"] == "auto"
    )  # the user's own mapping is left as it was


@pytest.mark.parametrize(
    ("overrides", "rate"), [(("lwo.lr=1e-4",), "0.0001"), ((), "by method and width")]
)
def test_lwo_wins_over_the_optimizer_and_says_so(overrides: tuple[str, ...], rate: str) -> None:
    theirs = {
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-4, "betas": [0.9, 0.999], "eps": 1e-8}}
    }
    message = rf"lwo wins over optimizer.params: lr 0.0003 -> {rate}$"
    with pytest.warns(UserWarning, match=message):
        assert "optimizer" not in resolve(make(theirs, *overrides), 1)


@pytest.mark.parametrize(
    ("settings", "overrides", "message"),
    [
        ({"zero_optimization": {"stage": 0}}, (), r"zero_optimization.stage = 0 must be 1, 2 or 3"),
        ({"zero_optimization": {"stage": 4}}, (), r"zero_optimization.stage = 4 must be 1, 2 or 3"),
        (
            {"zero_optimization": {"stage": 2}},
            ("zero_stage=3",),
            r"stage = 2, but zero_stage = 3; set them alike",
        ),
        (
            {"fp16": {"enabled": True}},
            (),
            r"fp16.enabled = True cannot be used .*use bf16, or fp32",
        ),
        ({"amp": {"enabled": True}}, (), r"amp.enabled"),
        (
            {"optimizer": {"type": "Lion"}},
            (),
            r"optimizer.type = Lion cannot be used; layers are trained with AdamW",
        ),
        ({"optimizer": {"type": "OneBitAdam"}}, (), r"optimizer.type = OneBitAdam cannot be used"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}},
            (),
            r"'nvme' .* NVMe is not supported",
        ),
        (
            {"zero_optimization": {"offload_param": {"device": "nvme"}}},
            (),
            r"offload_param.device = 'nvme' cannot",
        ),
        ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, (), r"offload the optimizer"),
        ({"zero_optimization": {"zero_hpz_partition_size": 2}}, (), r"zero_hpz_partition_size = 2"),
        (
            {"scheduler": {"type": "WarmupLR"}},
            (),
            r"scheduler cannot be used in a run.*set lwo.lr_scheduler_type",
        ),
        (
            {"gradient_accumulation_steps": 4},
            (),
            r"= 4, but lwo.gradient_accumulation_steps = 1; set them alike",
        ),
        ({"train_batch_size": 8}, (), r"train_batch_size = 8, but train.global_batch_size = 16"),
        ({"train_micro_batch_size_per_gpu": 3}, (), r"= 3, but the size of a micro-batch = 8"),
        (
            {"bf16": {"enabled": True}},
            ("train.precision=fp32",),
            r"enabled = True, but train.precision = fp32",
        ),
        ({"zero_optimization": [1]}, (), r"zero_optimization = \[1\] must be a mapping"),
    ],
)
def test_what_cannot_be_honoured_is_refused_in_one_line(
    settings: dict, overrides: tuple, message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        resolve(make(settings, *overrides), 2)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("enabled", "precision"), [(True, "bf16"), (False, "fp32"), ("auto", "auto"), (None, "auto")]
)
def test_the_deepspeed_config_decides_precision_auto(enabled: object, precision: str) -> None:
    config = make({"bf16": {"enabled": enabled}} if enabled is not None else {})
    resolved = STRATEGIES.get("deepspeed").resolve(config)
    assert resolved.train.precision == precision
    discards = make({"bf16": {"enabled": enabled}}, "lwo.inactive_master=discard")
    assert STRATEGIES.get("deepspeed").stores_16_bit(discards) == (precision == "bf16")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"zero_optimization": {"stage": 2,}', r"zero.json is not JSON: .*line 1"),
        ("[1, 2]", r"holds a list; it must be a mapping"),
        (None, r"zero.json: No such file or directory; give a JSON file"),
    ],
)
def test_a_file_that_is_no_config_is_refused(
    tmp_path: Path, text: str | None, message: str
) -> None:
    if text is not None:
        (tmp_path / "zero.json").write_text(text)
    with pytest.raises(UserError, match=message):
        read_config(str(tmp_path / "zero.json"))


def test_a_file_reads_like_a_mapping(tmp_path: Path) -> None:
    theirs = {
        "zero_optimization": {"stage": 1, "reduce_bucket_size": "auto"},
        "gradient_clipping": 1,
    }
    (tmp_path / "zero.json").write_text(json.dumps(theirs))
    assert read_config(str(tmp_path / "zero.json")) == read_config(theirs)
    assert read_config(theirs) == {"zero_optimization": {"stage": 1}, "gradient_clipping": 1}
    assert read_config(None) == {}


def test_deepspeed_keys_without_the_strategy_are_refused() -> None:
    for override in ("zero_stage=2", "deepspeed.gradient_clipping=1.0"):
        with pytest.raises(UserError, match="has no effect with strategy: fsdp"):
            check_config(load_config(None, [override]))
    with pytest.raises(UserError, match="zero_stage = 4"):
        load_config(None, ["strategy=deepspeed", "zero_stage=4"])
    assert (
        load_config(None, ["strategy=deepspeed", "deepspeed.gradient_clipping=1.0"]).deepspeed
        is not None
    )


def test_settings_of_a_foreign_engine_may_hold_a_scheduler() -> None:
    refuse_settings({"scheduler": {"type": "WarmupLR"}, "zero_optimization": {"stage": 2}})


def test_without_deepspeed_only_its_strategy_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "missing", lambda extra: ["deepspeed"])
    message = (
        r"strategy: deepspeed needs packages that are not installed \(deepspeed\): "
        r"pip install 'lwo-dist\[deepspeed\]'"
    )
    with pytest.raises(UserError, match=message):
        load_deepspeed()
    with pytest.raises(UserError, match=message):
        require_extras(load_config(None, ["strategy=deepspeed"]))
    require_extras(load_config(None, ["strategy=fsdp"]))


needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed"
)


@needs_deepspeed
def test_other_versions_and_missing_names_are_refused() -> None:
    load_deepspeed()
    from lwo_dist.strategies.deepspeed import private

    remedy = "install one of the versions that work: deepspeed==0.19.8"
    with pytest.raises(
        UserError, match=f"deepspeed 0.20.0 has not been tested with lwo_dist; {remedy}"
    ):
        private.check_version("0.20.0", {})
    with pytest.raises(UserError, match=f"deepspeed 0.19.8 lacks DeepSpeedEngine._gone; {remedy}"):
        private.check_version(
            "0.19.8", {private.DeepSpeedEngine: ["_configure_optimizer", "_gone"]}
        )


@needs_deepspeed
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
def test_the_lock_of_a_killed_compile_is_named_and_a_living_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    deepspeed = load_deepspeed()
    deepspeed.check_environment()
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    held = os.open(lock, os.O_CREAT | os.O_EXCL)  # as torch's build does while it lasts
    deepspeed.check_environment()
    os.close(held)
    with pytest.raises(
        UserError, match=r"cpu_adam/lock was left by a compile .* that was killed.*delete that file"
    ):
        deepspeed.check_environment()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a":' * 5000, "nested more than 20 levels deep"),
        ('{"a":' * 30 + "1" + "}" * 30, "nested more than 20 levels deep"),
        (" " * 2**20 + "{}", "is larger than 1048576 bytes"),
    ],
)
def test_a_hostile_json_file_gets_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "deepspeed.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as refused:
        read_config(str(path))
    assert len(str(refused.value)) < 2000
