"""The CPU image, built with buildah on a base that debootstrap makes, and run as a pod runs it: uid
1000 without any capability, a read-only root, only the volumes to write to. Kubernetes and Debian's
published base are not part of it.

LWO_BUILD_OPTIONS: more options of `buildah bud`, for a place that reaches PyPI or torch's wheels in
its own way, such as --volume=/etc/pip.conf:/etc/pip.conf:ro
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import tempfile
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.hosts import hosts, why_not

from .container import Container, Image, Mount
from .manifests import K8S, REPOSITORY
from .test_image_locks import pins

UID = 1000
MAX_SIZE = 3e9
VOLUMES = ("/tmp", "/scratch", "/runs", "/dev/shm")
SECURITY = {
    "runAsUser": UID,
    "runAsGroup": UID,
    "readOnlyRootFilesystem": True,
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
}
SUITES = ("debian bookworm", "debian bookworm-updates", "debian-security bookworm-security")
COMPILERS = {"as", "c++", "cc", "clang", "cmake", "g++", "gcc", "ld", "make", "nvcc"}


def _missing() -> str | None:
    if os.geteuid() != 0:
        return "needs root"
    missing = [tool for tool in ("buildah", "debootstrap") if shutil.which(tool) is None]
    if missing:
        return f"no {' and no '.join(missing)} (Debian and Ubuntu: apt install buildah debootstrap)"
    return why_not()


REASON = _missing()
pytestmark = [pytest.mark.long, pytest.mark.skipif(REASON is not None, reason=str(REASON))]


def _checked(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, (
        f"{shlex.join(map(str, command))}\n{done.stdout[-5000:]}\n{done.stderr[-5000:]}"
    )
    return done.stdout.strip()


@dataclass(frozen=True)
class Built:
    """The image's root file system and its configuration."""

    root: Path
    config: dict[str, Any]

    def run(self, *command: str, runs: Path | None = None, **environment: str) -> tuple[int, str]:
        """The exit code and log of `command`, or of the image's own, behind its entrypoint, as a
        pod runs it.
        """
        image = Image(self.root, {}, working_dir=self.config["WorkingDir"])
        with hosts(1) as (host,), tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            folder.chmod(0o755)
            (folder / "runs").mkdir()
            (folder / "hosts").write_text(f"127.0.0.1 localhost\n{host.address} {host.name}\n")
            os.chown(runs or folder / "runs", UID, UID)
            memory = [Mount(volume, None, size=2**30) for volume in VOLUMES if volume != "/runs"]
            config = Mount(
                "/etc/lwo-dist/config.yaml",
                K8S / "overlays" / "cpu-smoke" / "config.yaml",
                read_only=True,
            )
            container = Container(
                name="image",
                image=image,
                command=[*self.config["Entrypoint"], *(command or self.config["Cmd"])],
                environment=dict(entry.split("=", 1) for entry in self.config["Env"]) | environment,
                mounts=[
                    *memory,
                    config,
                    Mount("/runs", runs or folder / "runs"),
                    Mount("/etc/hosts", folder / "hosts"),
                ],
                security=SECURITY,
                namespace=host.namespace,
                hostname=host.name,
                folder=folder / "container",
            )
            container.start()
            try:
                return container.wait(900), container.log
            finally:
                container.remove()

    def output(self, *command: str) -> str:
        code, log = self.run(*command)
        assert code == 0, log
        return log.strip()


@pytest.fixture(scope="module")
def image() -> Iterator[Built]:
    with tempfile.TemporaryDirectory(prefix="lwo-image-", dir="/var/tmp") as folder:
        buildah = [
            "buildah",
            "--storage-driver=vfs",
            f"--root={folder}/storage",
            f"--runroot={folder}/run",
        ]
        try:
            base = _base(buildah, Path(folder, "base"))
            options = shlex.split(os.environ.get("LWO_BUILD_OPTIONS", ""))
            _checked(
                *buildah,
                "bud",
                "--isolation=chroot",
                "--pull-never",
                "--file=launch/Dockerfile",
                "--ignorefile=launch/Dockerfile.dockerignore",
                f"--build-arg=BASE={base}",
                "--build-arg=VARIANT=cpu",
                *options,
                "--tag=lwo-dist",
                ".",
            )
            container = _checked(*buildah, "from", "--pull-never", "localhost/lwo-dist")
            root = Path(_checked(*buildah, "mount", container))
            for stub in (
                option.split(":")[1] for option in options if option.startswith("--volume=")
            ):
                _remove_stub(root / stub.lstrip("/"))
            yield Built(
                root, json.loads(_checked(*buildah, "inspect", container))["OCIv1"]["config"]
            )
        finally:
            subprocess.run([*buildah, "rm", "--all"], capture_output=True)
            subprocess.run([*buildah, "rmi", "--all", "--force"], capture_output=True)


def _base(buildah: list[str], folder: Path) -> str:
    """An image of Debian's minimal system, with the sources that its published image has."""
    _checked("debootstrap", "--variant=minbase", "bookworm", folder)
    sources = folder / "etc" / "apt" / "sources.list"
    mirror = sources.read_text().split(" ")[1].rpartition("/debian")[0]
    sources.write_text("".join(f"deb {mirror}/{suite} main\n" for suite in SUITES))
    container = _checked(*buildah, "from", "scratch")
    _checked("cp", "--archive", f"{folder}/.", _checked(*buildah, "mount", container))
    shutil.rmtree(folder)
    _checked(*buildah, "commit", "--rm", container, "localhost/bookworm")
    return "localhost/bookworm"


