"""The cost of the secret rule when reading a source.

    python tests/benchmarks/secret_rule.py [--files 100000] [--rounds 3] [--json FILE]

The files are those of the standard library up to 20 kB, each with a unique line, so that none is a
duplicate. The tree is read with and without the rule alternately; the ratio is that of the medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sysconfig
import tempfile
import time
from itertools import cycle
from pathlib import Path
from unittest import mock

from lwo_dist.config import DataConfig
from lwo_dist.data import source_tree

MODULE = source_tree.__name__


def write_files(root: Path, count: int) -> int:
    """Write `count` files, a thousand per folder; return their bytes."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    own = [path for path in paths if "site-packages" not in path.parts]
    texts = [path.read_bytes() for path in own if path.stat().st_size <= 20_000]
    size = 0
    for number, text in zip(range(count), cycle(texts), strict=False):
        folder = root / f"part_{number // 1000}"
        folder.mkdir(exist_ok=True)
        size += (folder / f"file_{number}.py").write_bytes(b"# file %d\n" % number + text)
    return size


def seconds(root: Path) -> float:
    started = time.perf_counter()
    source_tree.read_source_tree(DataConfig(source=str(root)), root)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    measured: dict[str, list[float]] = {"with": [], "without": []}
    with tempfile.TemporaryDirectory() as name:
        size = write_files(Path(name), arguments.files)
        seconds(Path(name))  # Warm the page cache.
        for _ in range(arguments.rounds):
            measured["with"].append(seconds(Path(name)))
            with (
                mock.patch(f"{MODULE}.find_secret", return_value=None),
                mock.patch(f"{MODULE}.is_secret_file", return_value=False),
            ):
                measured["without"].append(seconds(Path(name)))
    medians = {key: statistics.median(values) for key, values in measured.items()}
    result = {
        "files": arguments.files,
        "bytes": size,
        "seconds_with_rule": measured["with"],
        "seconds_without_rule": measured["without"],
        "ratio": medians["with"] / medians["without"],
    }
    print(json.dumps(result, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
