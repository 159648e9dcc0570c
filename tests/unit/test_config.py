"""A config is read once, refuses what it does not know, and says how to mend it in one line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from lwo_dist import cli
from lwo_dist.config import Config, LWOConfig, refusals
from lwo_dist.config.reading import load_config
from lwo_dist.errors import UserError
from lwo_dist.methods.base import Method
from lwo_dist.registry import METHODS
from lwo_dist.strategies.checks import check_config, refuse_settings_of_others

LAUNCH = Path(__file__).parents[2] / "launch"


def _write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def test_overrides_go_before_the_file_and_the_file_before_the_defaults(tmp_path: Path) -> None:
    path = _write(
        tmp_path, "method: full\nlwo: {lr: 3.0e-4, steps_per_layer: 7}\ntrain: {steps: 11}\n"
    )
    config = load_config(
        path,
        ["lwo.lr=1e-3", "cluster.resources_per_worker.CPU=2", "run_name=a-b.c", "eval.steps=5"],
    )
    assert (config.method, config.lwo.lr, config.lwo.steps_per_layer, config.train.steps) == (
        "full",
        1e-3,
        7,
        11,
    )
    assert config.cluster.resources_per_worker == {"CPU": 2}
    assert (config.run_name, config.eval.steps, config.seed) == ("a-b.c", 5, Config().seed)
    assert config.lwo.max_steps == 11
    assert load_config(path, ["lwo.max_steps=5"]).lwo.max_steps == 5


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("lwo.lr=1e-4", 1e-4),  # YAML 1.1 takes a number without a dot for text
        ("lwo.betas=[0.9, 0.95]", (0.9, 0.95)),
        ("data.extensions=[.py, .go]", (".py", ".go")),
        ("data.extensions=null", None),
        ("model.trust_remote_code=true", True),
        ("data.source=/a b/c=d", "/a b/c=d"),
    ],
)
def test_an_override_is_a_yaml_value(override: str, value: object) -> None:
    group, _, name = override.partition("=")[0].partition(".")
    assert getattr(getattr(load_config(None, [override]), group), name) == value


def test_patience_needs_evaluations() -> None:
    assert load_config(None, ["train.patience=3", "eval.steps=5"]).train.patience == 3
    with pytest.raises(UserError, match="train.patience = 3 needs evaluations .* set eval.steps"):
        load_config(None, ["train.patience=3"])


TEXTS = [
    ("run_name", "20261125"),
    ("run_name", "2024-11-25"),
    ("run_name", "2026-99-99"),
    ("run_name", "off"),
    ("run_name", "1_000"),
    ("model.name", "1e5"),
    ("model.revision", "1234567"),
    ("model.revision", "007"),
    ("tracking.experiment", "1"),
    ("tracking.experiment", "="),
    ("cluster.env.X", "1"),
    ("cluster.env.X", "on"),
    ("deepspeed", "12"),
]


@pytest.mark.parametrize(("key", "text"), TEXTS)
def test_where_text_is_meant_a_value_is_text_as_written(
    tmp_path: Path, key: str, text: str
) -> None:
    *groups, name = key.split(".")
    line = f"{name}: {text}"
    for group in reversed(groups):
        line = f"{group}: {{{line}}}"
    for config in (load_config(None, [f"{key}={text}"]), load_config(_write(tmp_path, line))):
        value: object = config
        for part in key.split("."):
            value = value[part] if isinstance(value, dict) else getattr(value, part)
        assert value == text


def test_texts_inside_of_lists_and_mappings_are_as_written_too() -> None:
    config = load_config(
        None, ["data.extensions=[1, .py, on]", "cluster.env={1: 2.50, off: 2024-11-25}"]
    )
    assert config.data.extensions == ("1", ".py", "on")
    assert config.cluster.env == {"1": "2.50", "off": "2024-11-25"}


@pytest.mark.parametrize(
    ("overrides", "steps", "epochs"),
    [
        ((), 300, None),
        (("train.steps=7",), 7, None),
        (("train.epochs=1.5",), 0, 1.5),
        (("train.epochs=2", "train.steps=0"), 0, 2.0),
        (("train.epochs=null", "train.steps=7"), 7, None),
    ],
)
def test_a_run_is_as_long_as_its_steps_or_its_epochs(
    tmp_path: Path, overrides: tuple[str, ...], steps: int, epochs: float | None
) -> None:
    config = load_config(None, overrides)
    assert (config.train.steps, config.train.epochs) == (steps, epochs)
    assert config.lwo.max_steps == (steps or None)
    assert load_config(_write(tmp_path, yaml.safe_dump(config.model_dump(mode="json")))) == config


def test_epochs_become_steps_and_the_length_of_the_schedule() -> None:
    config = load_config(None, ["train.epochs=2"]).with_steps(40)
    assert (config.train.steps, config.train.epochs, config.lwo.max_steps) == (40, None, 40)
    own = load_config(None, ["train.epochs=2", "lwo.max_steps=50"]).with_steps(40)
    assert own.lwo.max_steps == 50


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("train.epochs=2", "train.steps=10"),
            "train: steps = 10 and epochs = 2 both say how long the run is; drop one, or override"
            " it with train.steps=0 or train.epochs=null",
        ),
        (("train.steps=0",), "train: steps = 0 needs train.epochs; set train.steps or"),
        (("train.epochs=0",), "train.epochs = 0: must be greater than 0 (passes over the"),
    ],
)
def test_a_run_of_no_length_or_of_two_is_refused(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError) as error:
        load_config(None, overrides)
    assert str(error.value).startswith(message)


def test_null_unsets_a_text_and_numbers_stay_numbers() -> None:
    config = load_config(
        None, ["run_name=null", "tracking.uri=", "train.steps=1_000", "deepspeed={steps: 12}"]
    )
    assert config.run_name is None and config.tracking.uri is None
    assert config.train.steps == 1000
    assert config.deepspeed == {"steps": 12}
    with pytest.raises(UserError, match="tracking.experiment = None: must be a valid string"):
        load_config(None, ["tracking.experiment=null"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learning_rate=1e-4", "unknown key learning_rate; here it is lwo.lr"),
        ("train.learning_rate=1e-4", "unknown key train.learning_rate; here it is lwo.lr"),
        ("num_train_epochs=3", "unknown key num_train_epochs; here it is train.epochs"),
        ("bf16=true", "unknown key bf16; here it is train.precision=bf16"),
        (
            "per_device_train_batch_size=4",
            "unknown key per_device_train_batch_size; here it is train.global_batch_size,",
        ),
        ("max_steps=100", "unknown key max_steps; here it is train.steps"),
    ],
)
def test_a_name_of_hugging_face_is_answered_with_ours(override: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        load_config(None, [override])
    assert str(error.value).startswith(message)


def test_the_hints_for_hugging_faces_names_are_keys_of_the_config() -> None:
    for hint in refusals.HF_NAMES.values():
        for key in re.findall(r"\b\w+\.\w+\b", hint):
            assert key in refusals.all_keys(Config)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "lwo.steps_per_layr=3",
            "unknown key lwo.steps_per_layr; did you mean lwo.steps_per_layer?",
        ),
        ("lr=1e-4", "unknown key lr; did you mean lwo.lr?"),
        ("methud=lwo", "unknown key methud; did you mean method?"),
        ("cluster.workers=3", "unknown key cluster.workers; did you mean cluster.num_workers?"),
        ("clustr.num_workers=3", "unknown key clustr; did you mean cluster?"),
        ("train.lr=1e-4", "unknown key train.lr; did you mean lwo.lr?"),
        ("num_worker=3", "unknown key num_worker; did you mean cluster.num_workers?"),
        ("xyzzy=1", "unknown key xyzzy; known here: method, strategy, "),
        (
            "lwo.steps_per_layer=0",
            "lwo.steps_per_layer = 0: must be greater than or equal to 1 (optimizer steps that",
        ),
        ("lwo.steps_per_layer=many", "lwo.steps_per_layer = 'many': must be a valid integer"),
        ("train.steps=[1]", "train.steps = [1]: must be a valid integer"),
        ("lwo.lr=-1", "lwo.lr = -1: must be greater than 0"),
        ("lwo.lr=.nan", "lwo.lr = nan: must be"),
        ("lwo.lr=.inf", "lwo.lr = inf: must be"),
        ("lwo.betas=[0.9, 1.0]", "lwo: betas (0.9, 1.0) must lie in [0, 1)"),
        ("lwo.order=weighted", "lwo: order: weighted needs layer_weights"),
        (
            "lwo.inactive_master=discard",
            "lwo.inactive_master: discard has no effect where weights are stored in fp32",
        ),
        (
            "fsdp.storage=bf16",
            (
                "fsdp.storage: bf16 cannot be used with train.precision: auto; set train.precision:"
                " bf16"
            ),
        ),
        (
            "fsdp.storage=fp16",
            "fsdp.storage = 'fp16': must be 'fp32' or 'bf16' (strategy: fsdp only",
        ),
        (
            "lwo.state=drop",
            "lwo.state = 'drop': must be 'reset' or 'keep' (a layer's moments at a switch",
        ),
        (
            "strategy=ddp",
            "strategy: 'ddp' must be one of replicate, fsdp, deepspeed, or module:Class",
        ),
        ("run_name=../up", "run_name = '../up': "),
        ("lwo=3", "lwo = 3 must be a group of keys: lr, betas"),
        ("seed.more=3", "'seed.more=3': 'seed' is a value, not a group"),
        ("lwo.lr", "'lwo.lr' must read key=value"),
        ("=3", "'=3' must read key=value"),
        ("lwo.lr=[1", "'[1' is not a YAML value"),
    ],
)
def test_bad_input_is_refused_in_one_line(tmp_path: Path, override: str, message: str) -> None:
    path = _write(tmp_path, "seed: 1\n")
    with pytest.raises(UserError) as error:
        check_config(load_config(path, [override]))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_16_bit_storage_is_refused_where_it_cannot_be() -> None:
    bf16 = ["train.precision=bf16", "fsdp.storage=bf16"]
    check_config(load_config(None, [*bf16, "lwo.inactive_master=discard"]))
    zero = ["strategy=deepspeed", "train.precision=bf16", "lwo.inactive_master=discard"]
    check_config(load_config(None, zero))
    for override, message in [
        (
            "strategy=replicate",
            "fsdp.storage = bf16 has no effect with strategy: replicate; set strategy: fsdp",
        ),
        (
            "method=full",
            (
                "fsdp.storage: bf16 cannot be used with method: full; set method: lwo, or"
                " fsdp.storage: fp32"
            ),
        ),
    ]:
        with pytest.raises(UserError, match=f"^{message}"):
            check_config(load_config(None, [*bf16, override]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "is not YAML"),
        ("- a\n", "holds a list; it must be a mapping"),
        ("lwo:\n", "lwo = None must be a group of keys"),
        ("1: 2\n", "unknown key 1; known here: "),
        ("lwo: {1: 2}\n", "unknown key lwo.1; known here: "),
        ("lwo: {2024-01-01: 2}\n", "unknown key lwo.2024-01-01; "),
    ],
)
def test_a_bad_file_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match="^[^\n]*$") as error:
        load_config(_write(tmp_path, text))
    assert message in str(error.value)


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for name, message in [
        ("none.yaml", "No such file"),
        (".", "Is a directory"),
        ("binary.yaml", "is not YAML"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            load_config(tmp_path / name)
        assert str(tmp_path) in str(error.value)


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert load_config(_write(tmp_path, "# nothing\n")) == load_config()


def test_a_config_can_be_written_and_read_again(tmp_path: Path) -> None:
    config = load_config(
        None, ["lwo.order=weighted", "lwo.layer_weights={head: 2.0}", "data.extensions=[.py]"]
    )
    assert load_config(_write(tmp_path, yaml.safe_dump(config.model_dump(mode="json")))) == config


def test_a_config_does_not_change() -> None:
    with pytest.raises(ValidationError):
        load_config().lwo.lr = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0}, "lr = 0: must be greater than 0 (peak learning rate of AdamW; unset:"),
        ({"steps_per_layr": 3}, "unknown key steps_per_layr; did you mean steps_per_layer?"),
        ({"learning_rate": 1e-4}, "unknown key learning_rate; here it is lr"),
        ({"bf16": True}, "unknown key bf16; known here: lr, betas, eps,"),
        ({"output_dir": "x"}, "unknown key output_dir; known here: lr, betas, eps,"),
        ({"order": "weighted"}, "order: weighted needs layer_weights"),
        ({"layer_weights": {"head": "x"}}, "layer_weights.head = 'x': must be a valid number"),
    ],
)
def test_settings_in_code_are_refused_in_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        LWOConfig(**settings)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_a_group_in_code_is_refused_with_its_path() -> None:
    with pytest.raises(UserError, match=r"^lwo\.lr = -1: must be greater than 0"):
        Config(lwo={"lr": -1})  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"^unknown key lwo\.lrr; did you mean lwo\.lr\?"):
        Config(lwo={"lrr": 1})  # type: ignore[arg-type]


def test_every_field_says_what_it_is() -> None:
    def undescribed(model: type[BaseModel]) -> list[str]:
        names = []
        for name, field in model.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                names += undescribed(field.annotation)
            elif not field.description:
                names.append(f"{model.__name__}.{name}")
        return names

    assert undescribed(Config) == []


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("configs/*.yaml")), ids=lambda path: path.name)
def test_the_shipped_configs_are_valid(path: Path) -> None:
    check_config(load_config(path))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (10, "ascending", "reset", "visit", "all")),
        ({"stateless": "all"}, (1, "random", "keep", "always", "batch")),
        ({"stateless": "suffix", "steps_per_layer": 5}, (5, "random", "keep", "always", "batch")),
        ({"stateless": "all", "embeddings": "visit"}, (1, "random", "keep", "visit", "batch")),
        ({"stateless": "all", "train_head": False}, (1, "random", "keep", "visit", "all")),
    ],
)
def test_stateless_brings_its_defaults_along(
    given: dict[str, Any], expected: tuple[int, str, str, str, str]
) -> None:
    found = LWOConfig(**given)
    schedule = (found.steps_per_layer, found.order, found.state)
    assert (*schedule, found.embeddings, found.head_rows) == expected


class ReadsStateless(Method):
    """A method of one's own that reads one setting of `lwo` and not those that depend on it."""

    name = "reads_stateless"
    own_settings = ("lwo.stateless",)

    def layers(self, model: Any, config: LWOConfig) -> list[Any]:
        raise AssertionError("a refusal needs no layers")


