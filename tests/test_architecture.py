"""The house stands as the design says: imports go strictly down, files stay short, the top level
stays bare.
"""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]

# A module may import from lower floors and from its own package, nothing else of ours.
FLOORS = {
    "launch": 14,
    "lwo_dist.cli": 13,
    "lwo_dist.commands": 12,
    "lwo_dist.cluster": 11,
    "lwo_dist.compare": 11,
    "lwo_dist.run": 10,
    "lwo_dist.base_model": 9,
    "lwo_dist.training": 9,
    "lwo_dist.tracking": 8,
    "lwo_dist.report": 7,
    "lwo_dist.checkpoint": 7,
    "lwo_dist.integrations": 7,
    "lwo_dist.plan": 7,
    "lwo_dist.data": 6,
    "lwo_dist.tasks": 6.5,
    "lwo_dist.models": 6,
    "lwo_dist": 5,  # The face of the package: what `import lwo_dist` offers.
    "lwo_dist.hook": 4,
    "lwo_dist.callback": 4,
    "lwo_dist.strategies": 3,
    "lwo_dist.methods": 2,
    "lwo_dist.layers": 1,
    "lwo_dist.schedule": 1,
    "lwo_dist.distributed": 1,
    "lwo_dist.memory": 1,
    "lwo_dist.storage": 1,
    "lwo_dist.spool": 1,
    "lwo_dist.stop": 1,
    "lwo_dist.config": 1,
    "lwo_dist.registry": 0.5,
    "lwo_dist.units": 0,
    "lwo_dist.versions": 0,
    "lwo_dist.extras": 0.5,
    "lwo_dist.redaction": 0.5,
    "lwo_dist.errors": 0,
}
ONLY_IN = {
    "ray": re.compile(r"lwo_dist/cluster/"),
    "mlflow": re.compile(r"lwo_dist/tracking/mlflow\w*\.py"),
    "deepspeed": re.compile(r"lwo_dist/strategies/deepspeed\w*\.py"),
}
TOP_LEVEL = {
    "lwo_dist",
    "launch",
    "tests",
    "k8s",
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "CHANGELOG.md",
}
MAX_FILE_LINES = 450
MAX_TEST_FILE_LINES = 700
MAX_FUNCTION_LINES = 90
PRIVATE_PATH = re.compile(r"(?<![\w.])/(?:home|Users|root|work)/(?!ray\b)[\w.]")
TEXT = {".py", ".sh", ".md", ".yaml", ".yml", ".toml", ".txt", ".json", ""}


def problems(root: Path) -> list[str]:
    """Everything in the tree that breaks a rule, as `file:line: what`."""
    files = sorted(_files(root))
    found = [f"{name}: not among the top level's {sorted(TOP_LEVEL)}" for name in _strangers(files)]
    for file in files:
        if Path(file).suffix not in TEXT:
            continue
        text = (root / file).read_text(errors="replace")
        for number, line in enumerate(text.splitlines(), 1):
            if PRIVATE_PATH.search(line):
                found.append(f"{file}:{number}: a path of somebody's machine")
        if file.endswith(".py"):
            found += _lengths(file, text)
            if not file.startswith("tests/"):
                found += _imports(file, ast.parse(text))
    return found


def _files(root: Path) -> list[str]:
    """What git tracks or would track; where there is no git, every file."""
    if (root / ".git").exists() and shutil.which("git"):
        command = [
            "git",
            "-C",
            str(root),
            "ls-files",
            "-z",
            "--cached",
            "--others",
            "--exclude-standard",
        ]
        names = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split(
            "\0"
        )
        return [name for name in names if name and (root / name).is_file()]
    return [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]


def _strangers(files: list[str]) -> list[str]:
    tops = {file.partition("/")[0] for file in files}
    return sorted(top for top in tops - TOP_LEVEL if not top.startswith("."))


def _lengths(file: str, text: str) -> Iterator[str]:
    lines = len(text.splitlines())
    limit = MAX_TEST_FILE_LINES if file.startswith("tests/") else MAX_FILE_LINES
    if lines > limit:
        yield f"{file}: {lines} lines, more than {limit}"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                yield (
                    f"{file}:{node.lineno}: {node.name} has {length} lines, more than"
                    f" {MAX_FUNCTION_LINES}"
                )


