"""`lwo-dist data`: which files of a source are used, and which are skipped."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping

from lwo_dist.errors import printable
from lwo_dist.extras import require

from .arguments import Subparsers, add_config_arguments, read_config

__all__ = ["add_parser", "run"]


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "data", help="count the files of a source that are used and skipped"
    )
    parser.description = (
        "Read data.source as a run does, and count the files that are trained on, held out and"
        " skipped, with the reasons. Nothing is trained. A URL is cloned into the cache."
    )
    add_config_arguments(parser)
    parser.add_argument(
        "--explain", action="store_true", help="list every skipped file and the reason"
    )
    return parser


def run(arguments: argparse.Namespace) -> None:
    require("run", what="lwo-dist data")
    from lwo_dist.cache import cache_folder
    from lwo_dist.data.source_tree import divide, find_files
    from lwo_dist.registry import TASKS
    from lwo_dist.tasks.pairs import PairTask

    config = read_config(arguments)
    task = TASKS.get(config.task)
    if config.data.format != "code" or isinstance(task, PairTask):
        task.check(config)
        counts = task.read(config.data, cache_folder(config)).counts
        _show(counts["train_pairs"], counts["held_out_pairs"], "pairs", counts["skipped"])
        return
    _, files, skipped = find_files(config.data, cache_folder(config))
    train, held_out, copies = divide(config.data, files, skipped)
    skipped = sorted([*skipped, *copies], key=lambda skip: skip.name)
    if arguments.explain:
        for skip in skipped:
            detail = f" ({skip.detail})" if skip.detail else ""
            print(printable(f"{skip.name}: {skip.reason}{detail}"))
    _show(len(train), len(held_out), "files", Counter(skip.reason for skip in skipped))


def _show(train: int, held_out: int, many: str, skipped: Mapping[str, int]) -> None:
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()))
    print(f"train: {train} {many}")
    print(f"held out: {held_out} {many}")
    print(f"skipped: {reasons or 'nothing'}")
