"""`lwo-dist export`: write a checkpoint as a plain Hugging Face folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from lwo_dist.errors import printable
from lwo_dist.extras import require

from .arguments import Subparsers, add_run_argument

__all__ = ["add_parser", "run"]


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "export", help="write a checkpoint as a plain Hugging Face folder"
    )
    add_run_argument(parser)
    parser.add_argument(
        "--to", type=Path, metavar="DIR", help="default: RUN/model; for a URL ./RUN_NAME"
    )
    parser.add_argument("--step", type=int, help="which checkpoint; default: the newest")
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16"), default="fp32", help="default: %(default)s"
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the Python code that comes with the model, if any; review it first",
    )
    return parser


def run(arguments: argparse.Namespace) -> None:
    require("run", what="lwo-dist export")
    from lwo_dist.access import access_of, umask_of
    from lwo_dist.checkpoint.manage import export_run
    from lwo_dist.storage import RunFolder

    folder = RunFolder.at(arguments.run)
    with umask_of(access_of(folder.local)):
        model = export_run(
            folder,
            arguments.to,
            arguments.step,
            arguments.dtype,
            trust_remote_code=arguments.trust_remote_code,
        )
    print(f"model: {printable(str(model))}")
