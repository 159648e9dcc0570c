"""The subcommands of `lwo-dist`, one file each.

A command is a module `lwo_dist/commands/NAME.py`, with its name listed in COMMANDS. It defines

- `add_parser(subparsers)`, which adds and returns its parser,
- `run(arguments)`, which returns the exit code, None for 0. It first calls
  `lwo_dist.extras.require` for the packages it needs.

`lwo-dist --help` imports all of these modules. Import everything else inside `run`: torch takes
seconds to import, and the extras may not be installed.
"""

from __future__ import annotations

__all__ = ["COMMANDS"]

# In the order shown by --help.
COMMANDS = (
    "train",
    "compare",
    "config",
    "plan",
    "data",
    "submit",
    "jobs",
    "replay",
    "export",
    "fetch",
    "checkpoints",
    "ui",
)
