"""Programming languages, as prompts name them."""

from __future__ import annotations

__all__ = ["function_in", "language_name", "line_comment"]

_MARKS = {"python": "#", "ruby": "#", "shell": "#", "r": "#", "perl": "#", "sql": "--", "lua": "--"}
_NAMES = {
    "c#": "C#",
    "cpp": "C++",
    "javascript": "JavaScript",
    "typescript": "TypeScript",
    "tsx": "TypeScript",
}


def line_comment(language: str) -> str:
    """What begins a comment to the end of the line; `//` where the language is not known."""
    return _MARKS.get(language, "//")


def language_name(language: str) -> str:
    """The usual spelling; "" where the language is not known."""
    return _NAMES.get(language, language.capitalize())


def function_in(language: str) -> str:
    """Such as "C# function"."""
    return f"{language_name(language)} function".strip()
