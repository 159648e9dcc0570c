"""`lwo-dist train`: tune a code model, on Ray or as a rank of torchrun."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

from lwo_dist.config import Config
from lwo_dist.config.batch import check_world_sizes
from lwo_dist.console import say
from lwo_dist.extras import require
from lwo_dist.stop import Stopped

from .arguments import Subparsers, add_config_arguments, read_config

__all__ = ["add_parser", "run"]


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser("train", help="tune a code model on a source tree")
    parser.description = (
        "Tune a code model; on Ray (a local one, or RAY_ADDRESS), or as a rank that torchrun has"
        " started."
    )
    add_config_arguments(parser)
    return parser


def run(arguments: argparse.Namespace) -> None:
    under_torchrun = {"RANK", "WORLD_SIZE"} <= os.environ.keys()
    require("run", *([] if under_torchrun else ["ray"]), what="lwo-dist train")
    config = read_config(arguments)
    if config.tracking.enabled:
        require("mlflow", what="tracking.enabled: true", otherwise="set tracking.enabled=false")
    say("checking the settings, the model and the source")  # the imports below take seconds
    if not under_torchrun:  # torchrun's number of ranks counts, not the config's
        check_world_sizes(config)
    from lwo_dist.strategies.checks import check_config, require_extras

    check_config(config)
    if "RAY_ADDRESS" not in os.environ:  # else the workers may have what the driver lacks
        require_extras(config)
    # A progress bar garbles a job's log; workers inherit this setting.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if under_torchrun:
        from lwo_dist.run import prepare_and_run as train
    else:
        from lwo_dist.cluster.ray_train import train
    try:
        summary = train(config)
    except Stopped as stopped:
        stopped.add_note(_go_on(config, stopped))
        raise
    if summary is None:  # Not rank 0.
        return
    from lwo_dist.training.results import format_summary

    print(format_summary(summary))
    if config.tracking.enabled:
        from lwo_dist.tracking.mlflow import run_page

        page = run_page(config, summary.get("mlflow_run_id"))
        print(f"MLflow: {page or _ui_command(arguments)}")


def _go_on(config: Config, stopped: Stopped) -> str:
    if stopped.checkpoint is None:
        return "the same command starts anew"
    name = "" if config.run_name else f" with run_name={stopped.checkpoint.parents[1].name}"
    return f"the same command{name} goes on from there"


def _ui_command(arguments: argparse.Namespace) -> str:
    """The command that shows the runs in this run's store."""
    program = sys.argv[0] if Path(sys.argv[0]).name == "lwo-dist" else "lwo-dist"
    file = ["-c", str(arguments.config)] if arguments.config else []
    store = [
        override
        for override in arguments.overrides
        if override.startswith(("storage=", "tracking."))
    ]
    return shlex.join([program, "ui", *file, *store])
