"""Which functions are found in a file of each language, and how they are taken apart."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import pytest

from lwo_dist.data import functions
from lwo_dist.data.functions import LONGEST, code_tokens, find_functions, language_of, summary_of
from lwo_dist.errors import UserError


def found(text: str, name: str) -> list[dict[str, Any]]:
    return [dataclasses.asdict(function) for function in find_functions(text, name)[0]]


PYTHON = '''\
class Tree:
    @cached
    async def find(self, key: str) -> int:
        """Find a key.

            Deeper.
        """
        # Start.
        def inner():
            """Not counted twice."""
            return 1

        return inner()

    def plain(self): return 2


def once(x): "One line only."; return x
def escaped():
    r"""A \\d+ pattern."""  # noqa
    return 3
def formatted():
    f"""Not {a} docstring."""
'''
JAVA = """\
class A {
    /**
     * Adds one.
     *
     * @param x a number
     */
    @Override
    public int add(int x) {
        return x + 1;
    }

    int add(int x, int y) { return x + y; }
    abstract int none();
    // Not documentation.
    A() { }
}
"""
JAVASCRIPT = """\
/** Doubles. */
export function twice(x) {
  return 2 * x;
}
/** Halves. */
const half = (x) => {
  return x / 2;
};
// Not documentation.
exports.plain = function () { return 1; };
const square = (x) => x * x;
list.map(function (x) { return x; });
class A { static *all() { yield 1; } }
"""
TYPESCRIPT = """\
function pick(a: string): void;
function pick(a: any): void { log(a); }
export class B<T> {
  /** Loads it. */
  @Log()
  async load(url: string): Promise<T> {
    return get(url);
  }
}
"""
GO = """\
package a

// Push adds one.
// It grows.
//
//go:noinline
func (s *Stack[T]) Push(x T) { s.xs = append(s.xs, x) }

// Far away.

func far() {}
"""
C = """\
/**
 * @brief Adds two.
 */
