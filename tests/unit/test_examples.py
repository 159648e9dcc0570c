"""Line completion in tokens: what is learned, what is context, what is held out, and how it lies on
disk.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.normalizers import Replace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from lwo_dist import distributed
from lwo_dist.config import Config
from lwo_dist.data.dataset import PreparedData, load_dataset
from lwo_dist.data.examples import (
    EvalExample,
    LineTokenizer,
    TrainExample,
    cut_windows,
    pad_id,
    text_start,
)
from lwo_dist.data.source_tree import SourceTree
from lwo_dist.errors import UserError
from lwo_dist.registry import TASKS
from lwo_dist.tasks import prepare as prepare_module
from lwo_dist.tasks.completion import LineCompletion
from lwo_dist.tasks.prepare import prepare_dataset
from tests.code_samples import (
    END_OF_TEXT,
    KINDS,
    code,
    make_config,
    make_tokenizer,
    tokenizer_of_kind,
    write_tree,
)
from tests.ranks import run_ranks

TASK: LineCompletion = TASKS.get("completion")


def prepare(config: Config, **more: Any) -> PreparedData:
    return prepare_dataset(config, make_tokenizer(), TASK, **more)


def as_read(kind: str, text: str) -> str:
    """Metaspace takes a space at the start of a text for the one that it would put there."""
    return text.lstrip(" ") if kind == "metaspace" else text


def tree(config: Config, cache: Path) -> SourceTree:
    return TASK.read(config.data, cache)


def in_windows(lines: list[list[int]], window: int) -> list[TrainExample]:
    edges = list(accumulate(map(len, lines), initial=0))
    return list(cut_windows(list(chain(*lines)), edges, window))


@given(st.lists(st.integers(1, 70), min_size=1, max_size=30), st.integers(8, 40))
def test_every_token_is_a_target_once_after_its_nearest_context(
    lengths: list[int], window: int
) -> None:
    ids = iter(range(10_000))
    lines = [[next(ids) for _ in range(length)] for length in lengths]
    windows = in_windows(lines, window)
    targets = [list(w.input_ids[w.target_start :]) for w in windows]
    assert list(chain(*targets)) == list(chain(*lines))
    line_starts, line_ends = {line[0] for line in lines}, {line[-1] for line in lines}
    for w, target in zip(windows, targets, strict=True):
        tokens = list(w.input_ids)
        assert len(tokens) <= window
        assert tokens == list(
            range(tokens[0], tokens[0] + len(tokens))
        )  # nothing between context and target
        context = w.target_start
        assert context <= window // 4
        start = target[0]
        if start > 0:
            # The longest run of whole lines in a quarter of the window; else the nearest tokens
            # that fill it.
            fitting = [s for s in line_starts if start - window // 4 <= s < start]
            assert tokens[0] == (min(fitting) if fitting else start - window // 4)
        room = window - window // 4
        if start not in line_starts or target[-1] not in line_ends:
            assert max(lengths) > room  # only a line that is too long is cut
    for w, following in zip(windows, targets[1:], strict=False):
        line = next(line for line in lines if following[0] in line)
        if len(line) <= window - window // 4:
            assert len(w.input_ids) + len(line) > window  # no window ends before it is full


def test_cut_windows_by_hand() -> None:
    lines = [[1, 2, 3], [4, 5], [6, 7, 8], [9, 10, 11, 12]]
    assert in_windows(lines, 8) == [
        TrainExample([1, 2, 3, 4, 5, 6, 7, 8], 0),
        TrainExample([7, 8, 9, 10, 11, 12], 2),
    ]
    assert in_windows([[1, 2, 3], [4, 5], [6, 7], [8, 9, 10, 11, 12]], 11) == [
        TrainExample([1, 2, 3, 4, 5, 6, 7], 0),
        TrainExample([6, 7, 8, 9, 10, 11, 12], 2),
    ]
    assert in_windows([list(range(14))], 8) == [
        TrainExample([0, 1, 2, 3, 4, 5], 0),
        TrainExample([4, 5, 6, 7, 8, 9, 10, 11], 2),
        TrainExample([10, 11, 12, 13], 2),
    ]
    assert [w.label_tokens for w in in_windows(lines, 8)] == [7, 4]


def test_no_special_token_is_added_or_recognised() -> None:
    tokenizer = pickle.loads(pickle.dumps(make_tokenizer(bos_token="<s>")))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        "<s> $A", None, [("<s>", tokenizer.bos_token_id)]
    )
    assert tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
    text = code(3) + f"\n\n    x\f = 'é\u2028{END_OF_TEXT}<s>'\n"
    tokens = LineTokenizer(tokenizer)(text).tokens
    assert tokenizer.decode(tokens) == text
    assert not {tokenizer.bos_token_id, tokenizer.eos_token_id}.intersection(tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_windows_hold_the_tokens_of_the_whole_text(kind: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of_kind(kind)
    config = make_config(write_tree(tmp_path / "tree"), tmp_path)
    source = tree(config, tmp_path)
    start = text_start(tokenizer)
    assert len(start) == (kind in ("llama2", "gemma"))
    learned = []
    for window in TASK.training_examples(source, tokenizer, config):
        tokens = list(window.input_ids)
        assert len(tokens) <= 48 and tokens[: len(start)] == start
        learned += tokens[window.target_start :]
    whole = []
    for file in source.train:
        ids = tokenizer(file.path.read_text(), add_special_tokens=False)["input_ids"]
        whole += [*ids, tokenizer.eos_token_id]
    assert learned == whole
    # Otherwise this tests nothing: line by line the tokens are others.
    lines = "".join(file.path.read_text() for file in source.train).splitlines(keepends=True)
    assert list(chain(*tokenizer(lines, add_special_tokens=False)["input_ids"])) != [
        token for token in whole if token != tokenizer.eos_token_id
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_windows_are_cut_between_lines(kind: str) -> None:
    tokenizer = tokenizer_of_kind(kind)
    text = code(3)
    found = LineTokenizer(tokenizer)(text)
    pieces = [
        tokenizer.decode(found.tokens[a:b], clean_up_tokenization_spaces=False)
        for a, b in pairwise(found.edges)
    ]
    assert len(pieces) > 5
    firsts = [tokenizer.decode(found.tokens[edge]) for edge in found.edges[1:-1]]
    for (before, after), first in zip(pairwise(pieces), firsts, strict=True):
        # Or where one token holds what is on both sides of a line end.
        assert before.endswith("\n") or after.startswith("\n") or "\n" in first
        inner = before.strip("\n ")
        assert "\n" not in inner or kind == "metaspace"  # every line is one piece


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_tells_no_more_than_the_text_before_the_line(kind: str, tmp_path: Path) -> None:
    """It ends at a token of the whole text, and with the known start of the answer it is the text
    before the line: the line's indentation is not known."""
    tokenizer = tokenizer_of_kind(kind)
    config = make_config(write_tree(tmp_path / "tree"), tmp_path, "train.sequence_length=900")
    source = tree(config, tmp_path)
    texts = {file.name: file.path.read_text() for file in source.held_out}
    examples = TASK.evaluation_examples(source, tokenizer, config)
    assert len(examples) == 20
    indented = 0
    start = text_start(tokenizer)
    for example in examples:
        before = "".join(texts[example.name].splitlines(keepends=True)[: example.line - 1])
        context = tokenizer.decode(
            example.context[len(start) :], clean_up_tokenization_spaces=False
        )
        assert as_read(kind, context + example.begins_with) == as_read(kind, before)
        assert example.begins_with.endswith("\n")
        whole = tokenizer(texts[example.name])["input_ids"]
        here = [*example.context, *example.target]
        assert whole[: len(here)] == here
        indented += not tokenizer.decode([example.target[0]]).endswith("\n")
        if len(example.target) < config.eval.max_new_tokens:
            assert TASK.decode(tokenizer, example, example.target) == example.text
    assert indented > 3 or kind != "gpt2"


