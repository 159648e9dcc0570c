"""The functions and methods of a source file, with their documentation, by tree-sitter.

Grammars know Python, Java, JavaScript, TypeScript, Go, C, C++ and Rust. Documentation is what each
language's own tools take for it: the first string of a Python function (PEP 257), and a comment
right above any other: `/** */` for Java, JavaScript and TypeScript; that, `/*! */`, `///` and `//!`
for C and C++ (Doxygen); `/** */` and `///` for Rust; any comment for Go.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from lwo_dist.extras import require

if TYPE_CHECKING:
    from tree_sitter import Node, Parser

__all__ = ["LONGEST", "Function", "code_tokens", "find_functions", "language_of", "summary_of"]

LONGEST = 20_000
"""Functions of more bytes are skipped: no window of tokens holds them."""

# Language -> the module of its grammar, and the name in it.
_GRAMMARS = {
    "c": ("tree_sitter_c", "language"),
    "cpp": ("tree_sitter_cpp", "language"),
    "go": ("tree_sitter_go", "language"),
    "java": ("tree_sitter_java", "language"),
    "javascript": ("tree_sitter_javascript", "language"),
    "python": ("tree_sitter_python", "language"),
    "rust": ("tree_sitter_rust", "language"),
    "tsx": ("tree_sitter_typescript", "language_tsx"),
    "typescript": ("tree_sitter_typescript", "language_typescript"),
}
_ENDINGS = {
    "c": (".c", ".h"),
    "cpp": (".cc", ".cpp", ".cxx", ".c++", ".hh", ".hpp", ".hxx", ".h++", ".ipp", ".tpp"),
    "go": (".go",),
    "java": (".java",),
    "javascript": (".js", ".jsx", ".mjs", ".cjs"),
    "python": (".py", ".pyw"),
    "rust": (".rs",),
    "tsx": (".tsx",),
    "typescript": (".ts", ".mts", ".cts"),
}
_LANGUAGES = {ending: language for language, endings in _ENDINGS.items() for ending in endings}

_FUNCTIONS = {
    "arrow_function",
    "compact_constructor_declaration",
    "constructor_declaration",
    "function_declaration",
    "function_definition",
    "function_expression",
    "function_item",
    "generator_function",
    "generator_function_declaration",
    "method_declaration",
    "method_definition",
}
_BODIES = {"block", "compound_statement", "constructor_body", "statement_block"}
# What a function is written in -> the field that holds it; "" for the last of its parts.
_WRAPPERS = {
    "assignment_expression": "right",
    "decorated_definition": "definition",
    "export_statement": "declaration",
    "expression_statement": "",
    "field_definition": "value",
    "lexical_declaration": "",
    "pair": "value",
    "public_field_definition": "value",
    "template_declaration": "",
    "variable_declaration": "",
    "variable_declarator": "value",
}
_SCOPES = {
    "class",
    "class_declaration",
    "class_definition",
    "class_specifier",
    "enum_declaration",
    "impl_item",
    "interface_declaration",
    "internal_module",
    "mod_item",
    "namespace_definition",
    "record_declaration",
    "struct_specifier",
    "trait_item",
}
_COMMENTS = {"comment", "line_comment", "block_comment"}
# Parts of a function that stand before it as its siblings.
_PREFIXES = {"attribute_item", "decorator"}
_BLOCK_DOC = re.compile(r"/\*\*(?![*/])")
_DOXYGEN = re.compile(r"/\*\*(?![*/])|/\*!|///(?!/)|//!")
_RUST_DOC = re.compile(r"/\*\*(?![*/])|///(?!/)")
_GO_DOC = re.compile(r"/\*|//(?!go:|nolint|line |export |extern )")
_DOC = {
    "c": _DOXYGEN,
    "cpp": _DOXYGEN,
    "go": _GO_DOC,
    "java": _BLOCK_DOC,
    "javascript": _BLOCK_DOC,
    "rust": _RUST_DOC,
    "tsx": _BLOCK_DOC,
    "typescript": _BLOCK_DOC,
}


@dataclass(frozen=True)
class Function:
    """One function or method with a body. Its texts begin at the left margin."""

    language: str
    name: str
    """With the classes or namespaces around it: "Tree.insert"."""
    signature: str
    """What is before its body, with decorators, annotations and attributes."""
    docstring: str
    """Its documentation without comment marks and common indentation; "" if it has none."""
    head: str
    """Signature and documentation as written, in the language's own order, with the brace that
    opens the body."""
    body: str
    """What follows `head`, from the next line on."""
    code: str
    """The whole function without its documentation."""
    file: str
    line: int
    """Where it begins, from 1."""


def language_of(name: str) -> str | None:
    """The language of a file by its ending; None if there is no grammar for it."""
    return _LANGUAGES.get(PurePosixPath(name).suffix.lower())


def find_functions(text: str, name: str) -> tuple[list[Function], Counter[str]]:
    """The functions of a file, in its order, and why others are skipped (reason -> number).

    A function inside another one is part of that one. Declarations without a body are none. A file
    with syntax errors gives the functions that have none.

    Args:
        text: the file, lines ended by "\\n".
        name: its path, for the language; with no grammar for it, nothing is found.

    Raises:
        UserError: the extra `code` is not installed.
    """
    language = language_of(name)
    if language is None:
        return [], Counter()
    data = text.encode()
    root = _parser(language).parse(data).root_node
    if language == "c" and name.lower().endswith(".h") and root.has_error:
        language = "cpp"
        root = _parser(language).parse(data).root_node
    functions, skipped = [], Counter[str]()
    for found in _walk(root):
        if found.node.has_error:
            skipped["function with a syntax error"] += 1
        elif found.node.end_byte - found.node.start_byte > LONGEST:
            skipped["huge function"] += 1
        else:
            functions.append(_read(found, data, language, name))
    return sorted(functions, key=lambda function: function.line), skipped


def code_tokens(code: str, language: str) -> list[str]:
    """The tokens of a piece of code but comments: equal where two differ in layout only."""
    data = code.encode()
    tokens = []
    stack = [_parser(language).parse(data).root_node]
    while stack:
        node = stack.pop()
        if node.type in _COMMENTS:
            continue
        if node.child_count and not node.type.startswith("string"):
            stack += reversed(node.children)
        else:
            tokens.append(data[node.start_byte : node.end_byte].decode())
    return [token for token in tokens if token.strip()]


@dataclass(frozen=True)
class _Found:
    outer: Node
    """The function with what wraps it, such as `export` or a decorator."""
    node: Node
    body: Node
    name: str
    before: list[Node]
    """The siblings before `outer`."""


def _walk(root: Node) -> Iterator[_Found]:
    """The outermost named functions with a body. No recursion: code may nest without limit."""
    stack = [(root, "")]
    while stack:
        parent, scope = stack.pop()
        children = parent.children
        for index, child in enumerate(children):
            node, name = _unwrap(child)
            if node.type in _FUNCTIONS:
                name = _name_of(node) or name
                body = node.child_by_field_name("body")
                if name and body is not None and body.type in _BODIES:
                    yield _Found(child, node, body, f"{scope}{name}", children[:index])
                    continue
            if child.child_count:
                inner = _scope_name(child) if child.type in _SCOPES else ""
                stack.append((child, f"{scope}{inner}." if inner else scope))


def _unwrap(node: Node) -> tuple[Node, str]:
    """What is declared by a statement, and the name that it gets there, "" for none."""
    name = ""
    while node.type in _WRAPPERS:
        field = _WRAPPERS[node.type]
        parts = node.named_children
        if not field and node.type != "template_declaration" and len(parts) != 1:
            break
        inner = node.child_by_field_name(field) if field else parts[-1]
        if inner is None:
            break
        named = next(
            filter(None, map(node.child_by_field_name, ("name", "left", "key", "property"))), None
        )
        name = _text(named) if named is not None else name
        node = inner
    return node, name


def _name_of(node: Node) -> str:
    named = node.child_by_field_name("name")
    if named is not None:
        receiver = node.child_by_field_name("receiver")  # of a method in Go
        of = re.search(r"(\w+)\s*(?:\[.*\])?\s*\)$", _text(receiver)) if receiver else None
        return f"{of[1]}.{_text(named)}" if of else _text(named)
    declarator = node.child_by_field_name("declarator")  # in C and C++
    while declarator is not None and declarator.type.endswith("_declarator"):
        inner = declarator.child_by_field_name("declarator")
        if inner is None and not declarator.named_children:
            return ""
        declarator = inner if inner is not None else declarator.named_children[-1]
    return _text(declarator) if declarator is not None else ""


def _scope_name(node: Node) -> str:
    named = node.child_by_field_name("name")
    if named is not None:
        return _text(named)
    implemented, trait = map(node.child_by_field_name, ("type", "trait"))  # in Rust
    if implemented is None:
        return ""
    return f"{_text(trait)} for {_text(implemented)}" if trait else _text(implemented)


def _text(node: Node) -> str:
    return (node.text or b"").decode("utf-8", "replace")


def _read(found: _Found, data: bytes, language: str, file: str) -> Function:
    before = list(found.before)
    first = found.outer
    while before and before[-1].type in _PREFIXES:
        first = before.pop()
    start, end = first.start_byte, found.outer.end_byte
    line_start = data.rfind(b"\n", 0, start) + 1
    line = data[line_start:start]
    indent = line[: len(line) - len(line.lstrip())].decode()

    def cut(begin: int, stop: int) -> str:
        return data[begin:stop].decode().replace(f"\n{indent}", "\n")

    if language == "python":
        signature, docstring, head, body, code = _read_python(found, start, end, data, cut)
    else:
        brace = found.body.start_byte
        signature, code = cut(start, brace).rstrip(), cut(start, end).rstrip()
        comments = _comments_above(before, start, data, _DOC[language])
        docstring = _clean("\n".join(_text(comment).rstrip() for comment in comments))
        begin = comments[0].start_byte if docstring else start
        head, body = cut(begin, brace + 1), _after(cut(brace + 1, end).rstrip())
    row = first.start_point[0] + 1
    language = "typescript" if language == "tsx" else language
    return Function(language, found.name, signature, docstring, head, body, code, file, row)


def _read_python(
    found: _Found, start: int, end: int, data: bytes, cut: Callable[[int, int], str]
) -> tuple[str, str, str, str, str]:
    def past_comment(stop: int) -> tuple[int, bool]:
        """Past a comment on the same line, and whether the line ends there."""
        rest = re.match(rb"[ \t]*(?:#[^\n]*)?(?=\n|\Z)", data[stop:end])
        return (stop + rest.end(), True) if rest else (stop, False)

    colon = next(child for child in reversed(found.node.children) if child.type == ":")
    opening, _ = past_comment(colon.end_byte)
    signature, whole = cut(start, opening).rstrip(), cut(start, end)
    statement = next((n for n in found.body.named_children if n.type not in _COMMENTS), None)
    docstring = None if statement is None else _python_docstring(statement)
    if statement is None or not docstring:
        return signature, "", signature, _after(cut(opening, end)), whole
    closing, ends_line = past_comment(statement.end_byte)
    body = _after(cut(closing, end))
    code = f"{signature}{chr(10) if ends_line else ' '}{body}".rstrip()
    return signature, docstring, cut(start, closing).rstrip(), body, code


def _after(text: str) -> str:
    """What follows a colon, a brace or a docstring, without the line end or the space between."""
    return re.sub(r"\A(?:[ \t]*\n)+|\A[ \t]*;?[ \t]*", "", text, count=1)


def _python_docstring(statement: Node) -> str:
    parts = statement.named_children
    if statement.type != "expression_statement" or len(parts) != 1 or parts[0].type != "string":
        return ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes that Python does not know
            value = ast.literal_eval(_text(parts[0]))
    except (SyntaxError, ValueError):  # an f-string
        return ""
    return inspect.cleandoc(value).strip() if isinstance(value, str) else ""


def _comments_above(
    before: list[Node], start: int, data: bytes, pattern: re.Pattern[str]
) -> list[Node]:
    """The comments right above `start` that document it: one block, or all lines of one."""
    comments: list[Node] = []
    for node in reversed(before):
        text = _text(node) if node.type in _COMMENTS else ""
        gap = data[node.start_byte + len(text.rstrip().encode()) : start]
        if not text or gap.strip() or gap.count(b"\n") > 1:
            break
        start = node.start_byte
        if not pattern.match(text):  # such as //go:noinline
            if comments or text.startswith("/*"):
                break
            continue
        if comments and text.startswith("/*"):
            break
        comments.insert(0, node)
        if text.startswith("/*"):
            break
    return comments


def _clean(comment: str) -> str:
    """The text in a documentation comment."""
    if comment.startswith("/*"):
        inner = re.sub(r"\A/\*[*!]?|\*+/\Z", "", comment)
        lines = [re.sub(r"^\s*\*(?!\*) ?", "", line) for line in inner.split("\n")]
        lines = [inner.split("\n")[0].strip(), *lines[1:]]
    else:
        lines = [re.sub(r"^\s*//[/!]? ?", "", line) for line in comment.split("\n")]
    return inspect.cleandoc("\n".join(line.rstrip() for line in lines)).strip()


_TAG = re.compile(
    r"^\s*(?:@(?!brief\b|summary\b)\w|\\(?!brief\b)[a-z]|:\w+[^:\n]*:|#+ "
    r"|(?:Args?|Arguments|Parameters|Params|Returns?|Raises|Yields|Examples?|Notes?|Usage|Throws)"
    r":?\s*$)",
)
_INLINE_TAG = re.compile(r"\{@\w+\s+([^}]*)\}")
_HTML = re.compile(r"</?(?:p|br|b|i|em|strong|code|tt|pre|ul|ol|li)\s*/?>", re.IGNORECASE)
_SENTENCE_END = re.compile(
    r"(?<!\be\.g)(?<!\bi\.e)(?<!\betc)(?<!\bvs)(?<!\bcf)[.!?]['\")\]]*(?=\s|$)"
)
FEWEST_WORDS, MOST_WORDS = 3, 256


def summary_of(docstring: str) -> tuple[str, str]:
    """The first sentence of a docstring on one line, and "" or why it is no summary.

    It ends with the first paragraph (CodeSearchNet: Husain et al., 2019, arXiv:1909.09436) or at
    the first tag, such as `@param` or `Args:`. As in CodeXGLUE's code-to-text (Lu et al., 2021,
    arXiv:2102.04664), sentences of fewer than 3 or more than 256 words, with an address or an
    image, or in another language than English are not used; English is what has ASCII letters for
    at least half of its characters but spaces.
    """
    lines: list[str] = []
    for line in re.sub(r"(?i)\s*<p>\s*", "\n\n", docstring).strip().split("\n"):
        if _TAG.match(line) or not line.strip():
            break
        lines.append(line)
    text = re.sub(r"^\s*[@\\](?:brief|summary)\s+", "", " ".join(lines))
    addressed = re.search(r"https?:|<img\b", text)
    text = " ".join(_HTML.sub("", _INLINE_TAG.sub(r"\1", text)).split())
    end = _SENTENCE_END.search(text)
    sentence = text[: end.end()] if end else text
    letters = sum(character.isascii() and character.isalpha() for character in sentence)
    words = len(sentence.split())
    if words < FEWEST_WORDS:
        return sentence, "docstring too short"
    if words > MOST_WORDS:
        return sentence, "docstring too long"
    if addressed:
        return sentence, "docstring with an address"
    if 2 * letters < len(sentence.replace(" ", "")):
        return sentence, "docstring not in English"
    return sentence, ""


@cache
def _parser(language: str) -> Parser:
    try:
        import tree_sitter

        module, name = _GRAMMARS[language]
        return tree_sitter.Parser(
            tree_sitter.Language(getattr(importlib.import_module(module), name)())
        )
    except ImportError:
        require("code", what="reading functions from source code")
        raise
