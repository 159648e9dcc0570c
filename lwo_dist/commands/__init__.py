"""The subcommands of `lwo-dist`, one file each.

A command is a module `lwo_dist/commands/NAME.py` and its name in COMMANDS. It has

- `add_parser(subparsers)`, which adds and returns its parser,
- `run(arguments)`, which returns the exit code, None for 0. It first calls
  `lwo_dist.extras.require` for the packages it needs.

`lwo-dist --help` imports every one of these modules. What they need beyond the parser, they import
in `run`: torch takes seconds, and the extras may not be installed.
"""

from __future__ import annotations

__all__ = ["COMMANDS"]

# In the order of the help.
COMMANDS = ("train", "submit", "jobs", "replay", "export", "checkpoints", "ui")
