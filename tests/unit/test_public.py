"""Data sets in the formats of public benchmarks: what is read, on which side it is, and what is
refused or counted.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lwo_dist.cli import main
from lwo_dist.config import DataConfig
from lwo_dist.config.reading import load_config
from lwo_dist.data.pairs import Pair, Pairs
from lwo_dist.data.public import read_public
from lwo_dist.driver import prepare
from lwo_dist.errors import UserError
from lwo_dist.registry import TASKS
from tests.code_samples import make_config
from tests.models import save_tiny_model


def write_lines(file: Path, records: Sequence[Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def read(source: Path, file_format: str, *overrides: str) -> Pairs:
    return read_public(data_config(source, file_format, *overrides))


def data_config(source: Path, file_format: str, *overrides: str) -> DataConfig:
    return load_config(
        None, [f"data.source={source}", f"data.format={file_format}", *overrides]
    ).data


def numbered(count: int, start: int = 0) -> list[dict[str, str]]:
    return [{"source": f"in {i}", "target": f"out {i}"} for i in range(start, start + count)]


def targets(pairs: Sequence[Pair]) -> list[str]:
    return [pair.target for pair in pairs]


EXAMPLES: dict[str, tuple[dict[str, Any], Pair]] = {
    "jsonl": (
        {"source": "1 + 1", "target": "2", "language": "Python"},
        Pair("1 + 1", "2", "test.jsonl", 1, "python"),
    ),
    "concode": (
        {
            "nl": "adds one . concode_field_sep int n concode_elem_sep Map m"
            " concode_field_sep void f",
            "code": "int function ( ) { return n + 1 ; }",
        },
        Pair(
            "/*\nint n\nMap m\nvoid f\nadds one .\n*/",
            "int function ( ) { return n + 1 ; }",
            "test.jsonl",
            1,
            "java",
        ),
    ),
    "code-to-text": (
        {
            "code": "def f():\n  '''Gives one.'''\n  return 1",
            "code_tokens": ["def", "f", "(", ")", ":", "return", "1"],
            "docstring": "Gives one.",
            "docstring_tokens": ["Gives", "one", "."],
            "repo": "a/b",
            "path": "c.py",
            "language": "python",
        },
        Pair("def f ( ) : return 1", "Gives one .", "a/b/c.py", 1, "python"),
    ),
    "devign": (
        {"project": "qemu", "func": "int f() { return 1; }\n", "target": 1, "idx": 5},
        Pair("int f() { return 1; }", "yes", "test.jsonl", 1, "c"),
    ),
    "codexglue-completion": (
        {
            "input": "<s> import b <EOL> x = '<STR_LIT:a>' + <NUM_LIT> <EOL> y = '<STR_LIT>' <EOL>",
            "gt": "z = <NUM_LIT:7>",
        },
        Pair("import b\nx = 'a' + 0\ny = ''\n", "z = 7", "test.jsonl", 1),
    ),
    "repobench": (
        {
            "repo_name": "a/b",
            "file_path": "c/d.py",
            "context": [{"identifier": "f", "path": "e.py", "snippet": "def f(): ..."}],
            "import_statement": "from e import f",
            "cropped_code": "x = 1\n\n\n\n\ny = 2",
            "next_line": "z = f()",
        },
        Pair(
            "# Repo Name: a/b\n# Path: e.py\ndef f(): ...\n\n# Path: c/d.py\nfrom e import f\n"
            "x = 1\n\ny = 2\n",
            "z = f()",
            "a/b/c/d.py",
            1,
            "python",
        ),
    ),
    "crosscodeeval": (
        {
            "prompt": "import a\nb = a.",
            "groundtruth": "c()",
            "crossfile_context": {"text": "# from a.py\n# def c(): ...\n", "list": []},
            "metadata": {"repository": "r", "file": "b.py"},
        },
        Pair("# from a.py\n# def c(): ...\nimport a\nb = a.", "c()", "r/b.py", 1, "python"),
    ),
}


CHANGED = {
    "jsonl": "target",
    "concode": "code",
    "code-to-text": "docstring_tokens",
    "devign": "func",
    "codexglue-completion": "gt",
    "repobench": "next_line",
    "crosscodeeval": "groundtruth",
}


def held_out(folder: Path, file_format: str, records: Sequence[Any]) -> Pairs:
    """Read as the test files of a benchmark, which trains on something else."""
    write_lines(folder / "train.jsonl", [{**records[-1], CHANGED[file_format]: "other"}])
    write_lines(folder / "test.jsonl", records)
    return read(folder, file_format)


@pytest.mark.parametrize("file_format", EXAMPLES)
def test_a_record_of_each_format(file_format: str, tmp_path: Path) -> None:
    record, expected = EXAMPLES[file_format]
    found = held_out(tmp_path, file_format, [record, record])
    assert found.held_out == (expected, replace(expected, line=2))


def test_retrieved_snippets_may_be_missing(tmp_path: Path) -> None:
    record = {"prompt": "b = a.", "groundtruth": "c()"}
    assert held_out(tmp_path, "crosscodeeval", [record] * 2).held_out[0].source == "b = a."


def test_code_does_not_hold_its_docstring(tmp_path: Path) -> None:
    """The answer would be in the question."""
    record = {"code": "def f():\n  'Gives one.'\n  return 1", "docstring": "Gives one."}
    found = held_out(tmp_path, "code-to-text", [record] * 2)
    assert found.held_out[0].source == "def f():\n  ''\n  return 1"


def test_fields_have_the_names_that_the_user_gives(tmp_path: Path) -> None:
    records = [{"question": f"q{i}", "answer": ["a", str(i)]} for i in range(2)]
    file = write_lines(tmp_path / "data.jsonl", records)
    found = read(file, "jsonl", "data.fields={source: question, target: answer}")
    assert sorted(targets([*found.train, *found.held_out])) == ["a 0", "a 1"]


def test_chats_end_with_the_target(tmp_path: Path) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1 + 1"},
        {"role": "assistant", "content": "2"},
    ]
    broken = [{"messages": messages[:2]}, {"messages": "1"}, {"messages": [{"role": "user"}]}]
    other = [messages[1], {"role": "assistant", "content": "two"}]
    write_lines(tmp_path / "train.jsonl", [*broken, {"messages": other}])
    write_lines(tmp_path / "test.jsonl", [{"messages": messages}] * 2)
    found = read(tmp_path, "jsonl")
    assert found.held_out[0].messages == (("system", "Be brief."), ("user", "1 + 1"))
    assert (found.held_out[0].source, found.held_out[0].target) == ("Be brief.\n\n1 + 1", "2")
    assert found.skipped == {"not text": 3}


def test_parallel_files_in_both_directions(tmp_path: Path) -> None:
    for side, texts in (("train", ["a", "b\u2028b"]), ("valid", ["c"]), ("test", ["d", "e"])):
        for ending in ("java", "cs"):
            lines = "\n".join(f"{ending} {text} " for text in texts)  # no line end at the end
            (tmp_path / f"{side}.java-cs.txt.{ending}").write_text(lines)
    found = read(tmp_path, "code-to-code-trans")
    assert found.train == (
        Pair("java a", "cs a", "train.java-cs.txt.java", 1, "c#", "java"),
        Pair("java b\u2028b", "cs b\u2028b", "train.java-cs.txt.java", 2, "c#", "java"),
    )
    assert targets(found.held_out) == ["cs d", "cs e"]
    back = read(tmp_path, "code-to-code-trans", "data.fields={source: cs, target: java}")
    assert back.train[0] == Pair("cs a", "java a", "train.java-cs.txt.cs", 1, "java", "c#")
    with pytest.raises(UserError, match=r"there is no \w+\.java-cs\.txt\.py beside it"):
        read(tmp_path, "code-to-code-trans", "data.fields.target=py")


def test_sides_of_a_folder_are_kept(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", numbered(5))
    write_lines(tmp_path / "dev.jsonl", numbered(3, 5))
    write_lines(tmp_path / "test.jsonl", numbered(4, 8))
    write_lines(tmp_path / "notes.json", ["not an example"])
    found = read(tmp_path, "jsonl")
    assert targets(found.train) == [f"out {i}" for i in range(5)]
    assert targets(found.held_out) == [f"out {i}" for i in range(8, 12)]
    found = read(tmp_path, "jsonl", "data.evaluate_on=validation")
    assert targets(found.train) == [f"out {i}" for i in range(5)]
    assert targets(found.held_out) == ["out 5", "out 6", "out 7"]


def test_what_a_folder_lacks_is_split_off_by_hash(tmp_path: Path) -> None:
    write_lines(tmp_path / "valid.jsonl", numbered(40))
    write_lines(tmp_path / "test.jsonl", numbered(4, 40))
    whole = {f"out {i}" for i in range(40)}
    assert set(targets(read(tmp_path, "jsonl").train)) == whole
    both = ["data.validation_fraction=0.2"]
    scored = read(tmp_path, "jsonl", *both)
    chosen = read(tmp_path, "jsonl", *both, "data.evaluate_on=validation")
    assert scored.train == chosen.train and 20 < len(scored.train) < 40
    assert targets(scored.held_out) == [f"out {i}" for i in range(40, 44)]
    assert set(targets(chosen.held_out)) == whole - set(targets(chosen.train))


def test_tests_without_answers_are_not_scored(tmp_path: Path) -> None:
    write_lines(tmp_path / "dev.jsonl", numbered(40))
    write_lines(tmp_path / "test.jsonl", [{"source": "in", "target": ""}] * 3)
    found = read(tmp_path, "jsonl")
    assert len(found.train) + len(found.held_out) == 40 and len(found.held_out) >= 2
    assert found.skipped == {"empty target": 3}
    write_lines(tmp_path / "train.jsonl", numbered(5, 50))
    found = read(tmp_path, "jsonl")
    assert (len(found.train), len(found.held_out)) == (5, 40)


def test_sources_of_their_own_for_each_side(tmp_path: Path) -> None:
    train = write_lines(tmp_path / "a" / "data.jsonl", numbered(6))
    write_lines(tmp_path / "b" / "test.jsonl", numbered(3, 6))
    write_lines(tmp_path / "b" / "train.jsonl", numbered(3, 20))
    validation = write_lines(tmp_path / "c.jsonl", numbered(2, 30))
    sides = [f"data.held_out_source={tmp_path / 'b'}", f"data.validation_source={validation}"]
    found = read(train, "jsonl", *sides)
    assert (len(found.train), targets(found.held_out)) == (6, ["out 6", "out 7", "out 8"])
    found = read(train, "jsonl", *sides, "data.evaluate_on=validation")
    assert (len(found.train), targets(found.held_out)) == (6, ["out 30", "out 31"])
    with pytest.raises(UserError, match="data.held_out_source = .*: holds only train files"):
        (tmp_path / "b" / "test.jsonl").unlink()
        read(train, "jsonl", *sides)


def test_what_is_scored_is_not_trained_on(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", numbered(6))
    write_lines(tmp_path / "valid.jsonl", numbered(2, 4))
    write_lines(tmp_path / "test.jsonl", numbered(2, 1))
    for evaluate_on in ("held_out", "validation"):
        found = read(tmp_path, "jsonl", f"data.evaluate_on={evaluate_on}")
        assert targets(found.train) == ["out 0", "out 3"]
        assert found.skipped == {"also held out": 4}


def test_neighbours_from_one_file_are_on_one_side(tmp_path: Path) -> None:
    records = [
        {"prompt": f"{repository} {i}", "groundtruth": "x", "metadata": {"repository": repository}}
        for repository in ("a", "b", "c", "d")
        for i in range(5)
    ]
    found = read(write_lines(tmp_path / "data.jsonl", records), "crosscodeeval")
    sides = [{pair.name for pair in side} for side in (found.train, found.held_out)]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 4


def test_what_cannot_be_used_is_counted(tmp_path: Path) -> None:
    token = "ghp_" + "a1" * 18
    lines = [
        *(json.dumps(record).encode() for record in numbered(3)),
        b"{not json",
        b'{"source": "caf\xe9", "target": "x"}',
        b'["no object"]',
        b'{"source": "a"}',
        b'{"source": {"a": 1}, "target": "x"}',
        b'{"source": " ", "target": "x"}',
        b'{"source": "half of \\ud83d", "target": "x"}',
        b'{"source": "x", "target": null}',
        json.dumps({"source": "x" * 2000, "target": "y"}).encode(),
        json.dumps({"source": f"key = '{token}'", "target": "y"}).encode(),
        b"",
    ]
    file = tmp_path / "data.jsonl.gz"
    file.write_bytes(gzip.compress(b"\n".join(lines)))
    found = read(file, "jsonl", "data.max_file_bytes=1000")
    assert len(found.train) + len(found.held_out) == 3
    assert found.skipped == {
        "empty source": 1,
        "empty target": 1,
        "huge": 1,
        "missing field": 1,
        "not JSON": 1,
        "not UTF-8": 1,
        "not Unicode": 1,
        "not a JSON object": 1,
        "not text": 1,
        "secret": 1,
    }


def test_a_list_in_one_file_is_read_too(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(json.dumps(numbered(3)))
    found = read(tmp_path, "jsonl")
    assert len(found.train) + len(found.held_out) == 3


BAD: dict[str, tuple[str, list[Any], list[str], str]] = {
    "a missing field": (
        "jsonl",
        [{"question": "q", "answer": "a"}],
        [],
        r"data.jsonl, line 1: has no field 'source'; it has question, answer; name the fields with"
        " data.fields.source and data.fields.target",
    ),
    "a misspelt name": (
        "jsonl",
        numbered(2),
        ["data.fields.target=reply"],
        "line 1: has no field 'reply'; it has source, target",
    ),
    "nothing usable": (
        "jsonl",
        [1, 2],
        [],
        r"data.source = .*: no usable examples \(skipped: 2 not a JSON object\); give a source with"
        " at least 2",
    ),
    "an unknown label": (
        "devign",
        [{"func": "f", "target": 2}] * 2,
        [],
        r"no usable examples \(skipped: 2 not text\)",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_records_are_refused(name: str, tmp_path: Path) -> None:
    file_format, records, overrides, message = BAD[name]
    with pytest.raises(UserError, match=message) as error:
        read(write_lines(tmp_path / "data.jsonl", records), file_format, *overrides)
    assert "\n" not in str(error.value)


def test_bad_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="data.source = .*/none: does not exist"):
        read(tmp_path / "none", "concode")
    with pytest.raises(UserError, match=r"has no file that ends in \.jsonl or .*; give a folder"):
        read(tmp_path, "concode")
    write_lines(tmp_path / "test.json", numbered(2))
    with pytest.raises(UserError, match="no usable examples to train on .*data.held_out_source"):
        read(tmp_path, "jsonl")
    write_lines(tmp_path / "train.json", numbered(2, 2))
    with pytest.raises(UserError, match="no usable validation examples .*validation_fraction"):
        read(tmp_path, "jsonl", "data.evaluate_on=validation")
    (tmp_path / "x.buggy").write_text("a\nb\n")
    (tmp_path / "x.fixed").write_text("a\n")
    with pytest.raises(UserError, match=r"x.buggy has 2 lines and x.fixed has 1; line i of the"):
        read(tmp_path, "code-refinement")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe: is no file and no folder"):
        read(tmp_path / "pipe", "jsonl")
    with pytest.raises(UserError, match="File name too long"):
        read(tmp_path / ("x" * 300), "jsonl")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b"{}" * 100)[:-9])
    with pytest.raises(UserError, match=r"cut.jsonl.gz: .*; give a file that can be read"):
        read(tmp_path / "cut.jsonl.gz", "jsonl")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.prompt=Do it"], r"prompt has no \{source\}"),
        (["data.held_out_source=x"], "held_out_source needs a data set, but format is code"),
        (["data.fields={source: a}"], "fields needs a data set"),
        (["data.fields={text: a}"], "data.fields.text"),
        (
            ["data.format=jsonl", "data.held_out_source=https://me:hunter2@host/x.jsonl"],
            "data.held_out_source = https://host/x.jsonl contains a password",
        ),
        (["data.format=csv"], "data.format = 'csv'"),
    ],
)
def test_bad_settings_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(None, overrides)


def test_a_format_that_does_not_fit_the_task_is_refused(tmp_path: Path) -> None:
    for task, file_format in (("repair", "devign"), ("translation", "code")):
        config = make_config(tmp_path, tmp_path, f"task={task}", f"data.format={file_format}")
        with pytest.raises(
            UserError, match=f"data.format = {file_format} does not fit the task {task}, which"
        ):
            TASKS.get(task).check(config)


def test_the_command_data_counts_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_lines(tmp_path / "train.jsonl", [*numbered(3), {"source": "x", "target": ""}])
    write_lines(tmp_path / "test.jsonl", numbered(2, 3))
    arguments = ["data", "task=repair", "data.format=jsonl", f"data.source={tmp_path}"]
    assert main(arguments) == 0
    shown = "train: 3 pairs\nheld out: 2 pairs\nskipped: 1 empty target\n"
    assert capsys.readouterr().out == shown
    assert main([*arguments, "task=defect"]) == 2


def test_workers_get_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Train moves each worker to another folder."""
    for i, name in enumerate(("train", "valid", "test")):
        write_lines(tmp_path / "data" / f"{name}.jsonl", numbered(3, 3 * i))
    save_tiny_model(tmp_path / "model", ["in out 1234567890"])
    monkeypatch.chdir(tmp_path)
    config = make_config(
        Path("data/train.jsonl"),
        Path("runs"),
        "data.format=jsonl",
        "data.held_out_source=data/test.jsonl",
        "data.validation_source=data/valid.jsonl",
        "task=repair",
        "model.name=model",
        "strategy=replicate",
        "train.steps=1",
        "tracking.enabled=false",
    )
    made = prepare(config).data
    sources = (made.source, made.held_out_source, made.validation_source)
    assert sources == tuple(
        str(tmp_path / "data" / f"{name}.jsonl") for name in ("train", "test", "valid")
    )


def benchmark(name: str) -> Path:
    folder = os.environ.get("LWO_DATA_DIR")
    if not folder:
        pytest.skip("LWO_DATA_DIR, a folder with CodeXGLUE's data, is not set")
    return Path(folder) / "codexglue" / name


@pytest.mark.parametrize(
    ("name", "file_format", "train", "held_out"),
    [
        ("code-to-code-trans", "code-to-code-trans", 10_295, 1_000),
        ("code-refinement-small", "code-refinement", 5_835, 5_835),
    ],
)
def test_the_benchmarks_own_files(name: str, file_format: str, train: int, held_out: int) -> None:
    found = read(benchmark(name), file_format)
    assert len(found.train) + found.skipped.get("also held out", 0) == train
    assert len(found.held_out) == held_out
    assert not {pair.sha256 for pair in found.train} & {pair.sha256 for pair in found.held_out}


def test_the_benchmark_whose_answers_are_not_published() -> None:
    found = read(benchmark("concode"), "concode")
    assert found.skipped == {"empty target": 2_000}
    assert {pair.name for pair in (*found.train, *found.held_out)} == {"dev.json"}
