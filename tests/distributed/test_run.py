"""`run` on real ranks: checkpoints, resume, what a run leaves behind."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
import shutil
import socket
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BloomConfig, BloomForCausalLM

import lwo_dist
from lwo_dist import distributed
from lwo_dist.callback import Callback
from lwo_dist.config import Config
from lwo_dist.config.reading import load_config
from lwo_dist.driver import prepare
from lwo_dist.errors import UserError
from lwo_dist.run import _with_precision, run
from lwo_dist.run_info import RunInfo
from lwo_dist.spool import SPOOL_NAME, points_of, read_spool
from tests.models import save_tiny_model
from tests.ranks import RanksError, run_ranks

STEPS = 14


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model folder and a source folder."""
    folder = tmp_path_factory.mktemp("inputs")
    source = folder / "source"
    source.mkdir()
    for i in range(12):
        body = "\n".join(f"    total_{i} = total_{i} + values[{j}]  # line {j}" for j in range(20))
        (source / f"module_{i}.py").write_text(
            f"def function_{i}(values):\n    total_{i} = 0\n{body}\n"
        )
    save_tiny_model(folder / "model", [path.read_text() for path in source.iterdir()])
    return folder / "model", source


def make_config(inputs: tuple[Path, Path], storage: Path, *overrides: str) -> Config:
    model, source = inputs
    return load_config(
        None,
        [
            f"model.name={model}",
            f"data.source={source}",
            f"storage={storage}",
            "run_name=r",
            f"train.steps={STEPS}",
            "train.global_batch_size=8",
            "train.sequence_length=48",
            "train.logging_steps=2",
            "lwo.steps_per_layer=3",
            "lwo.lr=1e-3",
            "lwo.lr_scheduler_type=cosine",
            "lwo.seed=3",
            "lwo.order=random",
            "eval.num_lines=12",
            "eval.max_new_tokens=8",
            "tracking.enabled=false",
            "cluster.num_workers=2",
            *overrides,
        ],
    )


class Losses(Callback):
    def __init__(self) -> None:
        self.losses: list[tuple[int, float]] = []

    def on_metrics(self, step: int, metrics: dict) -> None:  # type: ignore[override]
        self.losses.append((step, metrics["train/loss"]))


def run_and_record(config: Config) -> tuple[dict | None, list]:
    recorder = Losses()
    return run(config, [recorder]), recorder.losses


def exported(summary: dict) -> dict[str, torch.Tensor]:
    return load_file(Path(summary["export"]) / "model.safetensors")