def test_a_tokenizer_that_changes_code(tmp_path: Path) -> None:
    config = make_config(write_tree(tmp_path / "tree"), tmp_path)
    lower = pickle.loads(pickle.dumps(make_tokenizer()))
    lower.backend_tokenizer.normalizer = Replace("  ", " ")
    with pytest.raises(UserError, match="so it cannot complete lines of code") as error:
        prepare_dataset(config, lower, TASK)
    assert "\n" not in str(error.value)


def test_the_end_of_a_file_is_learned(tmp_path: Path) -> None:
    config = make_config(write_tree(tmp_path / "tree"), tmp_path)
    source, tokenizer = tree(config, tmp_path), make_tokenizer()
    windows = list(TASK.training_examples(source, tokenizer, config))
    learned = "".join(tokenizer.decode(w.input_ids[w.target_start :]) for w in windows)
    assert learned == "".join(file.path.read_text() + END_OF_TEXT for file in source.train)


@pytest.mark.parametrize(
    ("special", "expected"),
    [
        ({"pad_token": "<pad>"}, "<pad>"),
        ({"pad_token": END_OF_TEXT, "unk_token": "<unk>"}, "<unk>"),
        ({"pad_token": END_OF_TEXT, "bos_token": "<s>"}, "<s>"),
        ({"pad_token": END_OF_TEXT, "bos_token": END_OF_TEXT}, "!"),
        ({"pad_token": "\n"}, "!"),
    ],
)
def test_padding_ends_neither_line_nor_text(special: dict[str, str], expected: str) -> None:
    tokenizer = make_tokenizer(**special)
    assert tokenizer.decode([pad_id(tokenizer)]) == expected


