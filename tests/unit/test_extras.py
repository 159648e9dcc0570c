"""What each command needs is what it asks for: no package more, and a missing one is named in a
line.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lwo_dist.commands import COMMANDS
from lwo_dist.errors import UserError
from lwo_dist.extras import EXTRAS, missing, require
from tests.code_samples import code
from tests.models import save_tiny_model
from tests.packages import PYTHON_OPTIONS, asked_for, link_environment

NOWHERE = "--address=http://127.0.0.1:1"
# One way to call each command.
CALLS = {
    "train": ["train"],
    "compare": ["compare", "--name", "x"],
    "config": ["config", "--defaults"],
    "plan": ["plan"],
    "data": ["data", "data.source=nowhere"],
    "submit": ["submit", NOWHERE],
    "jobs": ["jobs", "list", NOWHERE],
    "replay": ["replay", "nowhere"],
    "export": ["export", "nowhere"],
    "fetch": ["fetch", "nowhere", NOWHERE.replace("address", "uri")],
    "checkpoints": ["checkpoints", "list", "nowhere"],
    "ui": ["ui", "storage=nowhere"],
}

# Calls every command of argv[2:], each in its own words after a "--", and tells what it said.
SCRIPT = """
import sys
sys.path[:0] = ["", sys.argv[1]]  # As `python -m` does, the current directory first.
from lwo_dist.cli import main
calls = [[]]
for word in sys.argv[2:]:
    if word == "--":
        calls.append([])
    else:
        calls[-1].append(word)
for call in calls:
    print(main(call), flush=True)
print("torch" in sys.modules)
"""


def _call(
    folder: Path, calls: Sequence[Sequence[str]], cwd: Path, **environment: str
) -> tuple[list[str], list[str]]:
    """Call `lwo-dist` once for each of `calls`, in one interpreter that sees `folder` only. Returns
    the lines of stdout, the exit codes and whether torch was imported, and those of stderr.
    """
    words = [word for call in calls for word in ["--", *call]][1:]
    done = subprocess.run(
        [sys.executable, *PYTHON_OPTIONS, "-c", SCRIPT, str(folder), *words],
        cwd=cwd,
        env={"HOME": str(cwd), "PATH": "/usr/bin:/bin"} | environment,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), done.stderr.splitlines()


def test_without_extras_every_command_says_what_to_install(tmp_path: Path) -> None:
    assert CALLS.keys() == set(COMMANDS)
    environment = tmp_path / "environment"
    link_environment(environment)
    for name in ("datasets", "ray"):  # These are folders, and not the packages.
        (tmp_path / name).mkdir()
    out, err = _call(environment, [CALLS[name] for name in COMMANDS], tmp_path)
    assert out == [*["2"] * len(COMMANDS), "False"]
    extras = {
        "train": "run,ray",
        "compare": "run,ray",
        "submit": "ray",
        "jobs": "ray",
        "replay": "mlflow",
    }
    extras |= {
        "config": "run",
        "plan": "run",
        "data": "run",
        "export": "run",
        "checkpoints": "run",
        "ui": "mlflow",
        "fetch": "mlflow",
    }
    for name, line in zip(COMMANDS, err, strict=True):
        assert line.startswith(f"lwo-dist: lwo-dist {name} needs packages that are not installed (")
        otherwise = ", or pass --without-ray" if name == "compare" else ""
        assert line.endswith(f": pip install 'lwo-dist[{extras[name]}]'{otherwise}")
    assert (
        "accelerate, bm25s, datasets, datasketch, matplotlib" in err[0]
        and "yaml, ray, aiohttp_cors" in err[0]
    )


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ("ray", {"submit": "http://127.0.0.1:1", "jobs": "http://127.0.0.1:1"}),
        (
            "mlflow",
            {
                "replay": "nowhere does not exist",
                "ui": "storage = nowhere: no runs there",
                "fetch": "MLflow at http://127.0.0.1:1: Connection refused; start it, or correct",
            },
        ),
    ],
)
def test_a_command_needs_no_more_than_it_asks_for(
    tmp_path: Path, extra: str, said: dict[str, str]
) -> None:
    """It gets as far as to say what is wrong with its arguments."""
    link_environment(tmp_path / "environment", [extra])
    out, err = _call(tmp_path / "environment", [CALLS[name] for name in said], tmp_path)
    assert out[:-1] == ["2"] * len(said), err
    for line, message in zip(err, said.values(), strict=True):
        assert line.startswith("lwo-dist: ") and message in line


@pytest.mark.long
def test_extra_run_is_enough_to_train_under_torchrun(tmp_path: Path) -> None:
    link_environment(tmp_path / "environment", ["run"])
    source = tmp_path / "source"
    source.mkdir()
    texts = [code(seed) for seed in range(8)]
    for number, text in enumerate(texts):
        (source / f"{number}.py").write_text(text)
    save_tiny_model(tmp_path / "model", texts)
    train = ["train", f"model.name={tmp_path}/model", f"data.source={source}", "run_name=r"]
    train += [
        "train.steps=2",
        "train.global_batch_size=2",
        "train.sequence_length=48",
        "eval.num_lines=4",
        "eval.max_new_tokens=8",
    ]
    quiet = "tracking.enabled=false"
    calls = [
        train,
        [*train, quiet, "strategy=deepspeed"],
        [*train, quiet],
        ["checkpoints", "list", "runs/r"],
        ["export", "runs/r", "--to", "exported"],
    ]
    rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    out, err = _call(tmp_path / "environment", calls, tmp_path, **rank, MASTER_PORT="0")
    assert [line for line in out if line in ("0", "2")] == ["2", "2", "0", "0", "0"], "\n".join(err)
    said = [line for line in err if line.startswith("lwo-dist: ")]
    assert said == [
        "lwo-dist: tracking.enabled: true needs packages that are not installed (mlflow): pip"
        " install 'lwo-dist[mlflow]', or set tracking.enabled=false",
        "lwo-dist: strategy: deepspeed needs packages that are not installed (deepspeed): pip"
        " install 'lwo-dist[deepspeed]'",
    ]
    assert (tmp_path / "exported" / "model.safetensors").is_file()


def test_a_package_that_is_hidden_is_named() -> None:
    code = """