@pytest.mark.parametrize("strategy", ["fsdp", "replicate"])
def test_a_run_leaves_a_model_that_loads_and_a_summary(
    strategy: str, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    config = prepare(make_config(inputs, tmp_path, f"strategy={strategy}", "eval.steps=6"))
    summary, _ = run_ranks(run_and_record, 2, config)[0]
    assert summary == json.loads((tmp_path / "r" / "summary.json").read_text())
    assert summary["loss_last"] < summary["loss_first"] and summary["skipped_steps"] == 0
    assert summary["eval"]["before"]["eval/loss"] > summary["eval"]["after"]["eval/loss"]
    assert summary["eval"]["gain_95"]["loss"]["low"] > 0
    model = AutoModelForCausalLM.from_pretrained(summary["export"])
    tokenizer = AutoTokenizer.from_pretrained(summary["export"])
    prompt = tokenizer("def function_3(values):\n", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=4).shape[1] == prompt.input_ids.shape[1] + 4
    # The last and the best checkpoint are kept, with the layer files that they name and no others.
    kept = sorted((tmp_path / "r" / "checkpoints").iterdir())
    assert {folder.name for folder in kept} == {
        "step_000014",
        f"step_{summary['eval']['best_step']:06d}",
    }
    named = {
        (folder / reference).resolve()
        for folder in kept
        for reference in json.loads((folder / "model.safetensors.index.json").read_text())[
            "weight_map"
        ].values()
    }
    assert {path.resolve() for path in (tmp_path / "r" / "layers").iterdir()} == named
    # A checkpoint loads as it stands, without an export.
    direct = AutoModelForCausalLM.from_pretrained(kept[-1])
    assert (
        all(torch.equal(direct.state_dict()[n], p) for n, p in model.state_dict().items())
        or len(kept) == 2
    )


def test_epochs_are_the_steps_that_the_data_makes_of_them(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    epochs = ("train.steps=0", "train.epochs=1.5")
    config = prepare(make_config(inputs, tmp_path / "epochs", *epochs))
    (summary, losses), _ = run_ranks(run_and_record, 2, config)
    state = read_state(tmp_path / "epochs" / "r")
    sequences = state["run"]["data"]["windows"]
    steps = math.ceil(1.5 * sequences / 8)
    assert summary["steps"] == state["run"]["train"]["steps"] == steps != config.train.steps
    assert state["run"]["lwo"]["max_steps"] == steps
    # The cosine ends with the run: the same losses as those of a run of so many steps.
    same = prepare(make_config(inputs, tmp_path / "steps", f"train.steps={steps}"))
    assert run_ranks(run_and_record, 2, same)[0][1] == losses
    # With 32-bit arithmetic, which is what a CPU has.
    assert config.train.precision == "auto" and state["run"]["train"]["precision"] == "fp32"


def test_a_packed_run_says_how_much_is_padding(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    packed = ("strategy=fsdp", "train.packing=true", "train.steps=3", "train.sequence_length=240")
    config = prepare(make_config(inputs, tmp_path, *packed))
    (summary, _), _ = run_ranks(run_and_record, 2, config)
    data = read_state(tmp_path / "r")["run"]["data"]
    assert summary["loss_last"] < summary["loss_first"]
    assert data["packed_rows"] < data["windows"]
    assert data["padding_tokens"] < data["padding_tokens_unpacked"]


def test_packing_of_a_model_that_would_mix_examples(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(inputs[0])
    tokenizer.save_pretrained(tmp_path / "bloom")
    bloom = BloomConfig(vocab_size=len(tokenizer), hidden_size=16, n_layer=2, n_head=2)
    BloomForCausalLM(bloom).save_pretrained(tmp_path / "bloom")
    config = make_config((tmp_path / "bloom", inputs[1]), tmp_path / "runs", "train.packing=true")
    with pytest.raises(RanksError, match="BloomForCausalLM does not keep the examples"):
        run_ranks(run_and_record, 1, prepare(config))
    assert not list((tmp_path / "runs" / "r").glob("checkpoints/*"))


def save_own_code(model: Path, folder: Path) -> None:
    """A model and a tokenizer whose classes lie beside them."""
    shutil.copytree(model, folder)
    (folder / "own_config.py").write_text(
        "from transformers import Qwen2Config\n"
        "class OwnConfig(Qwen2Config):\n    model_type = 'own'\n"
    )
    (folder / "own_model.py").write_text(
        "from transformers import Qwen2ForCausalLM\nfrom .own_config import OwnConfig\n"
        "class OwnModel(Qwen2ForCausalLM):\n    config_class = OwnConfig\n"
    )
    (folder / "own_tokenizer.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n"
        "class OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    models = {"AutoConfig": "own_config.OwnConfig", "AutoModelForCausalLM": "own_model.OwnModel"}
    config = {"model_type": "own", "architectures": ["OwnModel"], "auto_map": models}
    tokenizer = {
        "tokenizer_class": "OwnTokenizer",
        "auto_map": {"AutoTokenizer": [None, "own_tokenizer.OwnTokenizer"]},
    }
    for name, values in (("config.json", config), ("tokenizer_config.json", tokenizer)):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_model_with_code_of_its_own_is_saved_resumed_and_exported_with_it(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    save_own_code(inputs[0], tmp_path / "own")
    trusted = ("model.trust_remote_code=true", "checkpoint.steps=2", "train.steps=4")
    inputs = (tmp_path / "own", inputs[1])
    config = prepare(make_config(inputs, tmp_path / "runs", *trusted))
    with pytest.raises(RanksError, match="stopped by the test"):
        run_ranks(stop_after, 1, config, 2)
    again = prepare(make_config(inputs, tmp_path / "runs", *trusted))
    summary, losses = run_ranks(run_and_record, 1, again)[0]
    assert losses[0][0] == 4
    shutil.rmtree(tmp_path / "own")
    found = run_ranks(classes_of, 1, summary["export"])
    assert found == [("OwnModel", "OwnTokenizer")]


def classes_of(folder: str) -> tuple[str, str]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    return type(model).__name__, type(tokenizer).__name__


def read_state(run_dir: Path) -> dict:
    folder = max((run_dir / "checkpoints").iterdir())
    state: dict = json.loads((folder / "state.json").read_text())
    return state


def bf16_on(ranks: list[int], device: str) -> bool:
    native = distributed.rank() in ranks
    with patch("torch.cuda.is_bf16_supported", lambda including_emulation: native):
        return distributed.every_rank_computes_bf16(torch.device(device))


@pytest.mark.parametrize(
    ("ranks", "device", "expected"),
    [([0, 1], "cuda", True), ([0], "cuda", False), ([1], "cuda", False), ([0, 1], "cpu", False)],
)
def test_auto_is_bf16_only_where_all_ranks_have_it(
    ranks: list[int], device: str, expected: bool
) -> None:
    assert run_ranks(bf16_on, 2, ranks, device) == [expected, expected]


@pytest.mark.parametrize(("native", "precision"), [(True, "bf16"), (False, "fp32")])
def test_the_precision_that_auto_becomes_is_the_runs(native: bool, precision: str) -> None:
    with patch("lwo_dist.distributed.every_rank_computes_bf16", lambda device: native):
        config = _with_precision(load_config(), torch.device("cpu"))
        assert config.train.precision == precision
        asked = load_config(None, ["train.precision=fp32"])
        assert _with_precision(asked, torch.device("cpu")).train.precision == "fp32"


@pytest.mark.parametrize("shown", [True, False])
def test_evaluations_hold_source_lines_where_they_may(
    inputs: tuple[Path, Path], tmp_path: Path, shown: bool
) -> None:
    setting = f"tracking.log_completions={str(shown).lower()}"
    run_ranks(run_and_record, 1, prepare(make_config(inputs, tmp_path, setting, "train.steps=3")))
    files = list((tmp_path / "r" / "evaluations").iterdir())
    assert files and all(bool(json.loads(file.read_text())["samples"]) == shown for file in files)


def test_the_mlflow_run_has_the_metrics_the_config_and_the_picture(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    from mlflow import MlflowClient

    config = prepare(
        make_config(inputs, tmp_path, "tracking.enabled=true", "tracking.experiment=e")
    )
    summary, _ = run_ranks(run_and_record, 2, config)[0]
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    [experiment] = client.search_experiments(filter_string="name = 'e'")
    [found] = client.search_runs([experiment.experiment_id])
    assert found.info.run_id == summary["mlflow_run_id"] and found.info.status == "FINISHED"
    names = """eval/loss eval/exact_match eval/edit_similarity eval/bleu eval/loss_per_byte
        train/loss
        train/tokens_per_second update/learning_rate update/grad_norm visit/layer
        visit/loss_drop visit/change_norm system/peak_memory_GB system/optimizer_state_GB
        system/training_seconds system/training_tokens"""
    nodes = {name for name in found.data.metrics if name.count("/") == 2}  # of system/HOST/
    assert set(found.data.metrics) - nodes == set(names.split())
    assert found.data.metrics["system/peak_memory_GB"] < 100
    assert [point.step for point in client.get_metric_history(found.info.run_id, "train/loss")] == [
        *range(2, 15, 2)
    ]
    assert found.data.metrics["eval/loss"] == pytest.approx(summary["eval"]["after"]["eval/loss"])
    assert found.data.params["lwo.steps_per_layer"] == "3" and found.data.tags["strategy"] == "fsdp"
    page = (Path(lwo_dist.__file__).parent / "tracking" / "README.md").read_text()
    records = read_spool(tmp_path / "r" / SPOOL_NAME)
    spooled = {point.name for record in records for point in points_of(record)}
    assert {"memory/ranks/peak_bytes_1", "run/attempt", "lwo/cycle"} <= spooled
    for name in {*found.data.metrics, *spooled}:
        host = name.startswith("system/") and name.count("/") == 2
        said = "system/HOST/" if host else f"`{re.sub('_[0-9]+$', '_N', name)}`"
        assert said in page, name
    assert [p.step for p in client.get_metric_history(found.info.run_id, "visit/loss_drop")] == [
        3,
        6,
        9,
        12,
    ]
    folders = ("", "pictures", "tables")
    files = {
        item.path for folder in folders for item in client.list_artifacts(found.info.run_id, folder)
    }
    pictures = {
        f"pictures/{name}.png" for name in ("loss_by_layer", "memory", "layers_by_loss_drop")
    }
    assert {
        "config.yaml",
        "report.html",
        "tables/scores.json",
        "tables/completions.json",
        *pictures,
    } <= files
    [output] = found.outputs.model_outputs
    assert client.get_logged_model(output.model_id).status == "READY"


def test_no_file_of_a_run_holds_a_password(
    inputs: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ada")
    for name in ("MLFLOW_TRACKING_PASSWORD", "HF_TOKEN"):
        monkeypatch.setenv(name, f"hunter2-of-{name}")
    with (
        socket.socket() as taken
    ):  # nobody listens: all that is said of the server's address is said
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://ada:hunter2-of-uri@{address}")
        settings = (
            "tracking.enabled=true",
            "tracking.flush_timeout_s=1",
            "cluster.env={API_KEY: hunter2-of-env}",
        )
        config = prepare(make_config(inputs, tmp_path, "train.steps=4", *settings))
        run_ranks(run_and_record, 2, config)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {"metrics.jsonl", "report.html", "run.json", "config.yaml", "memory.png"} <= {
        path.name for path in files
    }
    assert address in caplog.text and address.encode() in files[tmp_path / "r" / "metrics.jsonl"]
    assert [path for path, content in files.items() if b"hunter2" in content] == []
    assert "hunter2" not in caplog.text


def stop_after(config: Config, steps: int) -> None:
    """Ends in the middle of a visit, as a killed run does: by no clean way out."""

    class Stop(Callback):
        def on_checkpoint(self, step: int, folder: Path) -> None:
            if step == steps:
                raise InterruptedError("stopped by the test")

    run(config, [Stop()])


@pytest.mark.parametrize(
    ("first", "first_ranks", "then", "then_ranks"),
    [
        ("fsdp", 2, "fsdp", 2),
        ("replicate", 2, "replicate", 2),
        ("fsdp", 2, "replicate", 1),
        ("replicate", 1, "fsdp", 4),
    ],
)
def test_a_resumed_run_follows_the_unbroken_one(
    first: str,
    first_ranks: int,
    then: str,
    then_ranks: int,
    inputs: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    same = (first, first_ranks) == (then, then_ranks)
    settings = ("checkpoint.steps=5", "lwo.eps=1e-6")
    unbroken = prepare(make_config(inputs, tmp_path / "a", f"strategy={first}", *settings))
    summary, losses = run_ranks(run_and_record, first_ranks, unbroken)[0]

    broken = prepare(make_config(inputs, tmp_path / "b", f"strategy={first}", *settings))
    with pytest.raises(RanksError, match="stopped by the test"):
        run_ranks(stop_after, first_ranks, broken, 5)  # 5 = in the middle of the second visit
    again = prepare(make_config(inputs, tmp_path / "b", f"strategy={then}", *settings))
    resumed, resumed_losses = run_ranks(run_and_record, then_ranks, again)[0]

    expected, found = exported(summary), exported(resumed)
    assert resumed_losses[-1][0] == STEPS and resumed_losses[0][0] == 6
    if same:
        assert all(torch.equal(expected[name], found[name]) for name in expected)
        assert resumed_losses[1:] == losses[3:]
    for (_, loss), (_, other) in zip(losses[3:], resumed_losses[1:], strict=True):
        assert abs(loss - other) < 1e-5
    for name in expected:
        assert (expected[name] - found[name]).abs().max() < 3e-5, name


def test_a_resumed_run_without_a_rate_keeps_that_of_its_checkpoint(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    def config(storage: str, rate: str) -> Config:
        settings = ("checkpoint.steps=5", f"lwo.lr={rate}")
        return prepare(make_config(inputs, tmp_path / storage, *settings))

    summary, _ = run_ranks(run_and_record, 1, config("a", "2e-3"))[0]
    with pytest.raises(RanksError, match="stopped by the test"):
        run_ranks(stop_after, 1, config("b", "2e-3"), 5)
    resumed, _ = run_ranks(run_and_record, 1, config("b", "null"))[0]
    assert summary["learning_rate"] == resumed["learning_rate"] == 2e-3
    expected, found = exported(summary), exported(resumed)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_run_that_ended_early_is_not_trained_again(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    """No line is ever right, so the first evaluation is the best."""
    settings = ("eval.metric=exact_match", "eval.steps=2", "train.patience=2")
    for goes_on in (True, False):
        config = prepare(make_config(inputs, tmp_path, *settings))
        summary, losses = run_ranks(run_and_record, 2, config)[0]
        assert summary is not None and bool(losses) == goes_on
        assert summary["steps"] == 6 and summary["eval"]["best_step"] == 2
        assert summary["ended_early"] == (
            "no better exact match in 2 evaluations after step 2 (train.patience = 2)"
        )
        assert [point["step"] for point in summary["eval"]["curve"]] == [0, 2, 4, 6]


def test_a_finished_run_is_not_trained_again(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    config = prepare(make_config(inputs, tmp_path))
    first, _ = run_ranks(run_and_record, 2, config)[0]
    second, losses = run_ranks(run_and_record, 2, prepare(make_config(inputs, tmp_path)))[0]
    assert losses == []
    other = {
        "peak_memory_bytes": 0,
        "checkpoint_blocked_seconds": 0,
    }  # of the process; the last save's own share
    assert {**second, **other} == {**first, **other}
    with pytest.raises(
        UserError, match="holds a run and checkpoint.resume is never; choose another run_name"
    ):
        prepare(make_config(inputs, tmp_path, "checkpoint.resume=never"))


def test_a_damaged_file_is_found_and_the_checkpoint_before_is_used(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    settings = ("checkpoint.steps=5", "eval.steps=4", "eval.metric=loss")
    config = prepare(make_config(inputs, tmp_path, *settings))
    with pytest.raises(RanksError, match="stopped by the test"):
        run_ranks(stop_after, 2, config, 10)
    checkpoints = sorted((tmp_path / "r" / "checkpoints").iterdir())
    assert len(checkpoints) == 2
    damaged = checkpoints[-1] / "active.safetensors"
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(RanksError, match="starts at step 8"):
        run_ranks(say_start, 2, config)


def say_start(config: Config) -> None:
    class Start(Callback):
        def on_run_start(self, info: RunInfo) -> None:
            raise InterruptedError(f"starts at step {info.start_step}")

    run(config, [Start()])


def test_another_data_set_under_the_same_run_name_is_refused(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    run_ranks(run_and_record, 2, prepare(make_config(inputs, tmp_path)))
    other = prepare(make_config(inputs, tmp_path, "train.global_batch_size=4"))
    with pytest.raises(
        RanksError, match="global_batch_size changed from 8 to 4; choose another run_name"
    ):
        run_ranks(run_and_record, 2, other)


def printed(config: Config) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        run(config)
    return out.getvalue()


def test_rank_0_alone_prints_and_names_the_layers_left_out(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    config = prepare(make_config(inputs, tmp_path, "train.steps=4", "lwo.order=ascending"))
    main, other = run_ranks(printed, 2, config)
    assert "warning: 4 steps never train layer_1, layer_2; one cycle takes 12 steps" in main
    assert [line.split("  ")[0] for line in main.splitlines() if line.startswith("step ")] == [
        "step 2/4",
        "step 4/4",
    ]
    assert other == ""


def test_prepare_refuses_what_cannot_work_and_leaves_nothing(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    storage = tmp_path / "new" / "storage"
    for overrides, message in [
        (("train.global_batch_size=7",), r"train.global_batch_size = 7 must be divisible by 2"),
        ((f"data.source={tmp_path / 'nowhere'}",), "nowhere"),
        (("data.source=null",), "data.source is not set"),
    ]:
        with pytest.raises(UserError, match=message):
            prepare(make_config(inputs, storage, *overrides))
        assert not storage.parent.exists()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"storage = .*: Not a directory; give a writable folder"):
        prepare(make_config(inputs, tmp_path / "file" / "runs"))