def test_end_tokens() -> None:
    tokenizer = make_tokenizer()
    ends = TASK.end_token_ids(tokenizer)
    assert tokenizer.eos_token_id in ends
    for token in range(len(tokenizer)):
        assert (token in ends) == (
            "\n" in tokenizer.decode([token]) or token == tokenizer.eos_token_id
        )
    assert len(ends) >= 3  # the corpus made some tokens of "\n" and what goes before it


def test_decode_stops_at_the_line_or_the_text() -> None:
    tokenizer = make_tokenizer()
    example = EvalExample([1], [1], "", "", 1)

    def decoded(text: str) -> str:
        return TASK.decode(tokenizer, example, tokenizer.encode(text, add_special_tokens=False))

    assert decoded("    return x\nmore\n") == "    return x"
    assert decoded(f"    return{END_OF_TEXT} x\n") == "    return"
    assert decoded("unfinished") == "unfinished"
    assert decoded("\nmore") == decoded(END_OF_TEXT) == TASK.decode(tokenizer, example, []) == ""
    example = replace(example, begins_with="\n\n")
    assert decoded("\n\n  x\ny") == "  x"
    assert decoded("\n\n\ny") == ""


def test_tokenizers_that_cannot_complete_lines(tmp_path: Path) -> None:
    config = make_config(write_tree(tmp_path / "tree"), tmp_path)
    lacking = PreTrainedTokenizerFast(tokenizer_object=make_tokenizer().backend_tokenizer)
    with pytest.raises(UserError, match="has no eos_token"):
        prepare_dataset(config, lacking, TASK)
    blind = make_tokenizer()
    blind = pickle.loads(pickle.dumps(blind))
    blind.batch_decode = lambda rows, **_: [
        " " for _ in rows
    ]  # as those that fold all white space into a blank
    with pytest.raises(UserError, match="cannot write a line end"):
        prepare_dataset(config, blind, TASK)


def test_held_out_lines(tmp_path: Path) -> None:
    config = make_config(write_tree(tmp_path / "tree"), tmp_path)
    source, tokenizer = tree(config, tmp_path), make_tokenizer()
    examples = TASK.evaluation_examples(source, tokenizer, config)
    assert len(examples) == 20
    texts = {file.name: file.path.read_text().split("\n") for file in source.held_out}
    counts = {name: sum(e.name == name for e in examples) for name in texts}
    assert max(counts.values()) - min(counts.values()) <= 1  # spread over the files
    assert [(e.name, e.line) for e in examples] == sorted({(e.name, e.line) for e in examples})
    limit = config.train.sequence_length - config.eval.max_new_tokens
    full = 0
    for example in examples:
        lines = texts[example.name]
        assert example.text == lines[example.line - 1]
        assert any(map(str.isalnum, example.text))
        written = tokenizer.decode(example.target).removeprefix(example.begins_with)
        assert written.rstrip(" ") == example.text + "\n"
        before = "".join(line + "\n" for line in lines[: example.line - 1])
        context = tokenizer.decode(example.context) + example.begins_with
        assert example.context and before.endswith(context)
        assert len(example.context) <= limit
        if context != before:
            full += 1
            # Whole lines, and one more would not fit.
            found = LineTokenizer(tokenizer)("\n".join(lines))
            end = found.breaks[example.line - 2]
            start = end - len(example.context)
            assert found.tokens[start:end] == example.context
            assert found.edges[found.edges.index(start) - 1] < end - limit
    assert full > 5


