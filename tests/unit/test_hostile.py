"""Hostile runs, buckets and configs: no command trusts them.

Whatever they contain, a command succeeds or fails in one line, reads and writes nothing outside the
run's folder, and runs no code that comes with it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pyarrow.fs import FileType
from safetensors.torch import save_file

from lwo_dist import storage
from lwo_dist.checkpoint.format import newest_checkpoint, seal
from lwo_dist.checkpoint.resume import find_checkpoint, refuse_other_run
from lwo_dist.checkpoint.schema import INDEX, MOMENTS, STATE, check_record
from lwo_dist.cli import main
from lwo_dist.config import Config, ModelConfig
from lwo_dist.config.reading import load_config
from lwo_dist.errors import DamagedError, UserError, first_line
from lwo_dist.models import hub
from lwo_dist.models.source import PretrainedSource, load_tokenizer
from lwo_dist.run import _read_record
from lwo_dist.storage import RunFolder
from lwo_dist.tasks.scores import Score
from lwo_dist.tracking.sender import reason

RUN = Path(__file__).parents[1] / "data" / "round1" / "run"
STEP = "checkpoints/step_000011"
SECRET = b"a secret of this machine"
ESCAPE = "\x1b[2J\x1b]0;owned\x07"


class Case:
    """A copy of a valid run, and files beside it that no command may touch."""

    def __init__(self, folder: Path) -> None:
        self.run = folder / "runs" / "r"
        self.outside = folder / "outside"
        shutil.copytree(RUN, self.run)
        self.outside.mkdir()
        (self.outside / "secret").write_bytes(SECRET)
        (self.outside / "secret.json").write_bytes(b"{}")
        save_file({"secret": torch.ones(2)}, self.outside / "secret.safetensors")
        self.step = self.run / STEP
        self._before = self._contents()

    def state(self) -> dict[str, Any]:
        values: dict[str, Any] = json.loads((self.step / STATE).read_text())
        del values["digest"]
        return values

    def reseal(self, state: dict[str, Any]) -> None:
        """Anybody can recompute it: the digest has no key."""
        (self.step / STATE).write_bytes(seal(state))

    def put(self, name: str, data: bytes) -> None:
        """Add a file to the checkpoint, and its sha256 to state.json."""
        (self.step / name).write_bytes(data)
        state = self.state()
        state["sha256"][name] = hashlib.sha256(data).hexdigest()
        self.reseal(state)

    def put_json(self, name: str, change: Callable[[Any], Any]) -> None:
        values = json.loads((self.step / name).read_text())
        self.put(name, json.dumps(change(values) or values).encode())

    def check(self) -> None:
        assert self._contents() == self._before
        assert sorted(path.name for path in self.run.parents[1].iterdir()) == ["outside", "runs"]
        assert not MARKER.exists()

    def _contents(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.outside.iterdir()}


MARKER = Path(tempfile.gettempdir()) / f"lwo-dist-hostile-{os.getpid()}"
CODE = f"open({str(MARKER)!r}, 'w').close()\n".encode()


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("offline")

    monkeypatch.setattr(hub, "hf_hub_download", refuse)


@pytest.fixture
def case(tmp_path: Path) -> Iterator[Case]:
    made = Case(tmp_path)
    yield made
    MARKER.unlink(missing_ok=True)


def commands(run: str, target: Path) -> list[list[str]]:
    return [
        ["checkpoints", "list", run],
        ["checkpoints", "verify", run],
        ["export", run, "--to", str(target), "--overwrite"],
        ["checkpoints", "prune", run],
    ]


def resume(run: RunFolder) -> None:
    """Read what a resume reads before it builds the model."""
    run.fetch_small()
    checkpoint = find_checkpoint(Config(), run)
    if checkpoint is not None:
        check_record(checkpoint.state, "run", "data", "results")
        checkpoint.hook_state()
        for _ in checkpoint.parked_moments():
            pass
        for tensors in checkpoint.weights():
            assert "secret" not in tensors


def try_all(run: str, target: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Run every command, and resume. Each must succeed or fail in one line. Returns the output."""
    said = []
    for command in commands(run, target):
        code = main(command)
        out, err = capsys.readouterr()
        assert (code, err.count("\n")) in ((0, 0), (2, 1)), err
        said += [*out.splitlines(), err.removesuffix("\n")]
    refusal = []
    try:
        resume(RunFolder.at(run))
    except UserError as error:
        refusal = [" ".join(str(error).split())]  # `main` makes it printable
    said += capsys.readouterr().out.splitlines()
    assert all(line.isprintable() for line in said)
    assert all(len(line) < 3000 for line in said + refusal)
    return said + refusal


