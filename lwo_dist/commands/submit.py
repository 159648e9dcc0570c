"""`lwo-dist submit`: train on a remote Ray cluster."""

from __future__ import annotations

import argparse
from pathlib import Path

from lwo_dist.extras import require

from .arguments import Subparsers, add_cluster_arguments, add_config_arguments, open_cluster
from .following import follow, how_to_follow

__all__ = ["add_parser", "run"]


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "submit", help="train on a Ray cluster that is elsewhere, and follow the job"
    )
    parser.description = (
        "Send what git tracks in this folder, but no data and no secrets, and the config to a Ray"
        " cluster; train there."
    )
    add_config_arguments(parser)
    add_cluster_arguments(parser)
    parser.add_argument("--detach", action="store_true", help="do not follow the job")
    parser.add_argument(
        "--working-dir", type=Path, default=Path(), metavar="DIR", help="default: this folder"
    )
    return parser


def run(arguments: argparse.Namespace) -> int:
    require("ray", what="lwo-dist submit")
    jobs, address = open_cluster(arguments)
    job = jobs.submit(arguments.config, arguments.overrides, arguments.working_dir)
    print(f"job {job}", flush=True)
    if arguments.detach:
        print(how_to_follow(address, job))
        return 0
    return follow(jobs, job, address)
