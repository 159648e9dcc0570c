"""The command line: parses arguments, runs the command, and maps exceptions to exit codes.

A `UserError` becomes one line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

from . import __version__
from .commands import COMMANDS
from .errors import UserError, printable
from .stop import CTRL_C, EXIT_CODE, Stopped

__all__ = ["main"]

_PATIENCE_S = 30


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; other exceptions propagate.

    Returns:
        The exit code: 0, 2 after bad input, 75 after a stop that the same command can resume, 130
            after Ctrl-C, which it can resume too; for `submit`, that of the job.
    """
    try:
        arguments = _parse(argv)
        code: int | None = arguments.run_command(arguments)
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            # Every rank of a host finds the same error, and torchrun ends them all when the first
            # one exits: that must be the one that reports it. A rank still alive after the wait has
            # an error of its own.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # ignored after a request to stop
            time.sleep(_PATIENCE_S)
        from .redaction import redact

        message = redact(" ".join(str(error).split()))
        print(f"lwo-dist: {printable(message)}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            # The command attaches a note on how to resume.
            said = "; ".join([str(stopped), *getattr(stopped, "__notes__", [])])
            print(f"lwo-dist: {printable(said)}", file=sys.stderr)
        return 130 if stopped.reason == CTRL_C else EXIT_CODE
    except KeyboardInterrupt:
        return 130
    return code or 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    # argparse takes one unbroken stretch of key=value arguments, and leaves those after an option.
    if hasattr(arguments, "overrides") and not any(part.startswith("-") for part in rest):
        arguments.overrides += rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="lwo-dist", description="Layer-wise optimisation of code models on clusters."
    )
    parser.add_argument("--version", action="version", version=f"lwo-dist {__version__}")
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name in COMMANDS:
        command = importlib.import_module(f"lwo_dist.commands.{name}")
        command.add_parser(subparsers).set_defaults(run_command=command.run)
    return parser


if __name__ == "__main__":
    sys.exit(main())