def test_held_out_lines_do_not_depend_on_other_files(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "tree")
    config = make_config(root, tmp_path, "eval.num_lines=100000")
    before = TASK.evaluation_examples(tree(config, tmp_path), make_tokenizer(), config)
    for i in range(12, 20):
        (root / f"file_{i}.py").write_text(code(i))
    after = TASK.evaluation_examples(tree(config, tmp_path), make_tokenizer(), config)
    assert len(after) > len(before)
    assert all(example in after for example in before)
    # All there are, where fewer than asked: never a first line, a blank one or one of signs only.
    held_out = tree(config, tmp_path).held_out
    worth = [
        line
        for file in held_out
        for line in file.path.read_text().strip("\n").split("\n")[1:]
        if line.strip() not in ("", ")")
    ]
    assert len(after) == len(worth)


def test_long_targets_and_contexts_are_cut(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "tree", files=1)
    long = "a" + "".join(chr(0x4E00 + i) for i in range(200))
    for i in range(4):
        (root / "sub" / f"long_{i}.py").write_text("x\n" * 3 + f"{long}\n{long}{i}\n")
    config = make_config(root, tmp_path, "data.held_out_fraction=0.9", "eval.num_lines=100")
    examples = TASK.evaluation_examples(tree(config, tmp_path), make_tokenizer(), config)
    cut = [example for example in examples if example.text.startswith("a")]
    assert cut
    assert all(len(example.target) == 16 for example in cut)
    assert any(len(example.context) == 48 - 16 for example in cut)
    assert {example.text[:201] for example in cut} == {long}


def test_nothing_to_complete(tmp_path: Path) -> None:
    for i in range(6):
        (tmp_path / f"{i}.py").write_text(f"x = {i}\n")
    with pytest.raises(UserError, match="0 lines to complete in its") as error:
        prepare(make_config(tmp_path, tmp_path / "storage"))
    assert "\n" not in str(error.value)
    assert list((tmp_path / "storage" / "cache" / "datasets").iterdir()) == []


def test_no_room_for_a_context(tmp_path: Path) -> None:
    config = make_config(write_tree(tmp_path / "tree"), tmp_path, "eval.max_new_tokens=48")
    with pytest.raises(
        UserError, match=r"eval.max_new_tokens = 48 leaves no room .* train.sequence_length = 48"
    ):
        prepare(config)


def test_prepared_once_and_memory_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(write_tree(tmp_path / "tree"), tmp_path / "storage")
    first = prepare(config)
    source, tokenizer = tree(config, tmp_path), make_tokenizer()
    examples = list(TASK.training_examples(source, tokenizer, config))
    assert [TrainExample(row["input_ids"], row["target_start"]) for row in first.train] == examples
    assert list(first.held_out) == TASK.evaluation_examples(source, tokenizer, config)
    assert first.lengths.tolist() == [len(e.input_ids) for e in examples]
    assert first.label_tokens.tolist() == [e.label_tokens for e in examples]
    assert first.counts == {
        "train_files": len(source.train),
        "held_out_files": len(source.held_out),
        "skipped": {},
        "windows": len(examples),
        "tokens": sum(first.lengths),
        "label_tokens": sum(first.label_tokens),
        "held_out_lines": 20,
        "held_out_lines_asked": 20,
    }
    assert [Path(f["filename"]) for f in first.train.cache_files] == [first.folder / "train.arrow"]
    assert first.folder.parent == tmp_path / "storage" / "cache" / "datasets"
    assert [path.name for path in first.folder.parent.iterdir()] == [first.folder.name]

    def refuse(*_: Any) -> Iterator[TrainExample]:
        raise AssertionError("tokenised twice")

    monkeypatch.setattr(TASK, "training_examples", refuse)
    second = prepare(config)
    assert (second.folder, second.fingerprint, second.held_out) == (
        first.folder,
        first.fingerprint,
        first.held_out,
    )


