"""`lwo-dist replay`: send to MLflow what a run could not send."""

from __future__ import annotations

import argparse
from pathlib import Path

from lwo_dist.config.run import NO_PASSWORD as NO_STORAGE_PASSWORD
from lwo_dist.config.tracking import NO_PASSWORD as NO_TRACKING_PASSWORD
from lwo_dist.extras import require
from lwo_dist.redaction import refuse_password

from .arguments import Subparsers

__all__ = ["add_parser", "run"]


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser("replay", help="send what a run could not send to MLflow")
    parser.add_argument(
        "spool", metavar="SPOOL", help="the spool in the run's folder, or that folder"
    )
    parser.add_argument(
        "--uri",
        help="MLflow tracking URI; default: MLFLOW_TRACKING_URI or the database beside the run,"
        " whichever the run used",
    )
    return parser


def run(arguments: argparse.Namespace) -> None:
    refuse_password("SPOOL", arguments.spool, NO_STORAGE_PASSWORD)
    refuse_password("--uri", arguments.uri or "", NO_TRACKING_PASSWORD)
    require("mlflow", what="lwo-dist replay")
    from lwo_dist.access import access_of, umask_of
    from lwo_dist.tracking.mlflow import replay

    spool = Path(arguments.spool)
    with umask_of(access_of(spool if spool.is_dir() else spool.parent)):
        print(f"sent {replay(spool, arguments.uri)} metric points")