# ---- names


@pytest.mark.parametrize(
    "name",
    [
        "../../../../outside/secret",
        "../../layers/../../../outside/secret.safetensors",
        "../../../r/layers/x.safetensors",
        "/etc/hostname",
        "..",
        ".",
        "",
        ".hidden.json",
        "deep/config.json",
        "../../layers/embed.bin",
        "../step_000012/config.json",
        "pytorch_model.bin",
        "adapter_config.json",
        STATE,
        "a\\b",
        f"{ESCAPE}.json",
        "\u202egpj.exe.json",
        "\udc80.json",
        "x" * 300,
    ],
)
def test_an_invalid_file_name_is_refused(
    case: Case, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    state = case.state()
    state["sha256"][name] = hashlib.sha256(SECRET).hexdigest()
    case.reseal(state)
    said = try_all(str(case.run), case.run.parent / "out", capsys)
    refused = "is not a checkpoint file|sha256.*: Input should be a valid string"
    assert sum(re.search(refused, line) is not None for line in said) >= 4
    case.check()
    with pytest.raises(UserError, match=refused):
        newest_checkpoint(RunFolder.at(str(case.run)))


@pytest.mark.parametrize(
    "name", ["../../../../outside/secret.safetensors", "/etc/hostname", "config.json", "..", 7]
)
def test_an_invalid_name_in_the_index_or_the_moments_is_refused(
    case: Case, name: Any, tmp_path: Path
) -> None:
    def lead_away(index: Any) -> None:
        index["weight_map"] |= dict.fromkeys(list(index["weight_map"])[:1], name)

    case.put_json(INDEX, lead_away)
    with pytest.raises(UserError, match="the index (names|is malformed)"):
        newest_checkpoint(RunFolder.at(str(case.run)))
    other = Case(tmp_path / "other")
    state = other.state()
    state["moments"]["embed"] = name if name != "config.json" else "../../layers/none.safetensors"
    other.reseal(state)
    with pytest.raises(UserError, match="no sha256 of the moments|moments.embed"):
        newest_checkpoint(RunFolder.at(str(other.run)))


def test_a_file_not_listed_in_state_json_is_not_loaded(case: Case) -> None:
    (case.step / "adapter_config.json").write_text('{"base_model_name_or_path": "/elsewhere"}')
    with pytest.raises(UserError, match="adapter_config.json is not listed in state.json"):
        newest_checkpoint(RunFolder.at(str(case.run)))


# ---- symlinks


@pytest.mark.parametrize(
    "name",
    [
        "layers",
        "checkpoints",
        STEP,
        f"{STEP}/config.json",
        f"{STEP}/{STATE}",
        f"{STEP}/stray.json",
        "layers/stray.safetensors",
        "model",
        "metrics.jsonl",
        "evaluations",
    ],
)
def test_no_symlink_is_followed(case: Case, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    link = case.run / name
    moved = case.outside / f"moved-{link.name}"
    if link.exists():
        shutil.move(link, moved)
    else:
        shutil.copyfile(case.outside / "secret", moved)
    link.symlink_to(moved)
    files = {path: path.read_bytes() for path in case.outside.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="link"):
        find_checkpoint(Config(), RunFolder.at(str(case.run)))
    try_all(str(case.run), case.run.parent / "out", capsys)
    main(["export", str(case.run), "--to", str(case.run / "model"), "--overwrite"])
    capsys.readouterr()
    assert files == {path: path.read_bytes() for path in case.outside.rglob("*") if path.is_file()}
    exported = case.run.parent / "out"
    assert SECRET not in [path.read_bytes() for path in exported.rglob("*") if path.is_file()]


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_pipes_and_folders_are_not_read(case: Case, make: Callable[[Path], None]) -> None:
    (case.step / "tokenizer.json").unlink()
    make(case.step / "tokenizer.json")
    with (
        time_limit(20),
        pytest.raises(UserError, match="tokenizer.json is not a regular file"),
    ):
        newest_checkpoint(RunFolder.at(str(case.run)))


# ---- trust


def add_code(case: Case, code_in: str = "modeling_mine.Mine") -> None:
    """A model defined only by its own code."""
    case.put("modeling_mine.py", CODE)
    case.put_json(
        "config.json",
        lambda values: {
            **values,
            "model_type": "mine",
            "auto_map": {"AutoConfig": code_in, "AutoModelForCausalLM": code_in},
        },
    )
    state = case.state()
    state["run"]["trust_remote_code"] = True
    case.reseal(state)


@pytest.mark.parametrize("code_in", ["modeling_mine.Mine", "someone/else--modeling.Mine"])
def test_a_run_cannot_make_an_export_run_its_code(
    case: Case, code_in: str, capsys: pytest.CaptureFixture[str]
) -> None:
    add_code(case, code_in)
    assert main(["export", str(case.run), "--to", str(case.run / "model")]) == 2
    said = capsys.readouterr().err
    assert code_in in said and str(case.step) in said and "--trust-remote-code" in said
    assert not MARKER.exists() and not (case.run / "model").exists()


def test_an_export_runs_the_code_with_trust_remote_code(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(case.run.parent / "modules"))
    add_code(case)
    target = str(case.run / "model")
    # The code defines no model.
    assert main(["export", str(case.run), "--to", target, "--trust-remote-code"]) == 2
    assert MARKER.exists()


def test_a_resume_does_not_run_code_of_the_run(case: Case) -> None:
    add_code(case)
    checkpoint = newest_checkpoint(RunFolder.at(str(case.run)))
    assert checkpoint is not None
    source = PretrainedSource(ModelConfig(name=str(checkpoint.folder)))
    for build in (source.empty, lambda: source.whole(torch.device("cpu"))):
        with pytest.raises(UserError, match="set model.trust_remote_code: true"):
            build()
    assert not MARKER.exists()


def test_code_beside_a_model_or_tokenizer_that_needs_none_is_not_run(case: Case) -> None:
    case.put("modeling_mine.py", CODE)
    for name, classes in {
        "config.json": {"AutoModelForCausalLM": "modeling_mine.Mine"},
        "tokenizer_config.json": {"AutoTokenizer": ["modeling_mine.Mine", None]},
    }.items():
        case.put_json(name, lambda values, classes=classes: {**values, "auto_map": classes})
    checkpoint = newest_checkpoint(RunFolder.at(str(case.run)))
    assert checkpoint is not None
    config = ModelConfig(name=str(checkpoint.folder))
    PretrainedSource(config).empty()
    PretrainedSource(config).whole(torch.device("cpu"))
    load_tokenizer(config)
    assert main(["export", str(case.run), "--to", str(case.run / "model")]) == 0
    assert not MARKER.exists()


def test_code_of_a_method_is_not_run(
    case: Case, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    case.put("modeling_mine.py", CODE)
    state = case.state()
    state["run"]["method"] = "modeling_mine:Mine"
    case.reseal(state)
    monkeypatch.syspath_prepend(str(case.step))
    assert main(["export", str(case.run), "--to", str(case.run / "model")]) == 2
    assert "code that a file names is not run" in capsys.readouterr().err
    assert not MARKER.exists()


def test_a_run_cannot_choose_the_folder_of_the_licence(case: Case) -> None:
    (case.outside / "README.md").write_text("---\nlicense: secret-licence\n---\n")
    state = case.state()
    state["run"]["base_model"] = str(case.outside)
    case.reseal(state)
    assert main(["export", str(case.run), "--to", str(case.run / "model")]) == 0
    assert "secret-licence" not in (case.run / "model" / "README.md").read_text()


def test_a_run_cannot_put_markup_into_the_model_card(case: Case) -> None:
    markup = "<script>`[x](http://evil)|\n# Pay here\n```python\nimport evil\n```\n---\n"
    state = case.state()
    for key in ("run_name", "task", "base_model", "source", "licence", "revision"):
        state["run"][key] = f"{markup}{key}"
    for values in (state["run"]["lwo"], state["run"]["train"], state["run"]["versions"]):
        values |= {key: markup for key, value in values.items() if isinstance(value, str)}
    state["run"]["data"] = {markup: 1}
    name = Score(f"x{markup}", markup, markup)
    state["run"] |= {"scores": [asdict(name)], "example": [markup, markup]}
    count = {f"eval/{markup}": 3.0}
    state["results"]["evaluations"] = {
        "0": {name.key: 1.0, **count},
        "11": {name.key: 2.0, **count},
    }
    case.reseal(state)
    gain = {"mean": 1.0, "low": 0.0, "high": 2.0}
    summary = {"eval": {"best_step": 11, "gain_95": {name.name: gain}}}
    (case.run / "summary.json").write_text(json.dumps(summary))
    target = case.run / "model"
    assert main(["export", str(case.run), "--to", str(target)]) == 0
    text = ModelCard.load(target / "README.md").text
    assert "evil" in text and "+1.00 (+0.00 to +2.00)" in text
    for found in ("<script", "[x](", "\n# Pay", "\nimport evil"):
        assert found not in text
    assert len(re.findall("```", text)) == 2  # the usage
    assert all(line.count("|") in (0, 5) for line in text.splitlines())


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"\xff", b"{}", b'{"eval": {"best_step": 11, "gain_95": {"loss": 1}}}']
)
def test_a_malformed_summary_only_costs_the_intervals(case: Case, data: bytes) -> None:
    (case.run / "summary.json").write_bytes(data)
    assert main(["export", str(case.run), "--to", str(case.run / "model")]) == 0
    assert " held-out lines | before |" in (case.run / "model" / "README.md").read_text()


# ---- terminal output


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.update(active_layer=ESCAPE),
        lambda state: state["run"].update(method=ESCAPE),
        lambda state: state["moments"].update({"embed": ESCAPE}),
        lambda state: state["sha256"].update({ESCAPE: "0" * 64}),
        lambda state: state["results"].update({ESCAPE: 1, "losses": ESCAPE}),
        lambda state: state["results"]["evaluations"]["0"].update({f"eval/{ESCAPE}": ESCAPE}),
    ],
)
def test_no_terminal_escape_is_printed(
    case: Case, change: Callable[[Any], None], capsys: pytest.CaptureFixture[str]
) -> None:
    state = case.state()
    change(state)
    case.reseal(state)
    for command in commands(str(case.run), case.run.parent / "out"):
        main(command)
    try:
        resume(RunFolder.at(str(case.run)))
    except UserError as error:
        assert str(error)
    assert "\x1b" not in "".join(capsys.readouterr())