def test_the_fingerprint_covers_what_examples_depend_on(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "tree")
    settings = [
        "train.sequence_length=40",
        "eval.num_lines=19",
        "eval.max_new_tokens=15",
        "data.held_out_fraction=0.5",
    ]
    fingerprints = [
        prepare(make_config(root, tmp_path, *more)).fingerprint
        for more in [[], *([s] for s in settings)]
    ]
    config = make_config(root, tmp_path)
    fingerprints.append(prepare_dataset(config, make_tokenizer(bos_token="<s>"), TASK).fingerprint)
    assert (
        prepare(make_config(root, tmp_path, "train.steps=7", "seed=5")).fingerprint
        == fingerprints[0]
    )
    used = pickle.loads(pickle.dumps(make_tokenizer()))
    used(["b c d"], truncation=True, max_length=1)  # leaves its settings in the tokenizer
    assert json.loads(used.backend_tokenizer.to_str())["truncation"]
    assert prepare_dataset(config, used, TASK).fingerprint == fingerprints[0]
    (root / "file_1.py").write_text("x = 1\n")
    fingerprints.append(prepare(config).fingerprint)
    assert len(set(fingerprints)) == len(fingerprints) == 7


def _raises(error: Exception) -> Any:
    def fails(*_: Any) -> None:
        raise error

    return fails


def _elsewhere(folder: Path, *rest: Any, **named: Any) -> PreparedData:
    return load_dataset(folder / "not_here", *rest, **named)


def _prepared_by_rank_0(config: Config, spoil: str) -> list[Any]:
    """What each of two ranks gets, an error included; only rank 0 may read the source."""
    task = TASKS.get("completion")
    is_builder = distributed.rank() == 0
    if not is_builder:
        task.read = None
    if spoil == "user" and is_builder:
        task.training_examples = _raises(UserError("bad"))
    if spoil == "program" and is_builder:
        task.training_examples = _raises(KeyError("bad"))
    if spoil == "unseen" and not is_builder:
        prepare_module.load_dataset = _elsewhere
    try:
        data = prepare_dataset(config, make_tokenizer(), task, is_builder=is_builder)
    except Exception as error:
        return [type(error).__name__, str(error)]
    return [data.fingerprint, [vars(example) for example in data.held_out]]


def test_only_the_builder_reads_the_source(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "tree")
    config = make_config(root, tmp_path / "storage")
    first, second = run_ranks(_prepared_by_rank_0, 2, config, "")
    assert len(first[1]) == 20 and first == second


def test_a_rank_that_does_not_see_the_cache_stops_all(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "tree")
    config = make_config(root, tmp_path / "storage")
    first, second = run_ranks(_prepared_by_rank_0, 2, config, "unseen")
    assert first == second and first[0] == "UserError"
    assert re.search("set data.cache .* to a folder that all workers share", first[1])


@pytest.mark.parametrize(
    ("spoil", "of_builder", "of_the_other"),
    [("user", "UserError", "UserError"), ("program", "KeyError", "RuntimeError")],
)
def test_every_rank_hears_of_the_builders_error(
    tmp_path: Path, spoil: str, of_builder: str, of_the_other: str
) -> None:
    root = write_tree(tmp_path / "tree")
    config = make_config(root, tmp_path / "storage")
    first, second = run_ranks(_prepared_by_rank_0, 2, config, spoil)
    assert (first[0], second[0]) == (of_builder, of_the_other)
    assert "bad" in first[1] and "bad" in second[1]
    assert list((tmp_path / "storage" / "cache" / "datasets").iterdir()) == []


def test_a_subclass_does_not_read_the_examples_of_its_base(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "tree")
    config = make_config(root, tmp_path / "storage")
    mine = config.model_copy(update={"task": "mine:Longer"})
    first = prepare_dataset(config, make_tokenizer(), TASK)
    second = prepare_dataset(mine, make_tokenizer(), TASK)
    assert first.folder != second.folder


def test_a_new_version_of_a_task_makes_its_examples_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(write_tree(tmp_path / "tree"), tmp_path / "storage")
    first = prepare(config)
    monkeypatch.setattr(LineCompletion, "version", LineCompletion.version + 1)
    assert prepare(config).folder != first.folder


def test_a_source_that_changes_meanwhile(tmp_path: Path) -> None:
    config = make_config(write_tree(tmp_path / "tree"), tmp_path)
    source = tree(config, tmp_path)
    source.train[1].path.write_text("x = 1\n")
    with pytest.raises(UserError, match="changed while it was read"):
        list(TASK.training_examples(source, make_tokenizer(), config))
    source.held_out[0].path.unlink()
    with pytest.raises(UserError, match="No such file"):
        TASK.evaluation_examples(source, make_tokenizer(), config)
