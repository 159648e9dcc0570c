"""What counts as a near-duplicate of a scored file or pair, and that it is not trained on."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest

from lwo_dist.config import DataConfig
from lwo_dist.data.duplicates import NEAR_DUPLICATE, near_duplicates, similarity
from lwo_dist.data.pairs import Pair, split_pairs
from lwo_dist.data.source_tree import read_source_tree
from lwo_dist.errors import UserError
from tests.code_samples import code


def config(threshold: float | None = 0.85, **settings: Any) -> DataConfig:
    return DataConfig(near_duplicates=threshold, **settings)


def edited(text: str, lines: int) -> str:
    """With so many lines, evenly over the text, changed."""
    rows = text.split("\n")
    for index in range(0, len(rows), max(len(rows) // lines, 1)):
        rows[index] += f"  # {index} edited"
    return "\n".join(rows)


def test_similarity_is_that_of_the_sets_of_5_grams() -> None:
    """Worked by hand: "a b c d e f" has 2 of them, "a b c d e g" one of those and another."""
    assert similarity("a b c d e f", "a b c d e g") == pytest.approx(1 / 3)
    assert similarity("a b c d e f", "a b  c\td e\nf") == 1
    assert similarity("a b c d e f", "f e d c b a") == 0
    assert similarity("f(x)", "f ( x )") == 1 and similarity("f(x)", "f(y)") == 0
    assert similarity("", "") == 0


def test_similarity_by_another_definition() -> None:
    def grams(text: str) -> set[tuple[str, ...]]:
        words = re.findall(r"\w+|[^\w\s]", text)
        return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}

    texts = [code(seed) for seed in range(4)]
    texts += [edited(text, 10) for text in texts]
    for one in texts:
        for other in texts:
            a, b = grams(one), grams(other)
            assert similarity(one, other) == len(a & b) / len(a | b)


@pytest.mark.parametrize("threshold", [0.05, 0.5, 0.85, 1.0])
def test_what_is_found_is_what_is_similar(threshold: float) -> None:
    scored = [code(seed, 60) for seed in range(6)]
    texts = [code(seed, 60) for seed in range(6, 20)] + ["", "x"]
    for text in scored:
        texts += [text.replace("\n", "\n\n"), edited(text, 2), edited(text, 12), edited(text, 30)]
    expected = {
        index
        for index, text in enumerate(texts)
        if any(similarity(text, one) >= threshold for one in scored)
    }
    assert 0 < len(expected) < len(texts)
    assert near_duplicates(texts, scored, config(threshold)) == expected
    # Whatever comes first, and whatever else there is.
    order = random.Random(1).sample(range(len(texts)), len(texts))
    shuffled = near_duplicates([texts[i] for i in order], scored[::-1], config(threshold))
    assert {order[i] for i in shuffled} == expected
    assert near_duplicates(texts[:9], scored, config(threshold)) == {i for i in expected if i < 9}


def test_nothing_is_read_without_a_threshold() -> None:
    def texts() -> Any:
        raise AssertionError("read")
        yield

    assert near_duplicates(texts(), texts(), config(None)) == set()


def write(root: Path, texts: dict[str, str]) -> Path:
    root.mkdir(exist_ok=True)
    for name, text in texts.items():
        (root / name).write_text(text)
    return root


def test_copies_of_held_out_files_are_not_trained_on(tmp_path: Path) -> None:
    """Renamed and slightly edited; the scored files stay what they were, unrelated files too."""
    texts = {f"{seed}.py": code(seed, 60) for seed in range(30)}
    settings = {"validation_fraction": 0.15, "held_out_fraction": 0.15}
    root = write(tmp_path / "tree", texts)
    plain = read_source_tree(DataConfig(source=str(root), **settings), tmp_path)
    chosen = read_source_tree(
        DataConfig(source=str(root), **settings, evaluate_on="validation"), tmp_path
    )
    assert plain.skipped == {}
    copies = {}
    for index, file in enumerate((plain.held_out[0], chosen.held_out[0])):
        for edit in range(6):  # one of them at least is not by chance a scored file itself
            copies[f"copy_{index}_{edit}.py"] = texts[file.name] + f"# {index} {edit} added\n"
    copies["copy_of_train.py"] = texts[plain.train[0].name] + "# once more\n"
    write(root, copies)
    for evaluate_on, before in (("held_out", plain), ("validation", chosen)):
        asked = DataConfig(source=str(root), **settings, evaluate_on=evaluate_on)
        tree = read_source_tree(asked, tmp_path)
        assert {file.name for file in before.held_out} <= {file.name for file in tree.held_out}
        train = {file.name for file in tree.train}
        assert {file.name for file in plain.train} <= train
        assert train & copies.keys() <= {"copy_of_train.py"}
        assert tree.skipped[NEAR_DUPLICATE] >= 4
        without = DataConfig(**{**asked.model_dump(), "near_duplicates": None})
        kept = read_source_tree(without, tmp_path)
        assert len(kept.train) == len(tree.train) + tree.skipped[NEAR_DUPLICATE]
        assert kept.held_out == tree.held_out
        assert kept.identity != tree.identity


def test_copies_of_held_out_pairs_are_not_trained_on() -> None:
    pairs = [Pair(code(seed), "yes", f"{seed}.json", 1) for seed in range(30)]
    held_out = split_pairs(config(), "x", pairs, {}).held_out
    copies = [Pair(edited(pair.source, 1), "yes", "copies.json", 1) for pair in held_out]
    found = split_pairs(config(), "x", [*pairs, *copies], {"empty": 2})
    assert found.held_out == held_out
    assert not set(copies) & set(found.train)
    assert found.skipped == {"empty": 2, NEAR_DUPLICATE: len(copies)}


def test_copies_only(tmp_path: Path) -> None:
    root = write(tmp_path / "tree", {f"{n}.py": code(1, 60) + f"# number {n}\n" for n in range(10)})
    with pytest.raises(UserError) as raised:
        read_source_tree(DataConfig(source=str(root)), tmp_path)
    assert re.fullmatch(
        rf"data\.source = {root}: all \d files to train on are near-duplicates of scored ones; give"
        r" a larger source, or set data\.near_duplicates = null",
        str(raised.value),
    )


def test_the_threshold_is_a_share() -> None:
    for value in (0, 1.1, -1):
        with pytest.raises(ValueError):
            config(value)
