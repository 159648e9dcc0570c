"""`lwo-dist checkpoints`: list, verify or prune the checkpoints of a run."""

from __future__ import annotations

import argparse

from lwo_dist.errors import printable
from lwo_dist.extras import require

from .arguments import Subparsers, add_run_argument

__all__ = ["add_parser", "run"]


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "checkpoints", help="list, verify or prune the checkpoints of a run"
    )
    parser.add_argument("action", choices=("list", "verify", "prune"))
    add_run_argument(parser)
    parser.add_argument(
        "--keep", type=int, default=1, metavar="N", help="prune: whole ones that stay, newest first"
    )
    return parser


def run(arguments: argparse.Namespace) -> None:
    require("run", what="lwo-dist checkpoints")
    from lwo_dist.checkpoint import manage
    from lwo_dist.storage import RunFolder

    folder = RunFolder.at(arguments.run)
    if arguments.action == "list":
        lines = manage.list_checkpoints(folder)
    elif arguments.action == "verify":
        lines = manage.verify_checkpoints(folder)
    else:
        lines = manage.prune_checkpoints(folder, arguments.keep)
    for line in lines:
        print(printable(line), flush=True)
