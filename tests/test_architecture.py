"""The house stands as the pages say: imports go strictly down, the core needs torch and pydantic
alone, each engine is imported in its own room, the top level stays bare.
"""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]

# A module may import from lower floors and from its own room, nothing else of ours. A room is a
# module or a package below lwo_dist; lwo_dist/README.md says what each is for.
FLOORS = [
    {"console", "errors", "handles", "names", "units", "versions", "secret_rule", "git"},
    {"registry", "extras", "redaction", "access", "files"},
    {"config"},
    {"layers", "distributed", "memory", "storage", "spool", "stop"},
    {"schedule", "optimizer", "orthogonal", "heads", "sublayers", "run_info", "lease", "cache"},
    {"methods", "callback", "losses"},
    {"strategies"},
    {"guard", "state", "borders", "suffix", "head_rows"},
    {"prefix"},
    {"hook"},
    {"lwo_dist"},  # The face of the package: what `import lwo_dist` offers.
    {"data", "models", "integrations"},
    {"tasks"},
    {"report", "checkpoint"},
    {"tracking"},
    {"training", "examples"},
    {"plan"},
    {"driver"},
    {"run"},
    {"cluster"},
    {"compare"},
    {"commands"},
    {"cli"},
    {"launch", "k8s"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}

# Rooms of the plugin: with torch and pydantic installed, and nothing else, they all work.
CORE = {
    "access",
    "borders",
    "callback",
    "config",
    "console",
    "distributed",
    "errors",
    "extras",
    "git",
    "guard",
    "handles",
    "head_rows",
    "heads",
    "hook",
    "layers",
    "losses",
    "lwo_dist",
    "memory",
    "methods",
    "names",
    "optimizer",
    "orthogonal",
    "prefix",
    "redaction",
    "registry",
    "run_info",
    "schedule",
    "secret_rule",
    "state",
    "sublayers",
    "strategies",
    "suffix",
    "units",
    "versions",
}
CORE_PACKAGES = {"torch", "pydantic"}
NOT_CORE = re.compile(r"lwo_dist/config/reading\.py")
ONLY_IN = {
    "ray": re.compile(r"lwo_dist/cluster/"),
    "mlflow": re.compile(r"lwo_dist/tracking/mlflow\w*\.py|k8s/base/mlflow_users\.py"),
    "deepspeed": re.compile(r"lwo_dist/strategies/deepspeed/|launch/examples/deepspeed_loop\.py"),
    "matplotlib": re.compile(r"lwo_dist/report/"),
    "peft": re.compile(r"lwo_dist/methods/lora\.py"),
    "tree_sitter": re.compile(r"lwo_dist/data/functions\.py"),
    "datasketch": re.compile(r"lwo_dist/data/duplicates\.py"),
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
    "CONTRIBUTING.md",
}
# What is chosen by name has a registry: nobody asks for the name of a choice.
CHOICES = re.compile(r"\bconfig\.(method|strategy|task) (==|!=|in) ")
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
            if file.startswith("lwo_dist/") and CHOICES.search(line):
                found.append(f"{file}:{number}: a choice that belongs behind its registry")
        if file.endswith(".py") and not file.startswith("tests/"):
            found += _imports(file, ast.parse(text))
    return found


def _files(root: Path) -> list[str]:
    """What git tracks or would track; where there is no git, every file."""
    if (root / ".git").exists() and shutil.which("git"):
        command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others"]
        command.append("--exclude-standard")
        names = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return [name for name in names.split("\0") if name and (root / name).is_file()]
    return [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]


def _strangers(files: list[str]) -> list[str]:
    tops = {file.partition("/")[0] for file in files}
    return sorted(top for top in tops - TOP_LEVEL if not top.startswith("."))


def _imports(file: str, tree: ast.Module) -> Iterator[str]:
    room = _room(file.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
    if room is None:
        yield f"{file}: on no floor; give it one in FLOORS"
        return
    for node in ast.walk(tree):
        for module in _modules(node, file):
            where = f"{file}:{getattr(node, 'lineno', 0)}"
            if module.partition(".")[0] in ("lwo_dist", "launch"):
                yield from _ours(where, room, module)
            else:
                yield from _theirs(where, room, file, module.partition(".")[0])


def _ours(where: str, room: str, module: str) -> Iterator[str]:
    target = _room(module)
    if target is None:
        yield f"{where}: {module} is on no floor"
    elif target == "lwo_dist" and FLOOR[room] < FLOOR["cluster"]:
        yield f"{where}: takes a name from the package's face; import the module that defines it"
    elif target != room and FLOOR[target] >= FLOOR[room]:
        yield f"{where}: {room} (floor {FLOOR[room]}) imports {target} (floor {FLOOR[target]})"


def _theirs(where: str, room: str, file: str, package: str) -> Iterator[str]:
    if package in ONLY_IN:
        if not ONLY_IN[package].match(file):
            yield f"{where}: {package} is imported only in {ONLY_IN[package].pattern}"
        return
    known = package in sys.stdlib_module_names or package in CORE_PACKAGES
    if room in CORE and not known and not NOT_CORE.match(file):
        yield f"{where}: {package} in {room}, which needs torch and pydantic alone"


def _room(module: str) -> str | None:
    """The room that a module belongs to: `data` for `lwo_dist.data.cache`."""
    parts = module.split(".")
    if parts[0] in ("launch", "k8s"):
        return parts[0]
    room = parts[1] if len(parts) > 1 else "lwo_dist"
    return room if room in FLOOR else None


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
    return [f"lwo_dist.{alias.name}" if alias.name in FLOOR else "lwo_dist" for alias in node.names]


def test_the_house_stands() -> None:
    assert problems(REPOSITORY) == []


def test_every_room_has_its_floor_and_exists_or_is_announced() -> None:
    entries = [path for path in (REPOSITORY / "lwo_dist").iterdir() if path.suffix in ("", ".py")]
    rooms = {path.stem for path in entries if not path.name.startswith(("_", "."))}
    assert rooms <= set(FLOOR)
    assert set(FLOOR) - rooms <= {"lwo_dist", "launch", "k8s", "compare", "plan", "integrations"}


def _build(root: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


SOUND = {
    "lwo_dist/__init__.py": "from .config import Config\n",
    "lwo_dist/config/__init__.py": "class Config: ...\n",
    "lwo_dist/config/reading.py": "import yaml\nfrom .run import Config\n",
    "lwo_dist/layers.py": "import torch\nfrom .config import Config\n",
    "lwo_dist/strategies/__init__.py": "from .fsdp import F\n",
    "lwo_dist/strategies/fsdp/strategy.py": (
        "from lwo_dist import layers\nfrom lwo_dist.config import Config\nclass F: ...\n"
    ),
    "lwo_dist/strategies/deepspeed/engine.py": "import deepspeed\n",
    "lwo_dist/tracking/mlflow.py": "def f():\n    from mlflow import MlflowClient\n",
    "lwo_dist/report/charts.py": "import matplotlib, numpy\n",
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
        ("lwo_dist/layers.py", "from .run import run\n", "layers (floor 3) imports run (floor"),
        (
            "lwo_dist/layers.py",
            "from . import memory\n",
            "layers (floor 3) imports memory (floor 3)",
        ),
        ("lwo_dist/layers.py", "import lwo_dist.hook\n", "imports hook (floor"),
        (
            "lwo_dist/layers.py",
            "def f():\n    from lwo_dist import hook\n",
            "layers.py:2: layers (floor",
        ),
        ("lwo_dist/layers.py", "from . import Config\n", "from the package's face"),
        ("lwo_dist/strategies/fsdp/s.py", "from lwo_dist.hook import LWO\n", "imports hook (floor"),
        ("lwo_dist/strategies/__init__.py", "from .. import hook\n", "imports hook (floor"),
        ("lwo_dist/strategies/__init__.py", "from ..data.cache import x\n", "imports data (floor"),
        ("lwo_dist/__init__.py", "from .run import run\n", "imports run (floor"),
        ("lwo_dist/cli.py", "import launch.train\n", "imports launch (floor"),
        ("lwo_dist/run.py", "from .cluster.ray_train import train\n", "imports cluster (floor"),
        ("lwo_dist/attic.py", "", "lwo_dist/attic.py: on no floor"),
        ("lwo_dist/run.py", "from .attic import x\n", "lwo_dist.attic is on no floor"),
        ("lwo_dist/run.py", "def f():\n    import ray\n", "ray is imported only in"),
        ("lwo_dist/spool.py", "import mlflow.entities\n", "mlflow is imported only in"),
        ("lwo_dist/strategies/fsdp/s.py", "from deepspeed import zero\n", "deepspeed is imported"),
        ("lwo_dist/tracking/close.py", "import matplotlib\n", "matplotlib is imported only in"),
        ("launch/train.py", "import ray\n", "ray is imported only in"),
        ("lwo_dist/layers.py", "import numpy\n", "numpy in layers, which needs torch and pydantic"),
        ("lwo_dist/hook.py", "def f():\n    import psutil\n", "psutil in hook, which needs torch"),
        ("lwo_dist/run.py", "x = config.strategy == 'fsdp'\n", "behind its registry"),
        ("notes.txt", "", "notes.txt: not among the top level's"),
        ("scripts/run.sh", "", "scripts: not among the top level's"),
        (
            "launch/train.sh",
            "\ncd /{}/someone/lwo\n".format("home"),
            "launch/train.sh:2: a path of somebody",
        ),
        (
            "tests/unit/test_x.py",
            "DATA = '/{}/data'\n".format("root"),
            "test_x.py:1: a path of somebody",
        ),
    ],
)
def test_a_broken_tree_is_caught(tmp_path: Path, file: str, text: str, problem: str) -> None:
    _build(tmp_path, SOUND | {file: text})
    found = problems(tmp_path)
    assert len(found) == 1
    assert problem in found[0]


def test_no_module_hides_what_the_package_offers() -> None:
    """Importing `lwo_dist.NAME` as a module would replace the function of that name."""
    import lwo_dist

    modules = {path.stem for path in (REPOSITORY / "lwo_dist").iterdir()}
    assert not modules & set(lwo_dist.__all__)
