"""The pages are true: their tables are those that the code makes, what they link to is there, and
their commands are run by tests.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch

from tests import oracle, pages

REPOSITORY = Path(__file__).parents[2]
PAGES = sorted(
    path.relative_to(REPOSITORY).as_posix()
    for path in [
        REPOSITORY / "README.md",
        REPOSITORY / "CONTRIBUTING.md",
        REPOSITORY / "tests" / "README.md",
        *(REPOSITORY / "lwo_dist").rglob("README.md"),
    ]
)
LINKED = [*PAGES, "launch/README.md", "launch/SECURITY.md", "k8s/README.md"]

# Every command of the pages -> the test that runs it.
RUN_BY = {
    "./launch/quickstart.sh": "tests/cluster/test_quickstart.py",
    "./launch/quickstart.sh --source ~/src/my-repository": "tests/cluster/test_quickstart.py",
    # It runs everything, this file included.
    "./launch/test.sh": "tests/test_architecture.py",
    "./launch/test.sh --all": "tests/unit/test_scripts.py",
    "./launch/test.sh tests/unit": "tests/unit/test_scripts.py",
    "./launch/test.sh --gpu": "tests/unit/test_gpu_suite.py",
    "./launch/test.sh --gpu --wheels wheels --json figures": "tests/unit/test_gpu_suite.py",
    "lwo-dist train -c launch/configs/debug_cpu.yaml data.source=DIR": (
        "tests/cluster/test_ray_train.py"
    ),
    "torchrun --master-port 29500 --nproc-per-node 2 launch/train.py "
    "-c launch/configs/debug_cpu.yaml data.source=DIR": "tests/cluster/test_ray_train.py",
    # On two ranks, with a tiny model.
    "lwo-dist train -c launch/configs/7b_1gpu_80gb.yaml data.source=DIR": (
        "tests/distributed/test_configs.py"
    ),
    "lwo-dist train -c launch/configs/7b_8gpu_80gb.yaml data.source=DIR": (
        "tests/distributed/test_configs.py"
    ),
    "torchrun --master-port 29500 --nproc-per-node 8 launch/train.py "
    "-c launch/configs/7b_8gpu_80gb.yaml data.source=DIR": "tests/distributed/test_configs.py",
    "lwo-dist compare -c CONFIG.yaml data.source=DIR --name lora-or-lwo": (
        "tests/cluster/test_compare.py"
    ),
    "lwo-dist compare -c CONFIG.yaml data.source=DIR --name more "
    "--methods lwo,lora,lora_r64.yaml --seeds 5 --jobs 4": "tests/distributed/test_compare.py",
    "lwo-dist compare -c CONFIG.yaml data.source=DIR --name here --without-ray": (
        "tests/distributed/test_compare.py"
    ),
    "lwo-dist plan -c CONFIG.yaml --gpus 8xH100-80GB --world-size 1024": "tests/unit/test_plan.py",
    "lwo-dist checkpoints list runs/NAME": "tests/distributed/test_checkpoint_run.py",
    "lwo-dist export runs/NAME --dtype bf16": "tests/distributed/test_checkpoint_run.py",
    "lwo-dist export runs/NAME --adapter": "tests/distributed/test_lora.py",
    "lwo-dist export s3://bucket/runs/NAME": "tests/distributed/test_object_store.py",
    "lwo-dist fetch NAME --uri http://mlflow.example:5000": "tests/servers/test_fetch.py",
    "lwo-dist submit -c CONFIG.yaml --address http://127.0.0.1:8265 storage=/shared/runs": (
        "tests/cluster/test_jobs.py"
    ),
    # These two as far as they go without Kubernetes and without Slurm: rendered and checked; run on
    # stand-ins.
    "kubectl apply -k k8s/overlays/cpu-smoke": "tests/k8s/test_manifests.py",
    "sbatch --nodes=2 --gpus-per-node=4 --ntasks-per-node=4 launch/slurm.sbatch -c CONFIG.yaml": (
        "tests/unit/test_scripts.py"
    ),
    "lwo-dist ui": "tests/unit/test_ui.py",
    "python tests/benchmarks/kills.py --kills 20 --seed 1 --json kills.json": (
        "tests/cluster/test_kills.py"
    ),
    "lwo-dist replay runs/NAME": "tests/servers/test_mlflow.py",
    "pip install .": "tests/unit/test_alone.py",
}


def commands() -> list[str]:
    """The commands of the pages' bash blocks, without comments and without the activation of the
    environment.
    """
    found = []
    for page in PAGES:
        text = (REPOSITORY / page).read_text()
        for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words and words[0] not in ("source", "export"):
                    found.append(" ".join(words))
    return found


def test_every_command_is_run_by_a_test_that_exists() -> None:
    assert set(commands()) == set(RUN_BY)
    assert all((REPOSITORY / test).is_file() for test in RUN_BY.values())


@pytest.mark.parametrize(("page", "name"), pages.GENERATED)
def test_the_tables_are_as_made(page: str, name: str) -> None:
    """On failure, run `python -m tests.pages`."""
    text = (REPOSITORY / page).read_text()
    assert pages.filled(text, {name: pages.TABLES[name]()}) == text


def test_the_front_page_is_short() -> None:
    assert len((REPOSITORY / "README.md").read_text().split()) <= 1100


def test_no_generated_table_is_left_out() -> None:
    marked = {
        (page, name) for page in LINKED for name in pages.names((REPOSITORY / page).read_text())
    }
    assert marked == set(pages.GENERATED)


def test_the_loop_runs_as_pasted() -> None:
    """The blocks that import lwo_dist are whole, but for `model` and `batches`."""
    text = (REPOSITORY / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    loops = [block for block in blocks if block.startswith("import lwo_dist\n")]
    assert loops
    for loop in loops:
        model = oracle.tiny_model(tied=True)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        losses = losses_of(loop, model)
        assert len(losses) == 3 and losses[0] > losses[1] > losses[2]
        after = model.state_dict()
        assert any(not torch.equal(tensor, after[name]) for name, tensor in before.items())
        assert all(parameter.requires_grad for parameter in model.parameters())


def losses_of(loop: str, model: torch.nn.Module) -> list[float]:
    """Run the source of a loop over the same batch, three times."""
    tokens, labels = oracle.global_batch(0)
    batches = [{"input_ids": tokens, "labels": labels}] * 3
    losses: list[float] = []
    model.register_forward_hook(lambda *call: losses.append(call[-1].loss.detach().item()))
    exec(compile(loop, "README.md", "exec"), {"model": model, "batches": batches})
    return losses


def links(page: str) -> list[str]:
    text = (REPOSITORY / page).read_text()
    return sorted(set(re.findall(r"\]\((?!http)([^)#]+)\)", text)))


@pytest.mark.parametrize(
    ("page", "target"), [(page, target) for page in LINKED for target in links(page)]
)
def test_every_link_leads_somewhere(page: str, target: str) -> None:
    assert ((REPOSITORY / page).parent / target).exists()


def test_every_file_that_a_page_names_in_passing_exists() -> None:
    """`tests/oracle.py`, `fsdp/strategy.py`: relative to the page, the package or the top."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    ).stdout
    known = [f"/{name}" for name in listed.splitlines()]
    if not known:
        pytest.skip("no git work tree")
    missing = []
    for page in PAGES:
        for name in re.findall(r"`([\w./-]+\.(?:py|sh|yaml))`", (REPOSITORY / page).read_text()):
            if not any(path.endswith(f"/{name.removeprefix('./')}") for path in known):
                missing.append((page, name))
    assert missing == []
