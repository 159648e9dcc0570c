"""Arguments shared by several commands, and how they are read."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TypeAlias

from lwo_dist.config import Config

__all__ = [
    "Subparsers",
    "add_cluster_arguments",
    "add_config_arguments",
    "add_run_argument",
    "add_target_arguments",
    "read_config",
]

Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `-c FILE` and `key=value ...`."""
    parser.add_argument(
        "-c", "--config", type=Path, metavar="FILE", help="YAML file; unset: the defaults"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings that go before the file's"
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
        "--address", required=True, metavar="URL", help="Ray's dashboard, such as http://head:8265"
    )
    parser.add_argument(
        "--insecure-token",
        action="store_true",
        help="send RAY_AUTH_TOKEN over http to another machine all the same",
    )


def add_run_argument(parser: argparse.ArgumentParser) -> None:
    """Add `RUN`."""
    parser.add_argument("run", metavar="RUN", help="the run's folder or URL, <storage>/<run_name>")


def add_target_arguments(parser: argparse.ArgumentParser, *, default: str) -> None:
    """Add `--to DIR` and `--overwrite`."""
    parser.add_argument("--to", type=Path, metavar="DIR", help=f"default: {default}")
    parser.add_argument("--overwrite", action="store_true", help="replace a model that is in DIR")