def test_no_escape_comes_with_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for line in (first_line(OSError(f"{ESCAPE}\n{ESCAPE}")), reason(RuntimeError(ESCAPE * 99))):
        assert line.isprintable() and len(line) <= 300

    class Cluster:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def lines(self) -> list[str]:
            return [f"job-{ESCAPE}  RUNNING"]

        def stop(self, job: str) -> str:
            return f"job-{ESCAPE}"

    class Server:
        def __init__(self, *_: Any) -> None: ...

        def find_experiment(self, name: str) -> str:
            return ESCAPE

    monkeypatch.setattr("lwo_dist.cluster.jobs.Jobs", Cluster)
    monkeypatch.setattr("lwo_dist.tracking.mlflow.MLflowStore", Server)
    address = ["--address", "http://localhost:1"]
    for command in (
        ["jobs", "list", *address],
        ["jobs", "stop", *address, "job"],
        ["ui", "tracking.uri=http://localhost:1"],
    ):
        assert main(command) == 0
        out, _ = capsys.readouterr()
        assert "owned" in out and "\x1b" not in out and "\x07" not in out


# ---- types and sizes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(step="11"), "step"),
        (lambda s: s.update(step=10**30), "step"),
        (lambda s: s.update(active_layer=7), "active_layer"),
        (lambda s: s.update(sha256=[]), "sha256"),
        (lambda s: s["sha256"].update({"config.json": 7}), "sha256"),
        (lambda s: s["sha256"].pop(MOMENTS), "does not name active.safetensors"),
        (lambda s: s.update(moments=None), "moments"),
        (lambda s: s.update(format="1"), "format"),
        (lambda s: s.pop("sha256"), "sha256"),
    ],
)
def test_a_malformed_value_is_named(
    case: Case, change: Callable[[Any], None], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    state = case.state()
    change(state)
    case.reseal(state)
    said = try_all(str(case.run), case.run.parent / "out", capsys)
    assert all(message in line for line in said if "state.json" in line)
    assert any("state.json" in line for line in said)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("run"), "has no run"),
        (lambda s: s.update(run=[]), "run"),
        (lambda s: s["run"].pop("base_model"), "run.base_model"),
        (lambda s: s["data"].update(seed="0"), "data.seed"),
        (lambda s: s["results"].update(peaks=7), "results.peaks"),
        (lambda s: s["results"]["evaluations"].update({"²": {}}), "results.evaluations"),
        (lambda s: s.pop("results"), "has no results"),
    ],
)
def test_a_resume_names_a_malformed_trainer_value(
    case: Case, change: Callable[[Any], None], message: str
) -> None:
    state = case.state()
    change(state)
    with pytest.raises(DamagedError, match=message):
        refuse_other_run(Config(), SimpleNamespace(fingerprint=""), state)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "data", [b"[" * 10**6, b'{"a":' * 10**5, b"1" * 5000, b"\xff", b"null", b"[]", b""]
)
def test_bad_json_gives_no_traceback(
    case: Case, data: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    sound = (case.step / STATE).read_bytes()
    (case.step / STATE).write_bytes(data)
    try_all(str(case.run), case.run.parent / "out", capsys)
    for name in (INDEX, "config.json"):
        (case.step / STATE).write_bytes(sound)
        case.put(name, data)
        try_all(str(case.run), case.run.parent / "out", capsys)


def test_an_oversized_file_is_not_read(case: Case) -> None:
    with (case.step / STATE).open("ab") as file:
        file.truncate(2**40)  # sparse
    with pytest.raises(UserError, match="is larger than 134217728 bytes"):
        newest_checkpoint(RunFolder.at(str(case.run)))


@pytest.mark.parametrize("header", [2**63 - 1, 2**40, 10, 0])
def test_a_safetensors_header_of_an_absurd_length_gets_one_line(
    case: Case, header: int, capsys: pytest.CaptureFixture[str]
) -> None:
    data = header.to_bytes(8, "little") + b"{}"
    layer = next(name for name in case.state()["sha256"] if name.startswith("../../layers/head"))
    for name in (layer, MOMENTS):
        case.put(name, data)
        said = try_all(str(case.run), case.run.parent / "out", capsys)
        assert any("is malformed" in line for line in said)


def test_a_config_cannot_make_an_export_build_endless_layers(
    case: Case, capsys: pytest.CaptureFixture[str]
) -> None:
    case.put_json("config.json", lambda values: values.update(num_hidden_layers=10**9))
    with time_limit(20):
        said = try_all(str(case.run), case.run.parent / "out", capsys)
    assert any("num_hidden_layers = 1000000000, but" in line for line in said)


@pytest.mark.parametrize(
    "data",
    [
        b"[" * 10**6,
        b"1" * 5000,
        b"\xff",
        b"",
        b"[]",
        b"7",
        b"{}",
        b'{"run_name": "r", "attempts": "1"}',
        b'{"run_name": "r", "attempts": -1}',
        b'{"run_name": "r", "attempts": 1e400}',
        b'{"run_name": "r", "attempts": true}',
        b'{"run_name": "r", "attempts": 1, "mlflow_run_id": ["x"]}',
        b'{"run_name": "r", "attempts": 1, "holder": {"a": "\\u001b[2J"}}',
    ],
)
def test_a_wrong_run_json_gets_one_line(case: Case, data: bytes) -> None:
    (case.run / "run.json").write_bytes(data)
    with pytest.raises(UserError, match=r"r/run.json is damaged \(.*\); remove it") as error:
        _read_record(RunFolder.at(str(case.run)))
    assert str(error.value).isprintable() and len(str(error.value)) < 1000


def test_neither_a_link_nor_a_pipe_nor_a_huge_file_is_read_for_run_json(case: Case) -> None:
    path = case.run / "run.json"
    run = RunFolder.at(str(case.run))
    record = _read_record(run)
    assert record is not None and record["run_name"]
    path.unlink()
    assert _read_record(run) is None
    path.symlink_to(case.outside / "secret.json")
    with pytest.raises(UserError, match=r"run.json is a symlink; .*\); remove it"):
        _read_record(run)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match=r"run.json is not a regular file\); remove it"):
        _read_record(run)
    path.unlink()
    with path.open("wb") as file:
        file.truncate(2**40)  # sparse
    with pytest.raises(UserError, match=r"is larger than 134217728 bytes\); remove it"):
        _read_record(run)


