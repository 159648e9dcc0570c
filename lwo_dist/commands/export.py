"""`lwo-dist export`: write a checkpoint as a plain Hugging Face folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from lwo_dist.errors import UserError, printable
from lwo_dist.extras import require

from .arguments import Subparsers, add_run_argument, add_target_arguments

__all__ = ["add_parser", "run"]


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "export", help="write a checkpoint as a plain Hugging Face folder, the best by default"
    )
    add_run_argument(parser)
    add_target_arguments(parser, default="./RUN_NAME")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, help="this checkpoint; default: the best one")
    which.add_argument("--newest", action="store_true", help="the newest checkpoint")
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16"), default="fp32", help="default: %(default)s"
    )
    parser.add_argument(
        "--adapter",
        action="store_true",
        help="method: lora only; write the adapters alone, in peft's format, in fp32",
    )
    parser.add_argument(
        "--base",
        metavar="MODEL",
        help="method: lora only; the base model, a folder or a Hugging Face id; default: the run's",
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the Python code that comes with the model, if any; review it first",
    )
    return parser


def run(arguments: argparse.Namespace) -> None:
    require("run", what="lwo-dist export")
    from lwo_dist.access import access_of, umask_of
    from lwo_dist.checkpoint.manage import choose_checkpoint, export_checkpoint
    from lwo_dist.config import ModelConfig
    from lwo_dist.files import refuse_existing
    from lwo_dist.storage import RunFolder

    if arguments.adapter and (arguments.base or arguments.dtype != "fp32"):
        raise UserError(
            "--base and --dtype have no effect with --adapter, which writes fp32 adapters without"
            " the base model; drop them"
        )
    folder = RunFolder.at(arguments.run)
    target = arguments.to or Path(folder.local.name)
    base = None
    if arguments.base:
        base = ModelConfig(name=arguments.base, trust_remote_code=arguments.trust_remote_code)
    with umask_of(access_of(folder.local)):
        refuse_existing(target, overwrite=arguments.overwrite)
        checkpoint, which = choose_checkpoint(folder, arguments.step, newest=arguments.newest)
        print(f"step {checkpoint.step}, {printable(which)}", flush=True)
        model = export_checkpoint(
            folder,
            checkpoint,
            target,
            arguments.dtype,
            base=base,
            adapter=arguments.adapter,
            trust_remote_code=arguments.trust_remote_code,
        )
    print(f"{'adapter' if arguments.adapter else 'model'}: {printable(str(model))}")
