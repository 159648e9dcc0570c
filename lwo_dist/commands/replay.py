"""`lwo-dist replay`: send to MLflow what a run could not send."""

from __future__ import annotations

import argparse
from pathlib import Path

from lwo_dist.extras import require

from .arguments import Subparsers

__all__ = ["add_parser", "run"]


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser("replay", help="send what a run could not send to MLflow")
    parser.add_argument(
        "spool", type=Path, metavar="SPOOL", help="the spool in the run's folder, or that folder"
    )
    parser.add_argument(
        "--uri",
        help="MLflow tracking URI; default: MLFLOW_TRACKING_URI or the database beside the run,"
        " whichever the run used",
    )
    return parser


def run(arguments: argparse.Namespace) -> None:
    require("mlflow", what="lwo-dist replay")
    from lwo_dist.access import access_of, umask_of
    from lwo_dist.tracking.mlflow import replay

    folder = arguments.spool if arguments.spool.is_dir() else arguments.spool.parent
    with umask_of(access_of(folder)):
        print(f"sent {replay(arguments.spool, arguments.uri)} metric points")
