"""The exception for bad input, and the one-line form of any exception."""

from __future__ import annotations

__all__ = ["UserError", "first_line"]


class UserError(ValueError):
    """Bad input. The message is one line: the value, the rule, the remedy.

    The command line prints it and exits with 2.
    """


def first_line(error: BaseException) -> str:
    """The first line of the message of `error`, at most 300 characters; its type name if empty.

    >>> first_line(OSError("no room\\nat all"))
    'no room'
    """
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:300]