def test_only_settings_that_were_given_are_refused_as_another_methods() -> None:
    def refuse(**lwo: Any) -> None:
        refuse_settings_of_others(Config(lwo=LWOConfig(**lwo)), "method", ReadsStateless(), METHODS)

    refuse(stateless="all")
    with pytest.raises(UserError, match=r"lwo\.embeddings = always has no effect with method"):
        refuse(stateless="all", embeddings="always")


@pytest.mark.parametrize("unusual", ["steps_per_layer=10", "order=ascending", "head_rows=batch"])
def test_printed_settings_read_back_as_they_were(
    unusual: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["lwo.stateless=all", "lwo.train_head=false", f"lwo.{unusual}"]
    text = printed(capsys, *overrides)
    assert load_config(_write(tmp_path, text)).lwo == load_config(None, overrides).lwo


def test_keeping_moments_needs_a_switch() -> None:
    with pytest.raises(
        UserError, match="lwo.state: keep has no effect with method: full, which never switches"
    ):
        check_config(load_config(None, ["method=full", "lwo.state=keep"]))


# ---- hostile configs

LAUGHS = "a0: &a0 [x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"deepspeed:\n  laughs: {'[' * 5000}", "nested more than 20 levels deep"),
        ("deepspeed:\n" + "".join(f"  {' ' * n}a:\n" for n in range(30)), "more than 20 levels"),
        (LAUGHS, r"has the alias \*a0; write the value out instead"),
        ("deepspeed: &a\n  b: *a\n", r"has the alias \*a"),
        ("a: &a {b: 1}\ndeepspeed:\n  <<: [*a, *a]\n", r"has the alias \*a"),
        ("deepspeed:\n" + "".join(f"  k{n}: 1\n" for n in range(9000)), "more than 10000 values"),
        ("# " + "x" * 2**20, "is larger than 1048576 bytes"),
        ("seed: 2026-99-99", "is not YAML"),
        (f"seed: {'9' * 5000}", "is not YAML"),
        ("seed: !!int ''", "is not YAML"),
        ("seed: !!python/object/apply:os.system ['true']", "is not YAML"),
        (f"{'k' * 1000}: 1", "unknown key k"),
        (f"run_name: [{', '.join(['x'] * 5000)}]", "run_name"),
    ],
)
def test_a_hostile_config_gets_one_short_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as refused:
        load_config(path)
    assert len(str(refused.value)) < 2000 and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("deepspeed=" + "[" * 5000, "nested more than 20 levels deep"),
        ("deepspeed={a: &a [1], b: *a}", "has the alias"),
        ("deepspeed." + "a." * 5000 + "a=1", "has more than 20 groups"),
        ("seed=2026-99-99", "is not a YAML value"),
    ],
)
def test_a_hostile_override_gets_one_short_line(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        load_config(None, [override])
    assert len(str(refused.value)) < 2000


# ---- lwo-dist config


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["config", *arguments]) == 0
    return capsys.readouterr().out