static int *add(int a, int b)
{
    return a + b;
}
int declared(int);
"""
CPP = """\
namespace n {
/// Gets it.
/// Fast.
template <class T>
T Box<T>::get() const { return x; }
struct S { S() : x(1) { } S(const S&) = default; };
}
"""
RUST = """\
/// Draws.
#[inline]
pub fn draw(x: u8) -> u8 { x }
impl Shape for Circle {
    //// Not documentation.
    fn area(&self) -> f64 {
        1.0
    }
}
trait T { fn none(&self); }
"""


# name: (line, signature, docstring, body)
EXPECTED: dict[str, tuple[str, dict[str, tuple[int, str, str, str]]]] = {
    "a.py": (
        PYTHON,
        {
            "Tree.find": (
                2,
                "@cached\nasync def find(self, key: str) -> int:",
                "Find a key.\n\nDeeper.",
                "    # Start.\n    def inner():\n"
                '        """Not counted twice."""\n        return 1\n\n    return inner()',
            ),
            "Tree.plain": (15, "def plain(self):", "", "return 2"),
            "once": (18, "def once(x):", "One line only.", "return x"),
            "escaped": (19, "def escaped():", r"A \d+ pattern.", "    return 3"),
            "formatted": (22, "def formatted():", "", '    f"""Not {a} docstring."""'),
        },
    ),
    "A.java": (
        JAVA,
        {
            "A.add": (
                7,
                "@Override\npublic int add(int x)",
                "Adds one.\n\n@param x a number",
                "    return x + 1;\n}",
            ),
            "A.add'": (12, "int add(int x, int y)", "", "return x + y; }"),
            "A.A": (15, "A()", "", "}"),
        },
    ),
    "a.mjs": (
        JAVASCRIPT,
        {
            "twice": (2, "export function twice(x)", "Doubles.", "  return 2 * x;\n}"),
            "half": (6, "const half = (x) =>", "Halves.", "  return x / 2;\n};"),
            "exports.plain": (10, "exports.plain = function ()", "", "return 1; };"),
            "A.all": (13, "static *all()", "", "yield 1; }"),
        },
    ),
    "a.ts": (
        TYPESCRIPT,
        {
            "pick": (2, "function pick(a: any): void", "", "log(a); }"),
            "B.load": (
                5,
                "@Log()\nasync load(url: string): Promise<T>",
                "Loads it.",
                "  return get(url);\n}",
            ),
        },
    ),
    "a.tsx": (
        "const A = () => { return <p/>; };\n",
        {"A": (1, "const A = () =>", "", "return <p/>; };")},
    ),
    "a.go": (
        GO,
        {
            "Stack.Push": (
                7,
                "func (s *Stack[T]) Push(x T)",
                "Push adds one.\nIt grows.",
                "s.xs = append(s.xs, x) }",
            ),
            "far": (11, "func far()", "", "}"),
        },
    ),
    "a.c": (
        C,
        {
            "add": (
                4,
                "static int *add(int a, int b)",
                "@brief Adds two.",
                "    return a + b;\n}",
            )
        },
    ),
    "a.cpp": (
        CPP,
        {
            "n.Box<T>::get": (
                4,
                "template <class T>\nT Box<T>::get() const",
                "Gets it.\nFast.",
                "return x; }",
            ),
            "n.S.S": (6, "S() : x(1)", "", "}"),
        },
    ),
    "a.rs": (
        RUST,
        {
            "draw": (2, "#[inline]\npub fn draw(x: u8) -> u8", "Draws.", "x }"),
            "Shape for Circle.area": (6, "fn area(&self) -> f64", "", "    1.0\n}"),
        },
    ),
}


@pytest.mark.parametrize("file", EXPECTED)
def test_functions_of_each_language(file: str) -> None:
    text, expected = EXPECTED[file]
    functions, skipped = find_functions(text, file)
    assert skipped == {}
    seen: dict[str, tuple[int, str, str, str]] = {}
    for function in functions:
        name = function.name + "'" * (function.name in seen)
        seen[name] = (function.line, function.signature, function.docstring, function.body)
        assert function.file == file
        assert function.language == {"a.tsx": "typescript"}.get(file, language_of(file))
        first = function.signature.split("\n")[0]
        assert first in text.split("\n")[function.line - 1]
    assert seen == expected


@pytest.mark.parametrize(
    ("file", "name", "head", "code"),
    [
        (
            "a.py",
            "escaped",
            'def escaped():\n    r"""A \\d+ pattern."""  # noqa',
            "def escaped():\n    return 3",
        ),
        ("a.py", "once", 'def once(x): "One line only."', "def once(x): return x"),
        (
            "A.java",
            "A.add",
            "/**\n * Adds one.\n *\n * @param x a number\n */\n@Override\npublic int add(int x) {",
            "@Override\npublic int add(int x) {\n    return x + 1;\n}",
        ),
        (
            "a.go",
            "Stack.Push",
            "// Push adds one.\n// It grows.\n//\n//go:noinline\nfunc (s *Stack[T]) Push(x T) {",
            "func (s *Stack[T]) Push(x T) { s.xs = append(s.xs, x) }",
        ),
        (
            "a.rs",
            "draw",
            "/// Draws.\n#[inline]\npub fn draw(x: u8) -> u8 {",
            "#[inline]\npub fn draw(x: u8) -> u8 { x }",
        ),
    ],
)
def test_head_and_code(file: str, name: str, head: str, code: str) -> None:
    function = next(f for f in find_functions(EXPECTED[file][0], file)[0] if f.name == name)
    assert (function.head, function.code) == (head, code)


def test_head_and_body_make_the_function_as_written() -> None:
    text = 'def f(a,\n      b):\n    """Say.\n\n    More.\n    """\n    x = a\n\n    return b\n'
    [function] = find_functions(text, "a.py")[0]
    assert f"{function.head}\n{function.body}\n" == text
    # A method is moved to the left margin whole.
    method = "class A:\n" + "".join(f"  {line}".rstrip() + "\n" for line in text.splitlines())
    [same] = find_functions(method, "a.py")[0]
    assert (same.head, same.body) == (function.head, function.body)


def test_a_header_of_c_or_of_cpp() -> None:
    plain, classes = "int f(void) { int class = 1; return class; }\n", CPP
    assert found(plain, "a.h")[0]["language"] == "c"
    assert [f["name"] for f in found(classes, "a.h")] == ["n.Box<T>::get", "n.S.S"]


def test_skipped_and_counted() -> None:
    text = "def good():\n    return 1\n\ndef bad():\n    return (1 +\n\ndef fine():\n    return 2\n"
    functions, skipped = find_functions(text, "a.py")
    assert "good" in [function.name for function in functions]
    assert "bad" not in [function.name for function in functions]
    assert skipped == {"function with a syntax error": 1}
    lines = "    x = 1\n" * (LONGEST // 10 + 1)
    functions, skipped = find_functions(f"def long():\n{lines}\ndef f():\n    pass\n", "a.py")
    assert [function.name for function in functions] == ["f"]
    assert skipped == {"huge function": 1}


@pytest.mark.parametrize("text", ["(" * 100_000, "{" * 100_000, "def f():\n" * 3000, "\ufffd"])
@pytest.mark.parametrize("name", ["a.py", "a.rs", "a.ts"])
def test_odd_files_end(text: str, name: str) -> None:
    find_functions(text, name)


def test_no_grammar() -> None:
    assert language_of("a/b.zig") is None and language_of("Makefile") is None
    assert find_functions("fn f() {}", "b.zig") == ([], {})


def test_text_that_is_not_ascii_is_cut_at_characters() -> None:
    text = 'x = "ä€😀"\nclass Ä:\n  def ö(self):\n    """Größe der Welt."""\n    return "ß"\n'
    [function] = found(text, "a.py")
    assert (function["name"], function["docstring"]) == ("Ä.ö", "Größe der Welt.")
    assert function["body"] == '  return "ß"'


def test_layout_and_comments_make_no_tokens() -> None:
    one = code_tokens("int f(int x) { return x + 1; } // one", "java")
    assert one == code_tokens("int f(int x)\n{\n  /* two */ return x+1;\n}", "java")
    assert one != code_tokens("int f(int x) { return x + 2; }", "java")
    assert code_tokens("def f():\n  return ' a  b'\n", "python") != code_tokens(
        "def f():\n  return ' a b'\n", "python"
    )


@pytest.mark.parametrize(
    ("docstring", "sentence", "reason"),
    [
        ("Add two numbers. Then more.\n\nDeeper.", "Add two numbers.", ""),
        ("Add two\nnumbers to each other\n\nMore.", "Add two numbers to each other", ""),
        ("Opens e.g. a file (v1.2) of it.", "Opens e.g. a file (v1.2) of it.", ""),
        ("Adds two numbers\n@param x one\n@return both", "Adds two numbers", ""),
        ("Add these two numbers\nArgs:\n    x: one", "Add these two numbers", ""),
        ("@brief Adds two numbers. Slow.", "Adds two numbers.", ""),
        ("Returns the {@link List} of <code>x</code>.<p>More.", "Returns the List of x.", ""),
        ("Add two.", "Add two.", "docstring too short"),
        ("", "", "docstring too short"),
        ("@param x only this one here", "", "docstring too short"),
        ("word " * 257, ("word " * 257).strip(), "docstring too long"),
        (
            "See https://a.b for all of it.",
            "See https://a.b for all of it.",
            "docstring with an address",
        ),
        ("计算 两个 数字 的 和 x", "计算 两个 数字 的 和 x", "docstring not in English"),
    ],
)
def test_the_first_sentence(docstring: str, sentence: str, reason: str) -> None:
    assert summary_of(docstring) == (sentence, reason)


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tree_sitter_go", None)
    monkeypatch.setattr("lwo_dist.extras._is_installed", lambda module: module != "tree_sitter_go")
    functions._parser.cache_clear()
    with pytest.raises(UserError) as raised:
        find_functions(GO, "a.go")
    functions._parser.cache_clear()
    assert str(raised.value) == (
        "reading functions from source code needs packages that are not installed"
        " (tree_sitter_go): pip install 'lwo-dist[code]'"
    )