# ---- object keys


class Bucket:
    """An object store that allows any key."""

    def __init__(self, keys: dict[str, bytes]) -> None:
        self.keys = keys

    def get_file_info(self, selector: Any) -> list[Any]:
        prefix = f"{selector.base_dir}/"
        found = [key for key in self.keys if key.startswith(prefix)]
        return [SimpleNamespace(path=key, type=FileType.File) for key in found]

    def open_input_stream(self, key: str) -> io.BytesIO:
        if key not in self.keys:
            raise FileNotFoundError(key)
        return io.BytesIO(self.keys[key])

    def delete_file(self, key: str) -> None:
        if self.keys.pop(key, None) is None:
            raise FileNotFoundError(key)


ODD_KEYS = [
    "../escaped",
    "../../outside/secret",
    "checkpoints/../../escaped",
    "checkpoints/step_000011/../../../escaped",
    "/absolute",
    "a//b",
    "./a",
    "marker/",
    "..",
    "a\nb",
    f"a{ESCAPE}",
    "a\\b",
    "\udc80",
    "run.json/below",
    "checkpoints/step_²²²²²²/state.json",
    "checkpoints/step_00000000000000000000000000000000012/state.json",
    "checkpoints/step_000012/state.json/below",
    f"layers/{'x' * 300}",
    "/".join("a" * 40),
    "y" * 2000,
]