import sys
from importlib.machinery import PathFinder
class Hiding:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in ("ray", "transformers"):
            return None
        return PathFinder.find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Hiding
from lwo_dist.cli import main
sys.exit(main(["train"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "lwo-dist: lwo-dist train needs packages that are not installed (transformers, ray):"
        " pip install 'lwo-dist[run,ray]'\n"
    )


def test_only_the_extras_that_are_missing_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EXTRAS, "run", ("json",))
    monkeypatch.setitem(EXTRAS, "ray", ("json", "no_such_package"))
    require("run", what="it")
    assert missing("ray") == ["no_such_package"]
    with pytest.raises(UserError) as raised:
        require("run", "ray", what="it", otherwise="go without")
    assert str(raised.value) == (
        "it needs packages that are not installed (no_such_package): pip install 'lwo-dist[ray]',"
        " or go without"
    )


def test_every_module_stands_for_a_requirement() -> None:
    """And every requirement has a module, which says whether it is there."""
    distributions = importlib.metadata.packages_distributions()
    # What says that Ray was installed with its extras.
    more = {"ray": {"aiohttp-cors", "tensorboardx"}}
    for extra, modules in EXTRAS.items():
        asked = {str(canonicalize_name(line.name)) for line in asked_for(extra)}
        asked |= more.get(extra, set())
        for module in modules:
            # Several where they share a name, one of the module's own where it is not installed.
            names = {canonicalize_name(name) for name in distributions.get(module, [module])}
            assert names & asked, f"extra {extra} does not install {module}"
            asked -= names
        assert not asked, f"extra {extra}: nothing says whether these are installed"


def test_ray_s_extras_bring_what_stands_for_them() -> None:
    lines = [Requirement(line) for line in importlib.metadata.requires("ray") or []]
    for extra, name in [("default", "aiohttp-cors"), ("train", "tensorboardx")]:
        markers = [line.marker for line in lines if canonicalize_name(line.name) == name]
        assert any(marker and marker.evaluate({"extra": extra}) for marker in markers)
        assert not any(marker is None or marker.evaluate({"extra": ""}) for marker in markers)


def test_all_is_every_extra_of_a_user() -> None:
    [everything] = asked_for("all")
    assert (everything.name, everything.extras) == ("lwo-dist", set(EXTRAS))
