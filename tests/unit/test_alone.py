"""The plugin works where only torch and pydantic are installed: `import lwo_dist`, `attach`, train.

The quick tests make that environment of links to what is installed here, the long one of `pip
install .`.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.packages import PYTHON_OPTIONS, REPOSITORY, link_environment

SCRIPT = REPOSITORY / "tests" / "alone.py"
RANKS = 2
PUBLIC = [
    "LWO",
    "LWOConfig",
    "Layer",
    "StepReport",
    "UserError",
    "__version__",
    "attach",
    "causal_lm_loss",
    "prepare",
]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("environment")
    link_environment(folder)
    return folder


def _run(*commands: Sequence[object]) -> list[str]:
    """Run them at the same time, and return what each wrote to stdout."""
    running = [
        subprocess.Popen(
            [*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for command in commands
    ]
    try:
        said = [process.communicate(timeout=1200) for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    assert [process.returncode for process in running] == [0] * len(commands), said
    return [out for out, _ in said]


def _check(result: dict[str, Any]) -> None:
    assert result["attempted"] == []
    assert result["losses"] == pytest.approx(result["plain"], rel=0, abs=1e-12)
    assert result["losses"][-1] < 0.7 * result["losses"][0]


def test_a_plain_module_is_trained(alone: Path) -> None:
    [out] = _run([sys.executable, *PYTHON_OPTIONS, SCRIPT, alone, "plain"])
    _check(json.loads(out))


def test_an_fsdp2_module_is_trained(alone: Path, tmp_path: Path) -> None:
    command = [sys.executable, *PYTHON_OPTIONS, SCRIPT, alone, "fsdp2"]
    meet = tmp_path / "rendezvous"
    for out in _run(*([*command, str(rank), str(RANKS), meet] for rank in range(RANKS))):
        _check(json.loads(out))


def test_help_shows_what_is_public_and_torch_comes_with_its_first_use(alone: Path) -> None:
    code = f"""
import sys
sys.path.append({str(alone)!r})
import lwo_dist
print("torch" in sys.modules, set(lwo_dist.__all__) <= set(dir(lwo_dist)))
import pydoc
print(pydoc.plain(pydoc.render_doc(lwo_dist)))
"""
    [out] = _run([sys.executable, *PYTHON_OPTIONS, "-c", code])
    before, _, page = out.partition("\n")
    assert before == "False True"
    shown = set(re.findall(r"(?m)^    (?:class )?(\w+)\(", page))
    assert {name for name in PUBLIC if not name.startswith("_")} <= shown


def test_the_public_names() -> None:
    import lwo_dist

    assert lwo_dist.__all__ == PUBLIC
    with pytest.raises(AttributeError, match="module 'lwo_dist' has no attribute 'nothing'"):
        lwo_dist.nothing  # noqa: B018
    assert (Path(lwo_dist.__file__).parent / "py.typed").is_file()


@pytest.mark.long
def test_pip_installs_no_more_and_it_works(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"  # A copy: pip builds in the folder that it installs.
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        checkout.mkdir(exist_ok=True)
        shutil.copy(REPOSITORY / name, checkout)
    shutil.copytree(
        REPOSITORY / "lwo_dist",
        checkout / "lwo_dist",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    python = tmp_path / "venv" / "bin" / "python"
    constraints = REPOSITORY / "launch" / "constraints.txt"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    install = [python, "-m", "pip", "install", "--quiet", "--constraint", constraints, checkout]
    _run(install)
    [where] = _run([python, "-I", "-c", "import lwo_dist; print(lwo_dist.__path__[0])"])
    installed = Path(where.strip())
    assert installed.is_relative_to(tmp_path / "venv") and (installed / "py.typed").is_file()
    meet, nothing_more = tmp_path / "rendezvous", tmp_path / "nothing"
    command = [python, "-I", SCRIPT, nothing_more]
    [out] = _run([*command, "plain"])
    _check(json.loads(out))
    for out in _run(*([*command, "fsdp2", str(rank), str(RANKS), meet] for rank in range(RANKS))):
        _check(json.loads(out))
