"""Training pairs before the prompts of tasks from text to text: which ones, in which form, in which
room.
"""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from lwo_dist.config import Config
from lwo_dist.data.examples import EvalExample, Note, TrainExample
from lwo_dist.data.pairs import Pair, Pairs
from lwo_dist.registry import TASKS
from lwo_dist.tasks.pairs import PairTask
from lwo_dist.tasks.prepare import prepare_dataset
from tests.code_samples import KINDS, make_config, make_tokenizer, tokenizer_of_kind

REPAIR: PairTask = TASKS.get("repair")
DEFECT: PairTask = TASKS.get("defect")
TRAIN = [
    ("red green blue", "first answer"),
    ("red green", "second answer"),
    ("red", "third answer"),
    ("black", "fourth answer"),
]
HELD_OUT = [("blue green red one", "own answer"), ("blue green red two", "other answer")]
CHAT = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|stop|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def pairs_of(texts: list[tuple[str, str]], name: str = "a.jsonl") -> tuple[Pair, ...]:
    return tuple(Pair(*text, name, i, "python") for i, text in enumerate(texts, 1))


SOURCE = Pairs("a", pairs_of(TRAIN), pairs_of(HELD_OUT, "b.jsonl"), {})


ROOM = ("data.format=jsonl", "train.sequence_length=400", "eval.max_new_tokens=50")


def small(*overrides: str) -> Config:
    return make_config(Path("a"), Path("b"), *ROOM, *overrides)


def asked(task: PairTask, source: Pairs, tokenizer: Any, config: Config) -> list[EvalExample]:
    found = task.evaluation_examples(source, tokenizer, config)
    return [item for item in found if isinstance(item, EvalExample)]


def learned(source: Pairs, tokenizer: Any, config: Config) -> list[TrainExample]:
    found = REPAIR.training_examples(source, tokenizer, config)
    return [item for item in found if isinstance(item, TrainExample)]


def example(source: str, target: str) -> str:
    return f"# buggy\n{source}\n# fixed\n{target}\n\n"


@pytest.mark.parametrize("kind", KINDS)
def test_the_nearest_pairs_come_before_the_prompt_with_their_answers(kind: str) -> None:
    tokenizer = tokenizer_of_kind(kind)
    (first, _) = asked(REPAIR, SOURCE, tokenizer, small("data.retrieval=2"))
    text = tokenizer.decode(first.context, skip_special_tokens=True) + first.begins_with
    assert text == example(*TRAIN[1]) + example(*TRAIN[0]) + REPAIR.prompt(SOURCE.held_out[0])
    whole = tokenizer(text + "own answer")["input_ids"]
    assert [*first.context, *first.target] == [*whole, tokenizer.eos_token_id]
    assert REPAIR.decode(tokenizer, first, list(first.target)) == first.text == "own answer"


def test_only_pairs_that_share_words_are_found() -> None:
    (first, _) = asked(REPAIR, SOURCE, make_tokenizer(), small("data.retrieval=9"))
    text = make_tokenizer().decode(first.context)
    assert text.count("# buggy") == 4 and "black" not in text


def test_a_training_pair_never_sees_itself_nor_an_equal_one() -> None:
    tokenizer = make_tokenizer()
    source = Pairs("a", pairs_of([*TRAIN, TRAIN[0]]), SOURCE.held_out, {})
    config = small("data.retrieval=3", "data.retrieval_in_training=true")
    found = learned(source, tokenizer, config)
    for pair, with_examples in zip(source.train, found, strict=True):
        before = tokenizer.decode(with_examples.input_ids[: with_examples.target_start])
        assert pair.target not in before
        counts = [before.count(f"{target}\n") for _, target in TRAIN]
        assert max(counts) <= 1 and sum(counts) == (0 if pair.source == "black" else 2)
    plain = learned(source, tokenizer, small("data.retrieval=3"))
    for one, other in zip(found, plain, strict=True):
        assert one.input_ids[one.target_start :] == other.input_ids[other.target_start :]
    assert plain == learned(source, tokenizer, small())


def test_no_code_of_the_same_file_in_training() -> None:
    """Held-out code is of other files, too."""
    tokenizer = make_tokenizer()
    train = (*pairs_of(TRAIN[:2], "a.py"), *pairs_of(TRAIN[2:3], "b.py"))
    settings = ("data.retrieval=3", "data.retrieval_in_training=true", "data.format=code")
    (first, *_) = learned(Pairs("a", train, SOURCE.held_out, {}), tokenizer, small(*settings))
    before = tokenizer.decode(first.input_ids[: first.target_start])
    assert before == example(*TRAIN[2]) + REPAIR.prompt(train[0])


@pytest.mark.parametrize("task", [REPAIR, DEFECT], ids=["repair", "defect"])
def test_the_least_similar_give_way_to_the_prompt(task: PairTask) -> None:
    tokenizer = make_tokenizer()
    source = SOURCE
    if task is DEFECT:
        sides = ([(text, "yes") for text, _ in TRAIN], [(text, "no") for text, _ in HELD_OUT])
        source = Pairs("a", pairs_of(sides[0]), pairs_of(sides[1], "b.jsonl"), {})
    nearest = [asked(task, source, tokenizer, small(f"data.retrieval={k}"))[0] for k in range(4)]
    contexts = [list(each.context) for each in nearest]
    answer = 50 if task is REPAIR else max(map(len, nearest[0].choices))
    for length in range(len(contexts[3]) + answer, len(contexts[0]) + answer - 3, -1):
        room = (f"train.sequence_length={length}", f"eval.max_new_tokens={answer}")
        (found, _) = asked(task, source, tokenizer, small("data.retrieval=3", *room))
        fitting = [context for context in contexts if len(context) <= length - answer]
        assert list(found.context) == (fitting or [contexts[0][answer - length :]])[-1]
        assert found.target == nearest[0].target and found.choices == nearest[0].choices


