"""What a change must pass: launch/test.sh, and the workflows that run it, with a stand-in for
Python.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).parents[2]
WORKFLOWS = sorted((REPOSITORY / ".github" / "workflows").iterdir())
TWO_AT_A_TIME = "--numprocesses=2 --dist=loadfile"
ALONE = "tests/cluster"


# ---- launch/test.sh


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    """An environment that is up to date; its Python logs its arguments, and fails where `fails`
    holds a part of them.
    """
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f"""#!/usr/bin/env bash
echo "$*" >>{tmp_path}/log
if [[ -e {tmp_path}/fails ]]; then [[ "$*" != *"$(cat {tmp_path}/fails)"* ]]; fi
""")
    python.chmod(0o755)
    requirements = [REPOSITORY / "pyproject.toml", REPOSITORY / "launch" / "constraints.txt"]
    stamp = "".join(path.read_text() for path in requirements)
    (tmp_path / ".lwo-dist").write_text(
        f"run ray mlflow deepspeed lora gguf code test\n{stamp}{REPOSITORY}\n"
    )
    return tmp_path


def run_test_script(venv: Path, *arguments: str) -> tuple[int, list[str], str]:
    """Its exit code, the calls of Python, and what it says on stderr."""
    done = subprocess.run(
        [REPOSITORY / "launch" / "test.sh", *arguments],
        env=os.environ | {"LWO_VENV": str(venv)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, (venv / "log").read_text().splitlines(), done.stderr


def test_two_parts_hold_every_test_once(venv: Path) -> None:
    code, calls, _ = run_test_script(venv)
    ignored = " ".join(f"--ignore={folder}" for folder in ALONE.split())
    assert code == 0
    assert calls == [
        "-m ruff format --check --quiet .",
        "-m ruff check .",
        "-m mypy",
        f"-m pytest -m not long {TWO_AT_A_TIME} {ignored}",
        f"-m pytest -m not long {ALONE}",
    ]
    assert all((REPOSITORY / folder).is_dir() for folder in ALONE.split())


def test_all_is_without_a_marker(venv: Path) -> None:
    _, calls, _ = run_test_script(venv, "--all")
    assert [call for call in calls if "pytest" in call and "not long" in call] == []
    assert len([call for call in calls if "pytest" in call]) == 2


@pytest.mark.parametrize(
    ("arguments", "call"),
    [
        (["tests/unit", "-x"], "-m pytest -m not long tests/unit -x"),
        (["--all", "-k", "spool"], "-m pytest -k spool"),
    ],
)
def test_arguments_go_to_pytest(venv: Path, arguments: list[str], call: str) -> None:
    assert run_test_script(venv, *arguments)[1][3:] == [call]


@pytest.mark.parametrize(
    ("fails", "part"), [("--dist=loadfile", "first"), (f"long {ALONE}", "second")]
)
def test_either_part_fails_the_whole_and_both_run(venv: Path, fails: str, part: str) -> None:
    (venv / "fails").write_text(fails)
    code, calls, said = run_test_script(venv)
    assert code == 1 and len(calls) == 5
    assert said == f"test.sh: the {part} part failed; see above\n"


@pytest.mark.parametrize("fails", ["ruff check", "mypy"])
def test_no_test_runs_after_a_failed_check(venv: Path, fails: str) -> None:
    (venv / "fails").write_text(fails)
    code, calls, _ = run_test_script(venv)
    assert code == 1 and not [call for call in calls if "pytest" in call]


# ---- the workflows


def read(path: Path) -> dict[Any, Any]:
    workflow = yaml.safe_load(path.read_text())
    assert isinstance(workflow, dict)
    return workflow


def steps(workflow: dict[Any, Any]) -> list[dict[str, Any]]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def test_both_workflows_are_there() -> None:
    assert [path.name for path in WORKFLOWS] == ["long.yaml", "tests.yaml"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_keeps_the_rules(path: Path) -> None:
    workflow = read(path)
    # YAML 1.1 reads the key `on` as true.
    assert workflow.keys() == {"name", True, "permissions", "concurrency", "env", "jobs"}
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow["concurrency"]["group"] == "${{ github.workflow }}-${{ github.ref }}"
    assert workflow["env"]["PIP_EXTRA_INDEX_URL"] == "https://download.pytorch.org/whl/cpu"
    for job in workflow["jobs"].values():
        assert "permissions" not in job and job["timeout-minutes"] > 0
        assert re.fullmatch(r"ubuntu-\d\d\.\d\d", job["runs-on"])
    for step in steps(workflow):
        assert ("uses" in step) != ("run" in step)
        if "uses" in step:
            assert re.fullmatch(r"[\w-]+/[\w-]+@v\d+\.\d+\.\d+", step["uses"]), step["uses"]
        if "checkout" in step.get("uses", ""):
            assert step["with"]["persist-credentials"] is False
        if "setup-python" in step.get("uses", ""):
            assert step["with"]["cache"] == "pip"
            files = step["with"]["cache-dependency-path"].split()
            assert all((REPOSITORY / file).is_file() for file in files)


@pytest.mark.parametrize(
    ("name", "command"),
    [("tests.yaml", ["./launch/test.sh"]), ("long.yaml", ["./launch/test.sh", "--all"])],
)
def test_a_workflow_runs_the_test_script(name: str, command: list[str]) -> None:
    workflow = read(REPOSITORY / ".github" / "workflows" / name)
    [run] = [step["run"] for step in steps(workflow) if "run" in step]
    assert shlex.split(run) == command
    assert os.access(REPOSITORY / command[0], os.X_OK)


def test_the_oldest_python_is_among_those_that_are_tested() -> None:
    [job] = read(REPOSITORY / ".github" / "workflows" / "tests.yaml")["jobs"].values()
    oldest = re.search(r'requires-python = ">=(.*)"', (REPOSITORY / "pyproject.toml").read_text())
    assert oldest and job["strategy"]["matrix"]["python"][0] == oldest[1]
