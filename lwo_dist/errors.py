"""The one exception for bad input, and how any exception is shown in a line."""

from __future__ import annotations

__all__ = ["UserError", "first_line"]


class UserError(ValueError):
    """Bad input. The message is one line: the value, the rule, the remedy.

    The command line prints it and exits with 2.
    """


def first_line(error: BaseException) -> str:
    """The first line of what `error` says, at most 300 characters; its type's name if it is silent.

    >>> first_line(OSError("no room\\nat all"))
    'no room'
    """
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:300]