def test_in_training_they_fill_what_the_pair_leaves() -> None:
    tokenizer = make_tokenizer()
    settings = ("data.retrieval=3", "data.retrieval_in_training=true")
    plain = learned(SOURCE, tokenizer, small())
    for length in range(20, 80, 3):
        config = small(*settings, f"train.sequence_length={length}", "eval.max_new_tokens=2")
        kept = [each for each in plain if len(each.input_ids) <= length]
        found = learned(SOURCE, tokenizer, config)
        assert len(found) == len(kept)
        for one, other in zip(found, kept, strict=True):
            assert len(one.input_ids) <= length
            assert one.input_ids[-len(other.input_ids) :] == other.input_ids


def test_worked_examples_of_a_chat_are_turns_after_the_system_s() -> None:
    tokenizer = deepcopy(make_tokenizer(unk_token="<|start|>", pad_token="<|stop|>"))
    tokenizer.chat_template = CHAT
    held_out = [
        Pair("x red", "y", "b", i, messages=(("system", "be brief"), ("user", f"red {i}")))
        for i in range(2)
    ]
    train = (
        Pair("red green", "one", "a", 1, messages=(("system", "be long"), ("user", "green"))),
        Pair("red red", "two", "a", 2),
        Pair("red <|stop|>", "three", "a", 3),
    )
    config = small("data.chat=true", "data.retrieval=3")
    task: PairTask = TASKS.get("generation")
    (first, _) = asked(task, Pairs("a", train, tuple(held_out), {}), tokenizer, config)
    assert tokenizer.decode(first.context) == (
        "<|start|>system\nbe brief<|stop|>\n"
        "<|start|>user\ngreen<|stop|>\n<|start|>assistant\none<|stop|>\n"
        f"<|start|>user\n{task.request(train[1])}<|stop|>\n<|start|>assistant\ntwo<|stop|>\n"
        "<|start|>user\nred 0<|stop|>\n<|start|>assistant\n"
    )


def write_sides(root: Path) -> Path:
    """Sides whose pairs resemble each other more than those of other sides."""
    root.mkdir()
    for side in ("train", "valid", "test"):
        lines = [
            {"source": f"alpha {side} beta{i} gamma", "target": f"answer of {side}{i}"}
            for i in range(6)
        ]
        (root / f"{side}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return root


@pytest.mark.parametrize("scored", ["held_out", "validation"])
def test_what_is_scored_stands_before_no_prompt(scored: str, tmp_path: Path) -> None:
    root = write_sides(tmp_path / "sides")
    settings = (*ROOM, "data.retrieval=4", "data.retrieval_in_training=true")
    config = make_config(root, tmp_path, *settings, f"data.evaluate_on={scored}")
    tokenizer = make_tokenizer()
    data = prepare_dataset(config, tokenizer, REPAIR)
    own = "test" if scored == "held_out" else "valid"
    assert len(data.held_out) == 6
    for each in data.held_out:
        text = tokenizer.decode(each.context)
        assert text.count("answer of") == text.count("answer of train") == 4
        assert text.count(f"alpha {own}") == 1 and each.text.startswith(f"answer of {own}")
    for row in data.train:
        text = tokenizer.decode(row["input_ids"])
        assert text.count("answer of") == text.count("answer of train") == 5


def test_prepared_data_follow_the_settings(tmp_path: Path) -> None:
    root = write_sides(tmp_path / "sides")
    options: list[tuple[str, ...]] = [
        (),
        ("data.retrieval=0",),
        ("data.retrieval=1",),
        ("data.retrieval=2",),
        ("data.retrieval=2", "data.retrieval_in_training=true"),
    ]
    prepared = [
        prepare_dataset(make_config(root, tmp_path, *ROOM, *option), make_tokenizer(), REPAIR)
        for option in options
    ]
    off, explicit, _, held_out_only, both = prepared
    assert off.fingerprint == explicit.fingerprint
    assert len({data.fingerprint for data in prepared}) == 4
    assert held_out_only.train[:] == off.train[:] != both.train[:]
    assert held_out_only.held_out == both.held_out != off.held_out
    again = make_config(root, tmp_path / "again", *ROOM, *options[-1])
    assert prepare_dataset(again, make_tokenizer(), REPAIR).train[:] == both.train[:]


def test_a_pair_that_is_left_out_is_still_noted() -> None:
    source = Pairs("a", pairs_of([*TRAIN, ("red " * 60, "long")]), SOURCE.held_out, {})
    settings = ("data.retrieval=2", "data.retrieval_in_training=true", "train.sequence_length=100")
    found = list(REPAIR.training_examples(source, make_tokenizer(), small(*settings)))
    assert found[-1] == Note("longer than train.sequence_length")
    assert len(found) == 5 and all(isinstance(item, TrainExample) for item in found[:4])
