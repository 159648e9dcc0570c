"""Passages by BM25, against the formula."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lwo_dist.data.retrieval import Passage, Retriever, passages_of, query_of


def named(*texts: str) -> list[Passage]:
    return [Passage(f"{i}.py", 1, text) for i, text in enumerate(texts)]


def retriever_of(*texts: str) -> Retriever[Passage]:
    return Retriever(named(*texts), lambda passage: passage.text)


def by_hand(texts: list[list[str]], query: list[str]) -> list[float]:
    """Of Lucene: k1 = 1.5, b = 0.75, and the idf that is never negative."""
    mean = sum(map(len, texts)) / len(texts)
    scores = []
    for text in texts:
        score = 0.0
        for word in query:
            having = sum(word in other for other in texts)
            idf = math.log(1 + (len(texts) - having + 0.5) / (having + 0.5))
            count = text.count(word)
            score += idf * count / (count + 1.5 * (0.25 + 0.75 * len(text) / mean))
        scores.append(score)
    return scores


def test_the_nearest_are_those_of_the_formula() -> None:
    texts = ["a a b", "a c c c c c c", "b c", "d", "a b c d e f g h", "c a"]
    words = [text.split() for text in texts]
    retriever = retriever_of(*texts)
    for query in ("a", "c", "b c", "a d", "c c a"):
        scores = by_hand(words, query.split())
        order = sorted(range(len(texts)), key=lambda i: (-scores[i], i))
        expected = [f"{i}.py" for i in order if scores[i] > 0]
        assert [passage.name for passage in retriever.nearest(query, 9)] == expected
        assert [passage.name for passage in retriever.nearest(query, 2)] == expected[:2]


def test_what_is_not_found() -> None:
    retriever = retriever_of("alpha beta", "alpha")
    assert [p.name for p in retriever.nearest("ALPHA!", 5)] == ["1.py", "0.py"]
    others = retriever.nearest("alpha", 1, lambda passage: passage.name == "1.py")
    assert [p.name for p in others] == ["0.py"]
    for nothing in ("", "gamma", "( + )", "beta_alphabet"[4:]):
        assert retriever.nearest(nothing, 5) == []
    assert retriever.nearest("alpha", 0) == []
    assert retriever_of().nearest("alpha", 3) == retriever_of("()").nearest("(", 3) == []


def test_equal_ones_come_in_their_order() -> None:
    texts = [*["same words here"] * 40, "other"]
    assert retriever_of(*texts).nearest("words", 30) == named(*texts)[:30]


def test_words_are_parts_of_names() -> None:
    retriever = retriever_of("def read_file(): ...", "x = filed", "y = reads")
    assert [p.name for p in retriever.nearest("file", 3)] == ["0.py"]


@pytest.mark.parametrize(
    ("lines", "starts"),
    [(0, []), (3, [1]), (20, [1]), (21, [1, 11]), (30, [1, 11]), (31, [1, 11, 21])],
)
def test_passages_of_a_text(lines: int, starts: list[int]) -> None:
    text = "".join(f"line {i}\n" for i in range(1, lines + 1))
    found = passages_of("a.py", text)
    assert [passage.line for passage in found] == starts
    for passage in found:
        last = min(passage.line + 19, lines)
        assert passage.text == "".join(f"line {i}\n" for i in range(passage.line, last + 1))


def test_only_one_sign_ends_a_line() -> None:
    text = "a\f\u2028\x1c\x0b\n" * 11
    assert [passage.line for passage in passages_of("a.py", text)] == [1]
    assert query_of(text) == "a\f\u2028\x1c\x0b\n" * 10


def test_the_query_is_the_end() -> None:
    text = "".join(f"{i}\n" for i in range(30)) + "unfinished"
    assert query_of(text) == "".join(f"{i}\n" for i in range(21, 30)) + "unfinished"
    assert query_of("") == ""


def test_jax_stays_out(tmp_path: Path) -> None:
    """With JAX, bm25s computes on the GPU as it is imported, and JAX takes most of its memory."""
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax" / "__init__.py").write_text("raise SystemExit('JAX was imported')")
    use = (
        "import sys; from lwo_dist.data.retrieval import Retriever\n"
        "print(Retriever(['a b', 'c d'], str).nearest('c', 1), 'jax' in sys.modules, flush=True)\n"
        "import jax"
    )
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", use],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr) == ("['c d'] False\n", "JAX was imported\n")
