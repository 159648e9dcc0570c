"""`lwo-dist fetch`: download the model that a run logged to MLflow."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from lwo_dist.config.run import NO_PASSWORD as NO_STORAGE_PASSWORD
from lwo_dist.config.tracking import NO_PASSWORD as NO_TRACKING_PASSWORD
from lwo_dist.errors import UserError, printable
from lwo_dist.extras import require
from lwo_dist.redaction import refuse_password

from .arguments import Subparsers, add_target_arguments

__all__ = ["add_parser", "run"]


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser("fetch", help="download the model that a run logged to MLflow")
    parser.description = (
        "Download the model of a run from MLflow, as a plain Hugging Face folder. It needs neither"
        " the run's storage nor its cluster; `export` writes a model from a run's storage."
    )
    parser.add_argument("run", metavar="RUN", help="the id or the name of the MLflow run")
    parser.add_argument("--uri", help="MLflow tracking URI; default: MLFLOW_TRACKING_URI")
    add_target_arguments(parser, default="./RUN_NAME")
    return parser


def run(arguments: argparse.Namespace) -> None:
    refuse_password("RUN", arguments.run, NO_STORAGE_PASSWORD)
    refuse_password("--uri", arguments.uri or "", NO_TRACKING_PASSWORD)
    if "://" in arguments.run or Path(arguments.run, "run.json").is_file():
        raise UserError(
            f"RUN = {arguments.run}: not a run of MLflow; to write the model of a run in a storage,"
            " use lwo-dist export"
        )
    require("mlflow", what="lwo-dist fetch")
    from lwo_dist.tracking.mlflow_fetch import fetch_model

    uri = arguments.uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        raise UserError(
            "no MLflow is given; set --uri, or MLFLOW_TRACKING_URI, to a server (http://HOST:PORT)"
            " or a database (sqlite:////FILE)"
        )
    model = fetch_model(uri, arguments.run, arguments.to, overwrite=arguments.overwrite)
    print(f"model: {printable(str(model))}")
