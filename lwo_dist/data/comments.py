"""What a line comment begins with, by the ending of a file's name."""

from __future__ import annotations

from pathlib import PurePosixPath

__all__ = ["comment_mark", "is_comment"]

_ENDINGS = {
    "//": (
        ".c .cc .cpp .cs .cu .cxx .dart .go .gradle .groovy .h .hpp .java .js .jsx .kt .kts .mjs"
        " .php .proto .rs .scala .sol .swift .ts .tsx .zig"
    ),
    "--": ".elm .hs .lua .sql .vhdl",
    ";": ".asm .clj .el .ini .lisp .scm",
    "%": ".erl .tex",
    "!": ".f90 .f95 .f03",
}
_MARKS = {ending: mark for mark, endings in _ENDINGS.items() for ending in endings.split()}
_BLOCK = ("/*", "* ", "*/")


def comment_mark(name: str) -> str:
    """What begins a comment in a file of this name; `#` where the ending is not known."""
    return _MARKS.get(PurePosixPath(name).suffix.lower(), "#")


def is_comment(line: str, name: str) -> bool:
    """Whether a line is a comment and nothing else, judged by its first characters alone.

    In languages with `/* */`, a line in the middle of such a comment counts if it begins with `*`
    and a space.
    """
    mark = comment_mark(name)
    text = line.strip()
    return text.startswith(mark) or (mark == "//" and (text == "*" or text.startswith(_BLOCK)))
