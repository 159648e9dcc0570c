"""The options of line completion: fewer lines of context, no comments, a place within a line, a gap
to fill, and passages found in the training files.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken

from lwo_dist.config import Config
from lwo_dist.config.reading import load_config
from lwo_dist.data.comments import comment_mark, is_comment
from lwo_dist.data.examples import (
    EvalExample,
    LineTokenizer,
    TrainExample,
    continuations,
    text_start,
)
from lwo_dist.data.pairs import Pair, Pairs
from lwo_dist.data.source_tree import SourceTree
from lwo_dist.errors import UserError
from lwo_dist.registry import TASKS
from lwo_dist.tasks.completion import LineCompletion
from lwo_dist.tasks.prepare import prepare_dataset
from tests.code_samples import END_OF_TEXT, KINDS, code, make_config, tokenizer_of_kind, write_tree

TASK: LineCompletion = TASKS.get("completion")
QWEN = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
CODE_LLAMA = ("\u2581<PRE>", "\u2581<SUF>", "\u2581<MID>", "\u2581<EOT>")


def setting(folder: Path, *overrides: str) -> tuple[Config, SourceTree, dict[str, str]]:
    config = make_config(write_tree(folder / "tree"), folder, *overrides)
    source = TASK.read(config.data, folder)
    return config, source, {f.name: f.path.read_text() for f in (*source.held_out, *source.train)}


def as_read(kind: str, text: str) -> str:
    """Metaspace takes a space at the start of a text for the one that it would put there."""
    return text.lstrip(" ") if kind == "metaspace" else text


def with_tokens(kind: str, names: tuple[str, ...]) -> Any:
    tokenizer = tokenizer_of_kind.__wrapped__(kind)
    if kind == "gpt2":  # its tokenizer is shared, too
        tokenizer = type(tokenizer)(
            tokenizer_object=type(tokenizer.backend_tokenizer).from_str(
                tokenizer.backend_tokenizer.to_str()
            ),
            eos_token=END_OF_TEXT,
        )
    tokenizer.add_tokens([AddedToken(name, normalized=False, special=True) for name in names])
    return tokenizer


def asked(source: SourceTree | Pairs, tokenizer: Any, config: Config) -> list[EvalExample]:
    return [e for e in TASK.evaluation_examples(source, tokenizer, config) if hasattr(e, "target")]


@pytest.mark.parametrize("kind", KINDS)
def test_a_context_of_so_many_lines(kind: str, tmp_path: Path) -> None:
    config, source, texts = setting(
        tmp_path, "completion.context_lines=3", "train.sequence_length=600"
    )
    tokenizer = tokenizer_of_kind(kind)
    examples = asked(source, tokenizer, config)
    assert len(examples) == 20
    for example in examples:
        lines = texts[example.name].splitlines(keepends=True)[: example.line - 1]
        context = example.context[len(text_start(tokenizer)) :]
        written = continuations(tokenizer, [context])[0] + example.begins_with
        # A blank line at its start may be missing, where one token holds several line ends; and the
        # first token may hold the end of the line before.
        expected = "".join(lines[-3:]).lstrip("\n")
        assert written.endswith(expected)
        more = written.removesuffix(expected)
        assert continuations(tokenizer, [context[:1]])[0].startswith(more)
    assert any(example.line > 5 for example in examples)


def test_comments_are_left_out(tmp_path: Path) -> None:
    everything = "eval.num_lines=10000"
    tokenizer = tokenizer_of_kind("gpt2")
    found = []
    for folder, more in ((tmp_path / "a", []), (tmp_path / "b", ["completion.skip_comments=true"])):
        config, source, _ = setting(folder, everything, *more)
        found.append(asked(source, tokenizer, config))
    every, some = found
    assert [e for e in every if not e.text.startswith("#")] == some
    assert 0 < len(some) < len(every)


def test_what_is_a_comment() -> None:
    assert [comment_mark(name) for name in ("a/b.py", "a.go", "x.sql", "Makefile", "q.RS")] == [
        "#",
        "//",
        "--",
        "#",
        "//",
    ]
    yes = [
        ("  # x", "a.py"),
        ("// x", "a.ts"),
        ("/* x */", "a.c"),
        (" * x", "a.java"),
        (" *", "a.java"),
        (" */", "a.java"),
    ]
    no = [("x = 1  # x", "a.py"), ("// x", "a.py"), ("*p = 3;", "a.c"), ("# include", "a.c")]
    assert all(is_comment(*pair) for pair in yes) and not any(is_comment(*pair) for pair in no)


@pytest.mark.parametrize("kind", KINDS)
def test_a_place_within_a_line(kind: str, tmp_path: Path) -> None:
    config, source, texts = setting(
        tmp_path, "completion.mid_line=true", "train.sequence_length=900"
    )
    tokenizer = tokenizer_of_kind(kind)
    tokenize = LineTokenizer(tokenizer)
    start = text_start(tokenizer)
    examples = asked(source, tokenizer, config)
    assert len(examples) == 20
    within = 0
    for example in examples:
        line = texts[example.name].split("\n")[example.line - 1]
        before = "".join(texts[example.name].splitlines(keepends=True)[: example.line - 1])
        assert line.endswith(example.text) and example.text.strip()
        known = before + line[: len(line) - len(example.text)]
        assert known.rpartition("\n")[2].strip()
        # The context and the known start of the answer are the text up to the place, and the tokens
        # those of the whole text; the text up to the place alone has the same.
        context = tokenizer.decode(
            example.context[len(start) :], clean_up_tokenization_spaces=False
        )
        assert as_read(kind, context + example.begins_with) == as_read(kind, known)
        whole = tokenizer(texts[example.name])["input_ids"]
        size = len(example.context)
        assert whole[: size + len(example.target)] == [*example.context, *example.target]
        assert tokenizer(known)["input_ids"][:size] == list(example.context)
        assert tokenize.texts[example.target[0]].startswith(example.begins_with)
        within += tokenize.texts[example.target[0]] != example.begins_with
        if len(example.target) < config.eval.max_new_tokens:
            assert TASK.decode(tokenizer, example, list(example.target)) == example.text
    assert within > 3 or kind == "llama2"  # whose tokens here are single signs
    assert examples == asked(source, tokenizer, config)


@pytest.mark.parametrize(("kind", "names"), [("gpt2", QWEN), ("llama2", CODE_LLAMA)])
def test_a_gap_to_fill(kind: str, names: tuple[str, ...], tmp_path: Path) -> None:
    config, source, texts = setting(
        tmp_path, "completion.fim_rate=0", "train.sequence_length=2000", "eval.num_lines=12"
    )
    tokenizer = with_tokens(kind, names)
    prefix, suffix, middle, *end = tokenizer.convert_tokens_to_ids(list(names))
    examples = asked(source, tokenizer, config)
    assert len(examples) == 12
    for example in examples:
        context = list(example.context)
        start = text_start(tokenizer)
        assert context[: len(start)] == start and len(start) == (kind == "llama2")
        context = context[len(start) :]
        lines = texts[example.name].splitlines(keepends=True)
        assert (context[0], context[-1]) == (prefix, middle)
        cut = context.index(suffix)
        before = tokenizer.decode(context[1:cut], clean_up_tokenization_spaces=False)
        after = continuations(tokenizer, [context[cut + 1 : -1]])[0]
        assert before == "".join(lines[: example.line - 1])
        assert after == "\n" + "".join(lines[example.line :])
        assert example.begins_with == "" and example.text + "\n" == lines[example.line - 1]
        if len(example.target) < config.eval.max_new_tokens:
            assert example.target[-1] == (end[0] if end else tokenizer.eos_token_id)
            assert TASK.decode(tokenizer, example, [*example.target, 5]) == example.text
        shown = TASK.context_shown(tokenizer, example)
        assert shown == "\n".join("".join(lines[: example.line - 1]).split("\n")[-4:-1])
    assert set(end) <= set(TASK.end_token_ids(tokenizer))


def test_a_gap_in_a_long_file_gets_the_nearest_lines(tmp_path: Path) -> None:
    config, source, texts = setting(
        tmp_path, "completion.fim_rate=0", "completion.mid_line=true", "train.sequence_length=100"
    )
    tokenizer = with_tokens("gpt2", QWEN)
    _, suffix, _ = tokenizer.convert_tokens_to_ids(list(QWEN))
    full = 0
    for example in asked(source, tokenizer, config):
        context = list(example.context)
        assert len(context) + config.eval.max_new_tokens <= 100
        cut = context.index(suffix)
        parts = [context[1:cut], context[cut + 1 : -1]]
        before, after = (tokenizer.decode(p, clean_up_tokenization_spaces=False) for p in parts)
        text = texts[example.name]
        line = text.split("\n")[example.line - 1]
        known = line.removesuffix(example.text)
        assert known and before.endswith(known)
        assert f"{before}{example.text}{after}" in text
        full += len(context) > 100 - config.eval.max_new_tokens - 20
    assert full > 5


@pytest.mark.parametrize("setting", ["completion.fim_rate=0", "completion.context_lines=2"])
def test_only_one_sign_ends_a_line(setting: str, tmp_path: Path) -> None:
    """A page break, a line separator and others are within a line."""
    for i in range(6):
        lines = [f"x_{i} = {j}\f y\u2028 z\x0b w\n" for j in range(8)]
        (tmp_path / f"{i}.py").write_text("".join(lines))
    config = make_config(tmp_path, tmp_path / "s", setting, "train.sequence_length=600")
    source = TASK.read(config.data, tmp_path)
    tokenizer = with_tokens("gpt2", QWEN)
    examples = asked(source, tokenizer, config)
    assert len(examples) >= 7
    for example in examples:
        assert example.text.startswith("x_") and example.text.endswith(" w")
        j = int(example.text.split()[2])
        assert example.line == j + 1
        known = tokenizer.decode(example.context, skip_special_tokens=True) + example.begins_with
        numbers = [int(part.split()[0]) for part in known.split(" = ")[1:]]
        around = [*range(max(j - 2, 0), j)] if "lines" in setting else [*range(j), *range(j + 1, 8)]
        assert numbers == around


def test_a_share_of_the_training_windows_is_rearranged(tmp_path: Path) -> None:
    tokenizer = with_tokens("gpt2", QWEN)
    prefix, suffix, middle = tokenizer.convert_tokens_to_ids(list(QWEN))
    found: dict[float, list[TrainExample]] = {}
    for rate in (0, 0.5, 1):
        folder = tmp_path / str(rate)
        config, source, _ = setting(folder, f"completion.fim_rate={rate}")
        found[rate] = list(TASK.training_examples(source, tokenizer, config))
        assert found[rate] == list(TASK.training_examples(source, tokenizer, config))
    plain = found[0]
    assert not any(suffix in example.input_ids for example in plain)
    changed = sum(example.input_ids[0] == prefix for example in found[0.5])
    assert 0.3 < changed / len(found[0.5]) < 0.7
    whole = "".join(file.path.read_text() for file in source.train)
    learned = ""
    for example in found[1]:
        tokens = list(example.input_ids)
        assert len(tokens) <= 48
        assert example.target_start == 0 and tokens[0] == prefix
        b, c = tokens.index(suffix), tokens.index(middle)
        assert tokens[-1] == tokenizer.eos_token_id and b < c
        parts = [tokens[1:b], tokens[c + 1 : -1], tokens[b + 1 : c]]
        text = "".join(tokenizer.decode(p, clean_up_tokenization_spaces=False) for p in parts)
        assert text in whole
        learned += text
    assert len(learned) > 0.95 * len(whole)


def test_a_tokenizer_without_a_gap(tmp_path: Path) -> None:
    config, source, _ = setting(tmp_path, "completion.fim_rate=0.5")
    tokenizer = tokenizer_of_kind("gpt2")
    makers: list[Callable[..., Any]] = [TASK.training_examples, TASK.evaluation_examples]
    for make in makers:
        with pytest.raises(UserError, match="completion.fim_rate needs a model with tokens") as e:
            list(make(source, tokenizer, config))
        assert "\n" not in str(e.value)


def test_lines_that_a_data_set_gives_begin_as_texts_do(tmp_path: Path) -> None:
    tokenizer = tokenizer_of_kind("gemma")
    pair = Pair("x = 1\ny = ", "x + 1", "a", 1)
    source = Pairs("s", (pair, pair), (pair, pair), {})
    config = make_config(tmp_path, tmp_path)
    for example in TASK.training_examples(source, tokenizer, config):
        assert [*example.input_ids[:1]] == text_start(tokenizer) and example.target_start == 1
    for example in asked(source, tokenizer, config):
        assert [*example.context[:1]] == text_start(tokenizer)


def write_similar(root: Path) -> Path:
    """Held-out and training files that share rare words, pair by pair."""
    root.mkdir()
    for i in range(8):
        for twin in "ab":
            head = "".join(f"value_{j} = zebra{i} + {twin}{j}\n" for j in range(12))
            (root / f"{i}{twin}.py").write_text(head + code(i, 20))
    return root


def test_passages_of_the_training_files_before_a_context(tmp_path: Path) -> None:
    tokenizer = tokenizer_of_kind("gpt2")
    root = write_similar(tmp_path / "tree")
    settings = ("train.sequence_length=400", "eval.num_lines=60")
    plain = make_config(root, tmp_path, *settings)
    config = make_config(root, tmp_path, *settings, "data.retrieval=2")
    source = TASK.read(config.data, tmp_path)
    train = {file.name: file.path.read_text() for file in source.train}
    twins = 0
    examples = asked(source, tokenizer, config)
    without = asked(source, tokenizer, plain)
    assert len(examples) == len(without) == 60
    for example, other in zip(examples, without, strict=True):
        assert (example.target, example.text, example.begins_with) == (
            other.target,
            other.text,
            other.begins_with,
        )
        assert len(example.context) + config.eval.max_new_tokens <= 400
        text = tokenizer.decode(example.context, clean_up_tokenization_spaces=False)
        alone = tokenizer.decode(other.context, clean_up_tokenization_spaces=False)
        passages = text.split("# ")
        names = [name for name in train if f"# {name}\n" in text]
        assert 1 <= len(names) <= 2 and passages[0] == ""
        # Whole lines of the files that are named, then the context.
        start = text.rindex("# " + max(names, key=lambda name: text.rindex(f"# {name}\n")))
        name, _, rest = text[start + 2 :].partition("\n")
        size = next(n for n in range(len(rest), -1, -1) if rest[:n] and rest[:n] in train[name])
        context = rest[size:] if rest[size:] else alone
        assert alone.endswith(context) or context in alone
        twin = example.name.replace("a.py", "#").replace("b.py", "a.py").replace("#", "b.py")
        if twin in train and example.line < 12:
            twins += 1
            assert twin in names
    assert twins > 3
    assert examples == asked(source, tokenizer, config)


def test_passages_before_training_windows_are_of_other_files_and_not_learned(
    tmp_path: Path,
) -> None:
    tokenizer = tokenizer_of_kind("gpt2")
    root = write_similar(tmp_path / "tree")
    settings = ("train.sequence_length=160", "data.retrieval=3", "data.retrieval_in_training=true")
    config = make_config(root, tmp_path, *settings)
    source = TASK.read(config.data, tmp_path)
    learned, found = [], 0
    files = iter(source.train)
    file = next(files)
    for example in TASK.training_examples(source, tokenizer, config):
        assert len(example.input_ids) <= 160
        learned += example.input_ids[example.target_start :]
        before = tokenizer.decode(example.input_ids[: example.target_start])
        names = [other.name for other in source.train if f"# {other.name}\n" in before]
        assert file.name not in names
        found += bool(names)
        if example.input_ids[-1] == tokenizer.eos_token_id:
            file = next(files, file)
    whole = []
    for each in source.train:
        whole += [*LineTokenizer(tokenizer)(each.path.read_text()).tokens, tokenizer.eos_token_id]
    assert learned == whole  # every token once, as without passages
    assert found > len(source.train)


def test_prepared_examples_follow_the_options(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "tree")
    tokenizer = with_tokens("gpt2", QWEN)
    options = [
        [],
        ["completion.context_lines=3"],
        ["completion.skip_comments=true"],
        ["completion.mid_line=true"],
        ["completion.fim_rate=0"],
        ["data.retrieval=2"],
        ["data.retrieval=2", "data.retrieval_in_training=true"],
    ]
    prepared = [prepare_dataset(make_config(root, tmp_path, *o), tokenizer, TASK) for o in options]
    assert len({data.fingerprint for data in prepared}) == len(options)
    explicit = ["completion.mid_line=false", "completion.context_lines=null", "data.retrieval=0"]
    same = prepare_dataset(make_config(root, tmp_path, *explicit), tokenizer, TASK)
    assert same.fingerprint == prepared[0].fingerprint


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["completion.context_lines=0"], "completion.context_lines"),
        (["completion.fim_rate=2"], "completion.fim_rate"),
        (["data.retrieval=-1"], "data.retrieval"),
        (["data.retrieval_in_training=true"], "needs data.retrieval, how many to put"),
    ],
)
def test_options_that_cannot_be(settings: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        load_config(None, settings)
    assert "\n" not in str(error.value)


def test_options_without_effect() -> None:
    given = load_config(None, ["data.format=repobench", "completion.mid_line=true"])
    with pytest.raises(UserError, match="completion.mid_line has no effect with data.format"):
        TASK.check(given)
    given = load_config(None, ["data.format=repobench", "data.retrieval=2"])
    with pytest.raises(UserError, match="data.retrieval has no effect with data.format"):
        TASK.check(given)

    class Alone(LineCompletion):
        name = "alone"
        retrieves = False

    with pytest.raises(UserError, match="data.retrieval = 2 has no effect with the task alone"):
        Alone().check(load_config(None, ["data.retrieval=2"]))