@contextmanager
def bucket_of(
    case: Case, odd: list[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[str, Bucket]]:
    sound = {
        f"bucket/runs/r/{path.relative_to(case.run).as_posix()}": path.read_bytes()
        for path in case.run.rglob("*")
        if path.is_file()
    }
    bucket = Bucket(sound | {f"bucket/runs/r/{key}": b"odd" for key in odd})
    with monkeypatch.context() as patch:
        patch.setenv("LWO_SCRATCH_DIR", str(case.run.parent / "scratch"))
        patch.setattr(storage, "_open", lambda url, name: (bucket, f"bucket/runs/{name}"))
        yield "s3://bucket/runs/r", bucket


def test_odd_object_keys_are_ignored(
    case: Case, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for odd in (ODD_KEYS, *([key] for key in ODD_KEYS)):
        with bucket_of(case, odd, monkeypatch) as (url, _):
            run = RunFolder.at(url)
            run.fetch_small()
            checkpoint = find_checkpoint(Config(), run)
            assert checkpoint is not None and checkpoint.step == 11
            out, _ = capsys.readouterr()
            assert out.count("warning: ") <= 1 and "\x1b" not in out
            said = try_all(url, case.run.parent / "out", capsys)
            assert any("step 11  whole" in line for line in said)
            scratch = (case.run.parent / "scratch").resolve()
            assert all(path.resolve().is_relative_to(scratch) for path in scratch.rglob("*"))
            assert not (scratch / "escaped").exists()
            case.check()
            shutil.rmtree(scratch)


class Counted(io.BytesIO):
    """Counts the bytes that are read of an object."""

    read_bytes = 0

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        Counted.read_bytes += len(data)
        return data


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("run.json", lambda run: run.fetch_small()),
        ("report.html", lambda run: run.fetch_small()),
        (f"{STEP}/{STATE}", newest_checkpoint),
        (f"{STEP}/config.json", newest_checkpoint),
    ],
)
def test_an_oversized_object_is_not_downloaded(
    case: Case, name: str, call: Callable[[RunFolder], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = 200_000  # more than the others have
    monkeypatch.setattr(storage, "_MAX_SMALL_BYTES", limit)
    monkeypatch.setattr("lwo_dist.checkpoint.format.MAX_BYTES", limit)
    monkeypatch.setattr(storage, "_CHUNK_BYTES", 1000)
    with bucket_of(case, [], monkeypatch) as (url, bucket):
        bucket.keys[f"bucket/runs/r/{name}"] = b" " * 10**7
        reader = bucket.open_input_stream

        def open_counted(key: str) -> io.BytesIO:
            return Counted(reader(key).getvalue()) if key.endswith(name) else reader(key)

        monkeypatch.setattr(bucket, "open_input_stream", open_counted)
        monkeypatch.setattr(Counted, "read_bytes", 0)
        with pytest.raises(UserError, match=f"{name} is larger than 200 KB, .*; remove it from s3"):
            call(RunFolder.at(url))
        assert limit < Counted.read_bytes <= limit + 1000
        scratch = case.run.parent / "scratch"
        assert all(path.stat().st_size <= limit for path in scratch.rglob("*"))


# ---- random artefacts


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise AssertionError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class Watch:
    """Records what this process opens, changes or starts outside one folder."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.seen: list[str] = []
        sys.addaudithook(self._note)

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        if event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork"):
            self.seen.append(f"{event} {arguments}")
        elif event == "open":
            path, _, flags = arguments
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if isinstance(path, str | bytes) and self._is_bad(path, bool(writes)):
                self.seen.append(f"{event} {path!r}")
        elif event in ("os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.chmod"):
            is_relative = len(arguments) > 1 and arguments[-1] not in (-1, None)  # to a descriptor
            if not (is_relative and event in ("os.remove", "os.rmdir")) and self._is_bad(
                arguments[0], True
            ):
                self.seen.append(f"{event} {arguments}")
        elif event in ("os.rename", "os.link", "os.symlink") and any(
            self._is_bad(path, True) for path in arguments[:2]
        ):
            self.seen.append(f"{event} {arguments}")

    def _is_bad(self, path: Any, writes: bool) -> bool:
        assert self.folder is not None
        real = os.path.realpath(os.fsdecode(path))
        if real.startswith(("/dev/null", "/dev/tty", "/proc/", "/sys/")):
            return False
        inside = real.startswith(f"{self.folder}/")
        if writes:
            return not inside
        # Libraries read their own files; a run must not lead to the user's.
        return real.startswith((f"{self.folder.parent}/outside", "/etc/passwd", "/etc/hostname"))


watch = Watch()

NASTY = [
    "..",
    "../../../../outside/secret",
    "../../layers/../../../outside/secret.safetensors",
    "/etc/passwd",
    "/etc/hostname",
    "/dev/zero",
    "../../layers",
    "",
    ".",
    ESCAPE,
    "\u202e",
    "\udc80",
    "a\x00b",
    "modeling_mine.Mine",
    "os.system",
    "__reduce__",
    "x" * 5000,
    "%s%n{0.__class__}",
    "NaN",
]
NUMBERS = [-1, 0, 1, 2**31, 2**63, 10**30, -(10**30), 10**400, 1e308, float("nan"), float("inf")]
values = st.recursive(
    st.none() | st.booleans() | st.sampled_from(NUMBERS) | st.sampled_from(NASTY) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(NASTY) | st.text(), inner, max_size=3)
    ),
    max_leaves=5,
)


def mutate(document: Any, draw: Callable[..., Any]) -> Any:
    """`document` with one to three values replaced, removed, renamed or added."""
    for _ in range(draw(st.integers(1, 3))):
        places = [(document, key) for key in document] if isinstance(document, dict) else []
        for holder, key in places:
            inner = holder[key]
            if isinstance(inner, dict):
                places += [(inner, name) for name in inner]
            elif isinstance(inner, list):
                places += [(inner, number) for number in range(len(inner))]
        if not places:
            return draw(values)
        holder, key = draw(st.sampled_from(places))
        how = draw(st.sampled_from(["replace", "replace", "remove", "rename", "add"]))
        if how == "remove":
            del holder[key]
        elif how == "replace" or isinstance(holder, list):
            holder[key] = draw(values)
        elif how == "rename":
            holder[draw(st.sampled_from(NASTY) | st.text())] = holder.pop(key)
        else:
            holder[draw(st.sampled_from(NASTY) | st.text())] = draw(values)
    return document


def hostile_state(case: Case, draw: Callable[..., Any]) -> None:
    state = mutate(case.state(), draw)
    case.reseal(state if isinstance(state, dict) else {"step": state})


def hostile_file(case: Case, draw: Callable[..., Any]) -> None:
    name = draw(st.sampled_from([INDEX, "config.json", "generation_config.json"]))
    case.put_json(name, lambda document: mutate(document, draw))


def hostile_bytes(case: Case, draw: Callable[..., Any]) -> None:
    names = [path for path in sorted(case.run.rglob("*")) if path.is_file()]
    path = draw(st.sampled_from(names))
    path.write_bytes(
        draw(
            st.binary(max_size=50) | st.sampled_from([b"[" * 50_000, b'{"a":' * 9000, b"9" * 9999])
        )
    )
    reference = os.path.relpath(path, case.step)
    if reference in case.state()["sha256"] if path.name != STATE else False:
        case.put(reference, path.read_bytes())


def hostile_tree(case: Case, draw: Callable[..., Any]) -> None:
    for _ in range(draw(st.integers(1, 3))):
        paths = [path for path in sorted(case.run.rglob("*")) if not path.is_symlink()]
        path = draw(st.sampled_from(paths))
        how = draw(st.sampled_from(["link", "link", "moved", "odd", "pipe", "code"]))
        if how == "odd":
            name = draw(st.sampled_from(["\x1b[2J", "\udc80", "a\nb", "-rf", "step_²", "x" * 250]))
            os.makedirs(path.parent / name, exist_ok=True)  # noqa: PTH103  surrogates
        elif how == "code":
            (path.parent / "modeling_mine.py").write_bytes(CODE)
        else:
            if how == "moved":
                target = case.run.parent / f"moved{len(list(case.run.parent.iterdir()))}"
                shutil.move(path, target)
            else:
                target = case.outside / draw(st.sampled_from(["", "secret", "secret.json"]))
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            os.mkfifo(path) if how == "pipe" else path.symlink_to(target)


def hostile_config(case: Case, draw: Callable[..., Any]) -> None:
    path = case.run.parent / "config.yaml"
    config = mutate(json.loads(Config().model_dump_json()), draw)
    text = json.dumps(config, ensure_ascii=draw(st.booleans()))
    text += draw(st.sampled_from(["", "\n&a *a", "\n!!python/name:os.system", "\n- &a [*a]"]))
    path.write_bytes(text.encode(errors="surrogatepass"))
    override = f"{draw(st.sampled_from(list(Config.model_fields)))}={draw(st.text())}"
    for overrides in ((), (override,)):
        try:
            load_config(path, overrides)
        except UserError as error:
            assert len(str(error)) < 3000


@pytest.fixture
def warm(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    """Libraries create their own caches at first use."""
    assert any("model: " in line for line in try_all(str(case.run), case.run / "model", capsys))


KINDS = [hostile_state, hostile_file, hostile_bytes, hostile_tree, hostile_config]


@settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],  # shrinking would take minutes
    suppress_health_check=list(HealthCheck),
)
@given(st.data())
def test_300_random_hostile_artefacts_are_contained(
    warm: None,
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    data: st.DataObject,
) -> None:
    folder = tmp_path_factory.mktemp("hostile").resolve()
    case = Case(folder)
    make = data.draw(st.sampled_from(KINDS))
    odd = data.draw(st.lists(st.sampled_from(ODD_KEYS) | st.text(min_size=1), max_size=3))
    in_bucket = data.draw(st.integers(0, 3)) == 0
    try:
        with time_limit(60):
            make(case, data.draw)
            watch.seen.clear()
            watch.folder = case.run.parent
            if in_bucket and make is not hostile_tree:
                with bucket_of(case, odd, monkeypatch) as (url, _):
                    try_all(url, case.run.parent / "out", capsys)
            else:
                try_all(str(case.run), case.run.parent / "out", capsys)
            watch.folder = None
        assert watch.seen == []
        case.check()
    finally:
        watch.folder = None
        MARKER.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
