"""Arguments shared by several commands, and how they are read."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from lwo_dist.config import Config
from lwo_dist.errors import UserError

if TYPE_CHECKING:
    from lwo_dist.cluster.jobs import Jobs

__all__ = [
    "Subparsers",
    "add_cluster_arguments",
    "add_config_arguments",
    "add_run_argument",
    "add_target_arguments",
    "open_cluster",
    "read_config",
]

Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `-c FILE` and `key=value ...`."""
    parser.add_argument(
        "-c", "--config", type=Path, metavar="FILE", help="YAML file; unset: the defaults"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="settings, such as train.steps=300; they override the file's",
    )


def read_config(arguments: argparse.Namespace) -> Config:
    """The config from the arguments of `add_config_arguments`.

    Raises:
        UserError: the file or an override is invalid.
    """
    from lwo_dist.config.reading import load_config

    return load_config(arguments.config, arguments.overrides)


def add_cluster_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--address URL` and `--insecure-token`."""
    parser.add_argument(
        "--address",
        metavar="URL",
        help="Ray's dashboard, such as http://head:8265; default: RAY_API_SERVER_ADDRESS, or"
        " RAY_ADDRESS",
    )
    parser.add_argument(
        "--insecure-token",
        action="store_true",
        help="send RAY_AUTH_TOKEN over http to another machine all the same",
    )


def open_cluster(arguments: argparse.Namespace) -> tuple[Jobs, str]:
    """The jobs of the cluster that the arguments, or else Ray's own variables, give; and its
    address.

    Raises:
        UserError: none is given, or as `Jobs`.
    """
    from lwo_dist.cluster.jobs import Jobs

    given = {"--address": arguments.address} | {
        name: os.environ.get(name) for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
    }
    for setting, address in given.items():
        if address:
            jobs = Jobs(address, setting=setting, insecure_token=arguments.insecure_token)
            return jobs, address
    raise UserError(
        "no cluster is given; set --address, or RAY_ADDRESS, to the URL of Ray's dashboard, such as"
        " http://head:8265"
    )


def add_run_argument(parser: argparse.ArgumentParser) -> None:
    """Add `RUN`."""
    parser.add_argument("run", metavar="RUN", help="the run's folder or URL, <storage>/<run_name>")


def add_target_arguments(parser: argparse.ArgumentParser, *, default: str) -> None:
    """Add `--to DIR` and `--overwrite`."""
    parser.add_argument("--to", type=Path, metavar="DIR", help=f"default: {default}")
    parser.add_argument("--overwrite", action="store_true", help="replace a model that is in DIR")