def test_the_defaults_are_printed_as_a_file_that_is_the_defaults(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = printed(capsys, "--defaults")
    assert load_config(_write(tmp_path, text)) == load_config()
    lines = [line.strip() for line in text.splitlines()]
    shown = " ".join(line.removeprefix("# ") for line in lines if line.startswith("#"))
    for key in refusals.all_keys(Config):
        own = f"{key.rpartition('.')[2]}: "
        assert any(line.removeprefix("# ").startswith(own) for line in lines), key
    for group in [Config, LWOConfig]:
        for field in group.model_fields.values():
            assert field.description is None or field.description in shown
    assert max(map(len, text.splitlines())) <= 100
    # What depends on another setting follows when the file is given another value of that.
    assert load_config(_write(tmp_path, text), ["train.steps=7"]).lwo.max_steps == 7
    assert load_config(_write(tmp_path, text), ["lwo.stateless=all"]).lwo.order == "random"


def test_the_settings_of_a_run_are_printed_as_they_are_resolved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = _write(tmp_path, "train: {epochs: 2}\nlwo: {lr: 3.0e-4, betas: [0.9, 0.95]}\n")
    overrides = ["run_name=20261125", "cluster.env={A: off, HF_TOKEN: x}", "data.extensions=[.py]"]
    text = printed(capsys, "-c", str(file), *overrides)
    again = load_config(_write(tmp_path, text))
    assert again.train.epochs == 2 and again.lwo.betas == (0.9, 0.95)
    assert again.run_name == "20261125" and again.data.extensions == (".py",)
    assert again.cluster.env == {"A": "off", "HF_TOKEN": "***"}  # no secrets


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--defaults", "seed=1"], "--defaults shows what holds without a file; leave -c and"),
        (["lwo.learning=1"], "unknown key lwo.learning"),
        (["method=full", "lwo.state=keep"], "lwo.state: keep has no effect with method: full"),
    ],
)
def test_config_refuses_what_a_run_would(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert cli.main(["config", *arguments]) == 2
    assert message in capsys.readouterr().err
