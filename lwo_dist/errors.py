"""The exceptions for bad input, and the one-line form of any exception."""

from __future__ import annotations

__all__ = ["DamagedError", "UserError", "first_line", "printable"]


class UserError(ValueError):
    """Bad input. The message is one line: the value, the rule, the remedy.

    The command line prints it and exits with 2.
    """


class DamagedError(UserError):
    """A file of a run is damaged or violates its format; the message names the file and why."""


def first_line(error: BaseException) -> str:
    """The first line of the message of `error`, printable, at most 300 characters; its type name
    if empty.

    >>> first_line(OSError("no room\\nat all"))
    'no room'
    """
    lines = str(error).strip().splitlines()
    return printable(lines[0][:300] if lines else type(error).__name__)[:300]


def printable(text: str) -> str:
    """`text` on one line, with control characters escaped so that a terminal does not act on them.

    Names and values from files, buckets and servers may contain any character.

    >>> printable("step \\x1b[2J")
    'step \\\\x1b[2J'
    """
    return "".join(
        character if character.isprintable() else ascii(character)[1:-1] for character in text
    )
