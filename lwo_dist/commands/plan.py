"""`lwo-dist plan`: what a run would need, from its config alone."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from lwo_dist.errors import UserError, printable
from lwo_dist.extras import require

from .arguments import Subparsers, add_config_arguments, read_config
from .config import as_yaml

__all__ = ["add_parser", "run"]


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser("plan", help="say what a run would need, and what fits")
    parser.description = (
        "Memory by part, time, bytes sent and checkpoints of a run, for every method and strategy,"
        " from its settings and the model's config.json alone: nothing is loaded or trained."
    )
    add_config_arguments(parser)
    parser.add_argument("--gpus", metavar="NxNAME", help="GPUs of one machine, such as 8xH100-80GB")
    parser.add_argument(
        "--world-size",
        type=int,
        metavar="N",
        help="ranks; each has the config's micro-batch; default: as --gpus, or cluster.num_workers",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there too")
    return parser


def run(arguments: argparse.Namespace) -> None:
    require("run", what="lwo-dist plan")
    config = read_config(arguments)
    if arguments.world_size is not None and arguments.world_size < 1:
        raise UserError(f"--world-size {arguments.world_size} must be at least 1")
    if arguments.json is not None and not arguments.json.absolute().parent.is_dir():
        raise UserError(f"--json {arguments.json}: its folder does not exist; give a file in one")
    from lwo_dist.plan.gpus import read_cluster

    cluster = None
    if arguments.gpus is not None:
        cluster = read_cluster(arguments.gpus, arguments.world_size)
    world_size = arguments.world_size or (
        cluster.world_size if cluster is not None else config.cluster.max_workers
    )

    from lwo_dist.plan.estimate import on_ranks, plan_all
    from lwo_dist.plan.page import as_json, lines
    from lwo_dist.registry import STRATEGIES
    from lwo_dist.run_info import public_config
    from lwo_dist.strategies import StrategyBuilder
    from lwo_dist.strategies.checks import check_config

    check_config(on_ranks(config, world_size))
    builder: StrategyBuilder = STRATEGIES.get(config.strategy)
    config = builder.resolve(config)
    config = on_ranks(config, world_size)
    plans = plan_all(config, world_size)
    print(as_yaml(config))
    for line in lines(plans, cluster):
        print(printable(line))
    if arguments.json is not None:
        values = as_json(plans, public_config(config), cluster)
        try:
            arguments.json.write_text(json.dumps(values, indent=1))
        except OSError as error:
            raise UserError(f"--json {arguments.json}: {error.strerror}; give a file") from None
