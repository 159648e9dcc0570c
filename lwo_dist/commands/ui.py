"""`lwo-dist ui`: browse the runs in MLflow's web UI, on this machine only and without a login."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from lwo_dist.errors import UserError
from lwo_dist.extras import require

from .arguments import Subparsers, add_config_arguments, read_config

__all__ = ["add_parser", "run"]

_DATABASES = ("sqlite:", "postgresql", "mysql", "mssql")


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "ui",
        help="open the runs in MLflow's web pages, on this machine only",
    )
    parser.description = (
        "Serve the runs in MLflow's web pages. There is no login: while the server runs, every user"
        " of this machine can read and change the runs."
    )
    add_config_arguments(parser)
    parser.add_argument("--port", type=int, default=5000, help="default: %(default)s")
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Print the URL of a tracking server; for a database, become an MLflow server for it."""
    require("mlflow", what="lwo-dist ui")
    from lwo_dist.redaction import redact
    from lwo_dist.storage import storage_folder
    from lwo_dist.tracking.mlflow import experiment_page, tracking_uri

    config = read_config(arguments)
    uri = tracking_uri(config.tracking, storage_folder(config.storage))
    if uri.startswith(("http://", "https://")):
        print(
            f"{experiment_page(config.tracking, uri)} shows the runs of experiment"
            f" {config.tracking.experiment}"
        )
        return
    if not uri.startswith(_DATABASES):
        raise UserError(
            f"tracking.uri = {redact(uri)} has no pages; give a server (http://HOST:PORT) or a"
            " database (sqlite:////FILE, postgresql://HOST/NAME)"
        )
    database = Path(uri.removeprefix("sqlite:///"))
    if uri.startswith("sqlite:///") and not database.is_file():
        raise UserError(
            f"storage = {config.storage}: no runs there ({database}); give -c FILE or storage=DIR"
            " as in training"
        )
    page = experiment_page(config.tracking, uri, f"http://127.0.0.1:{arguments.port}")
    print(
        f"{page} shows the runs in {redact(uri)}, without a login, to every user of this machine;"
        " press Ctrl-C to stop",
        flush=True,
    )
    _become_server(uri, arguments.port)


def _become_server(uri: str, port: int) -> None:
    # Two processes and 0.5 GB instead of MLflow's ten: there is only one user. The address may
    # contain a password, so it is not on the command line, which every local user can read.
    command = ["-m", "mlflow", "server", "--host", "127.0.0.1", "--workers", "1"]
    environment = os.environ | {
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_BACKEND_STORE_URI": uri,
    }
    os.umask(0o077)
    os.execve(sys.executable, [sys.executable, *command, "--port", str(port)], environment)
