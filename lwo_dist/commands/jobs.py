"""`lwo-dist jobs`: list, follow or stop the jobs of a Ray cluster."""

from __future__ import annotations

import argparse
import sys

from lwo_dist.errors import printable
from lwo_dist.extras import require

from .arguments import Subparsers, add_cluster_arguments, open_cluster
from .following import follow

__all__ = ["add_parser", "run"]

_ACTIONS = {
    "list": "newest first",
    "logs": "what a job writes",
    "stop": "save a checkpoint and end",
}


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser("jobs", help="list, follow or stop the jobs of a Ray cluster")
    actions = parser.add_subparsers(title="actions", required=True, metavar="ACTION", dest="action")
    for name, text in _ACTIONS.items():
        action = actions.add_parser(name, help=text)
        add_cluster_arguments(action)
        if name != "list":
            action.add_argument(
                "job", metavar="JOB", help="the job's id, or its run_name: then the newest"
            )
        if name == "logs":
            action.add_argument(
                "-f", "--follow", action="store_true", help="to the job's end, with its exit code"
            )
    return parser


def run(arguments: argparse.Namespace) -> int:
    require("ray", what="lwo-dist jobs")
    jobs, address = open_cluster(arguments)
    if arguments.action == "list":
        for line in jobs.lines():
            print(printable(line))
    elif arguments.action == "stop":
        print(f"stopping {printable(jobs.stop(arguments.job))}")
    elif arguments.follow:
        return follow(jobs, jobs.find(arguments.job), address)
    else:
        sys.stdout.write(jobs.logs(arguments.job))
    return 0
