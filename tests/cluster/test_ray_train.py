"""Workers through the real commands: a local Ray, a cluster that is joined, and torchrun."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lwo_dist.cluster import ray_train
from lwo_dist.cluster.nodes import resources_per_worker
from lwo_dist.config import ClusterConfig, Config
from lwo_dist.errors import UserError
from tests.cluster.launching import STEPS, make_inputs, torchrun, without_raylets
from tests.cluster.launching import command as _command
from tests.cluster.launching import environment as _environment
from tests.cluster.launching import run as _run
from tests.listening import Watch, listed

SECRET = "hf_a_secret_of_the_test"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("ray"))


def test_a_local_ray_trains_and_says_each_line_once(folder: Path, tmp_path: Path) -> None:
    (folder / "home").mkdir(exist_ok=True)
    # A deep folder for temporary files: Ray's sockets do not fit below it.
    deep = tmp_path / ("deep" * 10)
    deep.mkdir()
    # A virtual environment whose path needs quotes.
    spaced = tmp_path / "a b"
    spaced.symlink_to(sys.prefix)
    python = str(spaced / "bin" / Path(sys.executable).name)
    command = _command(folder, "local", "cluster.env.OMP_NUM_THREADS='1'")
    watch = Watch()
    result = _run([python, *command[1:]], _environment(folder, TMPDIR=str(deep)))
    # Such a short run may end before the dashboard has started.
    optional = {("dashboard", "127.0.0.1"), ("monitor", "127.0.0.1")}
    assert watch.stop() | optional == listed("lwo-dist train")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    summary = json.loads((folder / "runs" / "local" / "summary.json").read_text())
    assert (summary["world_size"], summary["steps"]) == (2, STEPS)

    lines = result.stdout.splitlines()
    assert lines[:6] == [
        "checking the settings, the model and the source",
        f"reading {folder}/source",
        "starting Ray",
        "starting 2 worker(s)",
        "tokenising the source",
        f"loading model {folder}/model",
    ]
    assert "evaluating before training: 4 held-out lines" in lines
    assert len(lines) < 25
    progress = [line for line in lines if line.startswith("step ")]
    assert [line.split()[1] for line in progress] == [f"{step}/{STEPS}" for step in (2, 4, 6)]
    # Nothing is doubled, prefixed or coloured.
    assert len(lines) == len(set(lines))
    assert not re.search(r"pid=|\x1b", result.stdout)
    assert str(summary["export"]) in result.stdout
    assert not (folder / "home" / ".ray").exists()  # No token file of Ray's.


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """A Ray of two CPUs that runs on by itself, as the environment to join it with; its logs lie in
    RAY_TMPDIR.
    """
    (folder / "home").mkdir(exist_ok=True)
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 4}
    short = tempfile.mkdtemp(
        prefix="ray", dir="/tmp"
    )  # Ray's sockets do not fit below pytest's folders.
    environment = _environment(folder, RAY_TMPDIR=short, **token)
    code = (
        "import ray, sys; context = ray.init(address='local', num_cpus=2, num_gpus=0,"
        " log_to_driver=False);print(context.address_info['gcs_address'], flush=True);"
        " sys.stdin.read(); ray.shutdown()"
    )
    head = subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    with head:
        assert head.stdout is not None
        yield environment | {"RAY_ADDRESS": head.stdout.readline().strip()}
        head.communicate("")
    shutil.rmtree(short)


def test_too_many_workers_for_a_cluster(folder: Path, cluster: dict[str, str]) -> None:
    result = _run(_command(folder, "many", "cluster.num_workers=4"), cluster)
    assert result.returncode == 2
    assert "starting" not in result.stdout
    assert (
        result.stderr
        == "lwo-dist: cluster.num_workers = 4: this Ray cluster has 2 CPUs, and a worker takes 1"
        " CPU; "
        "set it to at most 2, or add nodes\n"
    )
    assert not (folder / "runs" / "many").exists()


@pytest.mark.parametrize(
    ("address", "why"), [("127.0.0.1:9", "refused"), ("nonsense", "Invalid address")]
)
def test_no_ray_at_the_address(folder: Path, address: str, why: str) -> None:
    (folder / "home").mkdir(exist_ok=True)
    result = _run(_command(folder, "nowhere"), _environment(folder, RAY_ADDRESS=address))
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1), result.stderr
    assert result.stderr.startswith(
        f"lwo-dist: RAY_ADDRESS = {address}: no Ray can be joined there ("
    )
    assert why in result.stderr
    assert not (folder / "runs" / "nowhere").exists()


def test_a_worker_s_user_error_is_one_line(folder: Path, cluster: dict[str, str]) -> None:
    result = _run(
        _command(folder, "bad", f"model.name={folder}/nowhere"), cluster | {"HF_TOKEN": SECRET}
    )
    assert result.returncode == 2
    *noise, line = without_raylets(result.stderr)
    assert re.fullmatch(r"lwo-dist: .*nowhere.*", line), result.stderr
    # Ray's own: a watcher at every start on a cluster, and a thread that may fail as the run ends.
    noise = noise[
        : next((i for i, other in enumerate(noise) if "PlacementGroupCleaner" in other), len(noise))
    ]
    assert not [other for other in noise if "PreemptionWatcher" not in other]
    # The hub's token went to the workers, and into no file on the way.
    files = [
        path
        for root in (folder, Path(cluster["RAY_TMPDIR"]))
        for path in root.rglob("*")
        if path.is_file()
    ]
    assert any("worker" in path.name for path in files)
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


def test_workers_get_the_driver_s_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    import cloudpickle

    from lwo_dist import run

    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("UNRELATED", "x")
    sent = cloudpickle.dumps(ray_train._train_loop(Config()))
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.delenv("UNRELATED")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(
        run,
        "run",
        lambda config, *_, **__: (config, os.environ.get("HF_TOKEN"), os.environ.get("UNRELATED")),
    )
    assert cloudpickle.loads(sent)() == (Config(), SECRET, None)


@pytest.mark.long  # a minute; the short form is in test_failures.py
def test_a_worker_s_failure_shows_its_whole_traceback(
    folder: Path, cluster: dict[str, str]
) -> None:
    in_the_way = folder / "runs" / "failing" / "evaluations"
    in_the_way.parent.mkdir(parents=True)
    in_the_way.touch()
    result = _run(_command(folder, "failing", "cluster.max_failures=0"), cluster)
    assert result.returncode == 1
    assert re.search(r"rank 0 on .*: Traceback", result.stderr)
    assert "in add_evaluation" in result.stderr
    assert f"FileExistsError: [Errno 17] File exists: '{in_the_way}'" in result.stderr


def test_ctrl_c_ends_the_run_and_leaves_the_cluster(folder: Path, cluster: dict[str, str]) -> None:
    command = _command(folder, "interrupted", "train.steps=100000", "tracking.enabled=true")
    with subprocess.Popen(
        command,
        cwd=cluster["HOME"],
        env=cluster,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as driver:
        limit = threading.Timer(400, driver.kill)
        limit.start()
        assert driver.stdout is not None
        next((line for line in driver.stdout if line.startswith("step ")), None)
        driver.send_signal(signal.SIGINT)
        _, stderr = driver.communicate()
        limit.cancel()
    assert driver.returncode == 130, stderr
    # Ray 2.60's own actor may find its cluster gone while it asks it something; the traceback is of
    # a thread of its.
    assert (
        "Traceback" not in stderr.partition("Exception in thread PlacementGroupCleanerMonitor:")[0]
    )
    assert "lwo_dist/cli.py" not in stderr
    records = (folder / "runs" / "interrupted" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(records[-1])["status"] == "KILLED"
    code = "import ray; ray.init(); print(ray.cluster_resources()['CPU'])"
    assert _run([sys.executable, "-c", code], cluster).stdout.split() == ["2.0"]


def _torchrun(folder: Path, run_name: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    (folder / "home").mkdir(exist_ok=True)
    return _run(torchrun(folder, run_name, *overrides), _environment(folder))


def test_torchrun_trains_without_ray(folder: Path) -> None:
    # The number of workers is torchrun's to say.
    watch = Watch()
    result = _torchrun(folder, "torchrun", "cluster.num_workers=1")
    assert watch.stop() == listed("torchrun")
    assert result.returncode == 0, result.stderr
    assert (
        json.loads((folder / "runs" / "torchrun" / "summary.json").read_text())["world_size"] == 2
    )
    progress = [line.split()[1] for line in result.stdout.splitlines() if line.startswith("step ")]
    assert progress == [f"{step}/{STEPS}" for step in (2, 4, 6)]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stepz=1", "unknown key train.stepz"),
        ("train.global_batch_size=3", "must be divisible by 2"),
    ],
)
def test_bad_input_under_torchrun_is_said_once(folder: Path, override: str, message: str) -> None:
    result = _torchrun(folder, "refused", override)
    ours = [line for line in result.stderr.splitlines() if line.startswith("lwo-dist: ")]
    assert len(ours) == 1 and message in ours[0], result.stderr
    assert "exitcode  : 2" in result.stderr
    assert "lwo_dist.config.UserError" not in result.stderr
    assert not (folder / "runs" / "refused").exists()


long = pytest.mark.long
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed"
)


@needs_deepspeed
@pytest.mark.parametrize(
    ("stage", "launchers"),
    [(3, ("torchrun",)), *(pytest.param(s, ("ray", "torchrun"), marks=long) for s in (1, 2, 3))],
)
def test_deepspeed_on_ray_and_torchrun_ends_in_a_model_that_loads(
    stage: int, launchers: tuple[str, ...], folder: Path, request: pytest.FixtureRequest
) -> None:
    """The long form runs every stage on Ray, too, and both end in the same losses."""
    overrides = ("strategy=deepspeed", f"zero_stage={stage}", "lwo.steps_per_layer=1")
    losses = {}
    for launcher in launchers:
        run_name = f"zero-{launcher}-{stage}-of-{len(launchers)}"
        if launcher == "ray":
            cluster = request.getfixturevalue("cluster")
            command = _command(folder, run_name, *overrides, "cluster.num_workers=2")
            result = _run(command, cluster)
        else:
            result = _torchrun(folder, run_name, *overrides)
        assert result.returncode == 0, result.stdout + result.stderr
        assert "built successfully" not in result.stdout  # DeepSpeed compiled nothing
        summary = json.loads((folder / "runs" / run_name / "summary.json").read_text())
        assert (summary["strategy"], summary["world_size"], summary["steps"]) == (
            "deepspeed",
            2,
            STEPS,
        )
        model = AutoModelForCausalLM.from_pretrained(summary["export"])
        base = AutoModelForCausalLM.from_pretrained(folder / "model")
        changed = [
            n for n, p in model.named_parameters() if not torch.equal(p, base.get_parameter(n))
        ]
        assert len(changed) == len(
            list(model.parameters())
        )  # a visit of one step each, and all have arrived
        losses[launcher] = summary["loss_first"], summary["loss_last"]
    assert len(set(losses.values())) == 1


NODE = {"CPU": 4.0, "GPU": 2.0, "memory": 1e9}


@pytest.mark.parametrize(
    ("cluster_config", "nodes", "expected"),
    [
        ({"num_workers": 4}, [NODE, NODE], {"CPU": 1, "GPU": 1}),
        ({"num_workers": 5}, [NODE, NODE], {"CPU": 1}),
        ({"num_workers": 2, "use_gpu": False}, [NODE], {"CPU": 1}),
        ({"num_workers": 2, "use_gpu": True}, [NODE], {"CPU": 1, "GPU": 1}),
        ({"num_workers": 2, "resources_per_worker": {"CPU": 2}}, [NODE], {"CPU": 2, "GPU": 1}),
        ({"num_workers": 8, "resources_per_worker": {"CPU": 0.5}}, [NODE], {"CPU": 0.5}),
    ],
)
def test_what_a_worker_takes(
    cluster_config: dict, nodes: list[dict[str, float]], expected: dict[str, float]
) -> None:
    assert resources_per_worker(ClusterConfig(**cluster_config), nodes) == expected


@pytest.mark.parametrize(
    ("cluster_config", "nodes", "message"),
    [
        (
            {"num_workers": 9},
            [NODE, NODE],
            "has 8 CPUs, and a worker takes 1 CPU; set it to at most 8, or add nodes",
        ),
        (
            {"num_workers": 3, "use_gpu": True},
            [NODE],
            "4 CPUs, 2 GPUs, .* takes 1 CPU, 1 GPU; set it to at most 2",
        ),
        (
            {"num_workers": 1, "use_gpu": True},
            [{"CPU": 2.0}],
            "2 CPUs, 0 GPUs, .* 1 GPU; set cluster.use_gpu=false",
        ),
        # 8 CPUs in all, and no place for a worker of 3 beside another.
        (
            {"num_workers": 3, "resources_per_worker": {"CPU": 3}},
            [NODE, NODE],
            "takes 3 CPU; set it to at most 2",
        ),
        (
            {"num_workers": 1, "resources_per_worker": {"CPU": 5}},
            [NODE],
            "lower cluster.resources_per_worker",
        ),
        ({"num_workers": 1, "resources_per_worker": {"TPU": 1}}, [NODE], "0 TPUs"),
    ],
)
def test_workers_that_do_not_fit(
    cluster_config: dict, nodes: list[dict[str, float]], message: str
) -> None:
    with pytest.raises(
        UserError, match=f"^cluster.num_workers = {cluster_config['num_workers']}: .*{message}"
    ):
        resources_per_worker(ClusterConfig(**cluster_config), nodes)