def _imports(file: str, tree: ast.Module) -> Iterator[str]:
    room = _room(file.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
    if room is None:
        yield f"{file}: on no floor; give it one in FLOORS"
        return
    for node in ast.walk(tree):
        for module in _modules(node, file):
            package = module.partition(".")[0]
            where = f"{file}:{getattr(node, 'lineno', 0)}"
            if package in ONLY_IN and not ONLY_IN[package].match(file):
                yield f"{where}: {package} is imported only in {ONLY_IN[package].pattern}"
            if package not in ("lwo_dist", "launch"):
                continue
            target = _room(module)
            if target is None:
                yield f"{where}: {module} is on no floor"
            elif target == "lwo_dist" and FLOORS[room] < 8:
                yield (
                    f"{where}: takes a name from the package's face; import the module that"
                    " defines it"
                )
            elif target != room and FLOORS[target] >= FLOORS[room]:
                yield (
                    f"{where}: {room} (floor {FLOORS[room]}) imports {target} (floor"
                    f" {FLOORS[target]})"
                )


def _room(module: str) -> str | None:
    """The entry of FLOORS that a module belongs to: `lwo_dist.data` for `lwo_dist.data.cache`."""
    parts = module.split(".")
    if parts[0] == "launch":
        return "launch"
    name = ".".join(parts[:2])
    return name if name in FLOORS else None


def _modules(node: ast.AST, file: str) -> list[str]:
    """The modules that an import statement names, absolute; a name that is no module counts as its
    module.
    """
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = node.module or ""
    if node.level:
        above = list(Path(file).parts[: -node.level])
        base = ".".join([*above, *([node.module] if node.module else [])])
    if base != "lwo_dist":
        return [base]
    submodules = {name.removeprefix("lwo_dist.") for name in FLOORS}
    return [
        f"lwo_dist.{alias.name}" if alias.name in submodules else "lwo_dist" for alias in node.names
    ]


def test_the_house_stands() -> None:
    assert problems(REPOSITORY) == []


def _build(root: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


SOUND = {
    "lwo_dist/__init__.py": "from .config import Config\n",
    "lwo_dist/config.py": "class Config: ...\n",
    "lwo_dist/layers.py": "from .config import Config\n",
    "lwo_dist/strategies/__init__.py": "from .fsdp import F\n",
    "lwo_dist/strategies/fsdp.py": (
        "from .. import layers\nfrom ..config import Config\nclass F: ...\n"
    ),
    "lwo_dist/strategies/deepspeed.py": "import deepspeed\n",
    "lwo_dist/tracking/mlflow.py": "def f():\n    from mlflow import MlflowClient\n",
    "lwo_dist/cluster/ray_train.py": "import ray.train\nfrom lwo_dist.strategies import fsdp\n",
    "launch/train.py": "from lwo_dist.cli import main\n",
    "k8s/base/job.yaml": "mountPath: /home/ray/x\n",
    "README.md": "",
    ".gitignore": "",
}


def test_a_sound_tree_has_no_problem(tmp_path: Path) -> None:
    _build(tmp_path, SOUND)
    assert problems(tmp_path) == []


@pytest.mark.parametrize(
    ("file", "text", "problem"),
    [
        (
            "lwo_dist/layers.py",
            "from .run import run\n",
            "lwo_dist.layers (floor 1) imports lwo_dist.run (floor 7)",
        ),
        (
            "lwo_dist/layers.py",
            "from . import memory\n",
            "lwo_dist.layers (floor 1) imports lwo_dist.memory (floor 1)",
        ),
        ("lwo_dist/layers.py", "import lwo_dist.hook\n", "imports lwo_dist.hook (floor 3)"),
        (
            "lwo_dist/layers.py",
            "def f():\n    from lwo_dist import hook\n",
            "layers.py:2: lwo_dist.layers (floor 1)",
        ),
        ("lwo_dist/layers.py", "from . import Config\n", "from the package's face"),
        (
            "lwo_dist/strategies/fsdp.py",
            "from ..hook import LWO\n",
            "imports lwo_dist.hook (floor 3)",
        ),
        (
            "lwo_dist/strategies/__init__.py",
            "from .. import hook\n",
            "imports lwo_dist.hook (floor 3)",
        ),
        (
            "lwo_dist/strategies/__init__.py",
            "from ..data.cache import x\n",
            "imports lwo_dist.data (floor 3)",
        ),
        (
            "lwo_dist/__init__.py",
            "from .run import run\n",
            "lwo_dist (floor 4) imports lwo_dist.run (floor 7)",
        ),
        ("lwo_dist/cli.py", "import launch.train\n", "imports launch (floor 10)"),
        (
            "lwo_dist/run.py",
            "from .cluster.ray_train import train\n",
            "imports lwo_dist.cluster (floor 8)",
        ),
        ("lwo_dist/attic.py", "", "lwo_dist/attic.py: on no floor"),
        ("lwo_dist/run.py", "from .attic import x\n", "lwo_dist.attic is on no floor"),
        ("lwo_dist/run.py", "def f():\n    import ray\n", "ray is imported only in"),
        ("lwo_dist/tracking/spool.py", "import mlflow.entities\n", "mlflow is imported only in"),
        (
            "lwo_dist/strategies/fsdp.py",
            "from deepspeed import zero\n",
            "deepspeed is imported only in",
        ),
        ("launch/train.py", "import ray\n", "ray is imported only in"),
        ("lwo_dist/layers.py", "\n" * 301, "301 lines, more than 300"),
        ("tests/unit/test_x.py", "\n" * 501, "501 lines, more than 500"),
        ("lwo_dist/layers.py", "def f():\n" + "    x = 1\n" * 60, "layers.py:1: f has 61 lines"),
        (
            "tests/unit/test_x.py",
            "class A:\n    async def f():\n" + "        x = 1\n" * 60,
            "f has 61 lines",
        ),
        ("notes.txt", "", "notes.txt: not among the top level's"),
        ("scripts/run.sh", "", "scripts: not among the top level's"),
        (
            "launch/train.sh",
            "\ncd /home/someone/lwo\n",
            "launch/train.sh:2: a path of somebody's machine",
        ),
        (
            "tests/unit/test_x.py",
            "DATA = '/root/data'\n",
            "test_x.py:1: a path of somebody's machine",
        ),
    ],
)
def test_a_broken_tree_is_caught(tmp_path: Path, file: str, text: str, problem: str) -> None:
    _build(tmp_path, SOUND | {file: text})
    found = problems(tmp_path)
    assert len(found) == 1
    assert problem in found[0]
