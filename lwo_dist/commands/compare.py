"""`lwo-dist compare`: methods side by side on one's own model and data."""

from __future__ import annotations

import argparse
import os
import sys

from lwo_dist.errors import UserError
from lwo_dist.extras import require

from .arguments import Subparsers, add_config_arguments

__all__ = ["add_parser", "run"]

_RATES = "1e-4,3e-4,1e-3"


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser("compare", help="compare methods on your model and data")
    parser.description = (
        "Train with several methods from the same weights on the same batches, each with the best"
        " learning rate of the same search, and write a page with scores, differences and costs."
        " The same command resumes after a stop."
    )
    add_config_arguments(parser)
    parser.add_argument(
        "--name",
        required=True,
        help="name of the comparison: a folder in storage, and the prefix of its runs",
    )
    parser.add_argument(
        "--methods",
        default="lwo,lora,full",
        metavar="LIST",
        help="names, or YAML files of settings that override the config's; default: %(default)s",
    )
    parser.add_argument(
        "--tasks", metavar="LIST", help="names, or YAML files of settings; default: the config's"
    )
    parser.add_argument(
        "--seeds", type=int, default=3, metavar="N", help="runs of each method; default: 3"
    )
    parser.add_argument(
        "--rates",
        default=_RATES,
        metavar="LIST",
        help="learning rates that each method's search begins with; a single one is not searched;"
        " default: %(default)s",
    )
    parser.add_argument(
        "--sweep-steps",
        type=int,
        metavar="N",
        help="optimizer steps of a run of the search; default: as many as the compared runs",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="runs of the search at a time; the compared runs go one by one",
    )
    parser.add_argument(
        "--no-equal-time",
        action="store_true",
        help="leave out the runs that last as long as lora's",
    )
    parser.add_argument(
        "--without-ray", action="store_true", help="each run in one process on this machine"
    )
    parser.add_argument(
        "--keep-models", action="store_true", help="keep the tuned models, not only their scores"
    )
    return parser


def run(arguments: argparse.Namespace) -> None:
    extras = ["run"] if arguments.without_ray else ["run", "ray"]
    require(*extras, what="lwo-dist compare", otherwise="pass --without-ray" if extras[1:] else "")
    if {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        raise UserError(
            "lwo-dist compare starts its runs itself; call it without torchrun, on Ray or with"
            " --without-ray"
        )
    rates = _rates(arguments.rates)
    for name in ("seeds", "sweep_steps", "jobs"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value} must be at least 1")

    from lwo_dist.compare import Design, compare, read_variants
    from lwo_dist.config.reading import make_config, read_values
    from lwo_dist.strategies.checks import require_extras

    values = read_values(arguments.config, arguments.overrides)
    config = make_config(values)
    if config.tracking.enabled:
        require("mlflow", what="tracking.enabled: true", otherwise="set tracking.enabled=false")
    if config.run_name is not None:
        raise UserError(
            f"run_name = {config.run_name}: the runs of a comparison are named after it; set --name"
            " instead"
        )
    design = Design(
        name=arguments.name,
        values=values,
        methods=read_variants("method", arguments.methods),
        tasks=read_variants("task", arguments.tasks or config.task),
        seeds=tuple(range(config.seed, config.seed + arguments.seeds)),
        rates=rates,
        sweep_steps=arguments.sweep_steps or config.train.steps,
        equal_time=not arguments.no_equal_time,
    )
    for run_config in design.configs():
        require_extras(run_config)
    found = compare(
        design,
        storage=config.storage,
        launcher="process" if arguments.without_ray else "ray",
        command=["lwo-dist", *sys.argv[1:]],
        keep_models=arguments.keep_models,
        jobs=arguments.jobs,
    )
    from lwo_dist.compare.page import verdicts
    from lwo_dist.storage import RunFolder

    for verdict in verdicts(vars(found)):
        print(verdict.replace("**", ""))
    failed = sum(row["status"] == "failed" for row in found.rows)
    if failed:
        print(f"{failed} of {len(found.rows)} compared runs failed; the page names them")
    print(f"page: {RunFolder(config.storage, design.name)}/comparison.md")


def _rates(text: str) -> tuple[float, ...]:
    try:
        rates = tuple(sorted({float(part) for part in text.split(",")}))
    except ValueError:
        rates = ()
    if not rates or min(rates) <= 0 or max(rates) == float("inf"):
        raise UserError(
            f"--rates {text!r} must be learning rates above 0, such as {_RATES}; separate them by"
            " commas"
        )
    return rates