def _remove_stub(place: Path) -> None:
    """buildah leaves an empty file or folder where a volume was."""
    if place.is_dir():
        place.rmdir()
    else:
        assert place.stat().st_size == 0
        place.unlink()


def test_the_programs_that_the_manifests_name_run(image: Built) -> None:
    assert image.config["User"] == f"{UID}:{UID}"
    wanted = pins((REPOSITORY / "launch" / "image" / "requirements-cpu.txt").read_text())
    assert "usage: lwo-dist" in image.output()
    assert image.output("ray", "--version").split()[-1] == wanted["ray"]
    assert image.output("mlflow", "--version").split()[-1] == wanted["mlflow"]
    imports = (
        "import torch, deepspeed, peft, psycopg2, flask_wtf; print(torch.__version__,"
        " deepspeed.__version__)"
    )
    assert (
        image.output("python", "-c", imports).splitlines()[-1]
        == f"{wanted['torch']} {wanted['deepspeed']}"
    )
    assert image.output("python", "-m", "lwo_dist.cluster.drain", "--help").startswith("usage:")
    assert image.output("git", "--version").startswith("git version")
    assert image.output("sh", "-c", "ls /opt/lwo/example-source/*.py")


def test_only_the_volumes_can_be_written(image: Built) -> None:
    places = "/ /usr /etc /etc/lwo-dist /opt/lwo /opt/lwo/venv /var/tmp /home " + " ".join(VOLUMES)
    probe = (
        f'id -u; for place in {places}; do if (: >"$place/probe") 2>/dev/null; then echo "$place";'
        " fi; done"
    )
    assert image.output("sh", "-c", probe).split() == [str(UID), *VOLUMES]


def test_nothing_of_the_build_is_left(image: Built) -> None:
    files = [path for path in image.root.rglob("*") if path.is_file() and not path.is_symlink()]
    assert COMPILERS & {path.name for path in files if path.stat().st_mode & 0o111} == set()
    assert [path for path in files if path.stat().st_mode & 0o6000] == []
    packages = [
        path
        for path in files
        if path.suffix in {".whl", ".deb"} or "var/lib/apt/lists/" in str(path)
    ]
    # virtualenv, which Ray asks for, carries its seeds.
    assert [path for path in packages if "virtualenv/seed/wheels" not in str(path)] == []
    assert list(image.root.glob("**/site-packages/pip")) == []
    assert list((image.root / "tmp").iterdir()) == []
    assert not (image.root / "build").exists()
    # A package from a file would say where that file was, and the SBOM would not know where the
    # package is from.
    assert list(image.root.rglob("direct_url.json")) == []
    assert sum(path.stat().st_size for path in files) < MAX_SIZE


def test_the_sbom_is_valid_and_names_what_is_there(image: Built) -> None:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    text = (image.root / "opt" / "lwo" / "sbom.cdx.json").read_text()
    found = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
    assert found is None, str(found.data)[:1000]
    components = json.loads(text)["components"]
    named = [component.get("purl", "") for component in components]
    locked = pins((REPOSITORY / "launch" / "image" / "requirements-cpu.txt").read_text())
    assert _of_kind(named, "pypi") == {f"{name}@{version}" for name, version in locked.items()}
    # What is on no index has no package URL.
    ours = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    others = {
        (component["name"], component["version"])
        for component in components
        if "purl" not in component
    }
    assert others == {("Debian", "12"), (ours["name"], ours["version"])}
    query = "${db:Status-Abbrev} ${Package}@${Version} ${Architecture}\n"
    status = _checked(
        "dpkg-query", f"--admindir={image.root}/var/lib/dpkg", "--show", f"--showformat={query}"
    )
    installed = [line.split() for line in status.splitlines() if line.startswith("ii ")]
    assert _of_kind(named, "deb/debian") >= {package for _, package, _ in installed}
    binaries = [purl for purl in named if purl.startswith("pkg:deb/") and "arch=source" not in purl]
    assert len(binaries) == len(installed)


def _of_kind(purls: list[str], kind: str) -> set[str]:
    """NAME@VERSION of those package URLs."""
    from packageurl import PackageURL

    parsed = [PackageURL.from_string(purl) for purl in purls if purl.startswith(f"pkg:{kind}/")]
    return {f"{purl.name}@{purl.version}" for purl in parsed}


def test_the_main_job_ends_well(image: Built, tmp_path: Path) -> None:
    job = yaml.safe_load((K8S / "base" / "ray-job.yaml").read_text())["spec"]
    container = job["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    # Without a cluster Ray is a local one, and without secrets MLflow cannot be reached: the run
    # goes on without it.
    environment = {entry["name"]: entry["value"] for entry in container["env"] if "value" in entry}
    environment |= {
        "LWO_TINY_CODE": "small",
        "OMP_NUM_THREADS": "1",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    }
    code, log = image.run(*shlex.split(job["entrypoint"]), runs=tmp_path, **environment)
    assert code == 0, log
    summary = json.loads((tmp_path / "smoke" / "summary.json").read_text())
    assert (summary["steps"], summary["world_size"]) == (20, 2)
    assert (tmp_path / "smoke" / "summary.json").stat().st_uid == UID
    assert (tmp_path / "smoke" / "model" / "config.json").is_file()
