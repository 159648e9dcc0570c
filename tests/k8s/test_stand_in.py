"""The job as the manifests run it, without Kubernetes: the same command, config, environment, mounts, user and
read-only root, in a private mount namespace. Ray's head and workers in pods of their own are not part of it."""

from __future__ import annotations

import json
import os
import shlex
import site
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from .manifests import K8S, REPOSITORY

UID = 1000
TIMEOUT = 900

# $1: the new root; the other arguments: folders to show there, read-only, under their own names.
NEW_ROOT = """
set -euo pipefail
root=$1; shift
mount -t tmpfs -o mode=755 tmpfs "$root"
for top in /bin /sbin /lib /lib32 /lib64; do if [[ -L $top ]]; then cp -P "$top" "$root$top"; fi; done
mkdir "$root"/{usr,proc,dev,etc,opt,tmp,runs,scratch}
cp -r --dereference --no-preserve=ownership /etc/. "$root/etc/" 2>/dev/null || true
mount --rbind /usr "$root/usr"; mount --rbind /proc "$root/proc"; mount --rbind /dev "$root/dev"
for volume in tmp scratch dev/shm; do mount -t tmpfs -o mode=1777 tmpfs "$root/$volume"; done
mount --bind "$RUNS" "$root/runs"
mkdir -p "$root/etc/lwo-dist" "$root/opt/lwo/bin"
cp "$CONFIG" "$root/etc/lwo-dist/config.yaml"
printf '#!/bin/sh\\nexec "%s" -m lwo_dist.cli "$@"\\n' "$PYTHON" >"$root/opt/lwo/bin/lwo-dist"
chmod -R a+rX,a+x "$root/etc/lwo-dist" "$root/opt"
ln -s "$SOURCE" "$root/opt/lwo/example-source"
for folder in "$@"; do
  mkdir -p "$root$folder"
  mount --bind "$folder" "$root$folder"
  mount -o remount,bind,ro "$root$folder"
done
mount -o remount,ro "$root"
cd "$root/tmp"
exec chroot --userspec="$USER_SPEC" "$root" /usr/bin/env -i "${ENVIRONMENT[@]}" /bin/sh -c "cd /tmp && $ENTRYPOINT"
"""


def _namespaces_allowed() -> bool:
    if os.geteuid() != 0:
        return False
    probe = ["unshare", "--mount", "sh", "-c", "mount -t tmpfs tmpfs /mnt"]
    try:
        return subprocess.run(probe, capture_output=True).returncode == 0
    except OSError:
        return False


pytestmark = pytest.mark.skipif(not _namespaces_allowed(), reason="needs root and a private mount namespace")


def _job() -> dict[str, Any]:
    job: dict[str, Any] = yaml.safe_load((K8S / "base" / "ray-job.yaml").read_text())["spec"]
    return job


def _stand_in(folder: Path, entrypoint: str) -> subprocess.CompletedProcess[str]:
    """Run `entrypoint` where the head's container would; what it sees as /runs is `folder`/runs."""
    import datasets

    pod = _job()["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert pod["securityContext"]["runAsUser"] == UID
    assert pod["containers"][0]["securityContext"]["readOnlyRootFilesystem"]
    mounted = {mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounted == {"/runs", "/tmp", "/scratch", "/dev/shm", "/etc/lwo-dist"}
    # Secrets are not here, so MLflow cannot be reached: the run goes on without it.
    environment = {entry["name"]: entry["value"] for entry in pod["containers"][0]["env"] if "value" in entry}
    environment |= {"PATH": "/opt/lwo/bin:/usr/bin:/bin", "LWO_TINY_CODE": "small", "OMP_NUM_THREADS": "1"}
    environment |= {
        "PYTHONPATH": str(REPOSITORY),
        "PYTHONDONTWRITEBYTECODE": "1",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    }

    runs, root = folder / "runs", folder / "root"
    runs.mkdir()
    root.mkdir()
    os.chown(runs, UID, UID)
    packages = [*site.getsitepackages(), *(path for path in sys.path if path.endswith("site-packages"))]
    shown = dict.fromkeys([sys.base_prefix, sys.prefix, *packages, str(REPOSITORY)])
    outer = {
        "RUNS": str(runs), "CONFIG": str(K8S / "overlays" / "cpu-smoke" / "config.yaml"), "PYTHON": sys.executable,
        "SOURCE": str(Path(datasets.__file__).parent), "USER_SPEC": f"{UID}:{UID}", "ENTRYPOINT": entrypoint,
    }  # fmt: skip
    pairs = " ".join(shlex.quote(f"{name}={value}") for name, value in environment.items())
    script = f"ENVIRONMENT=({pairs})\n{NEW_ROOT}"
    command = ["unshare", "--mount", "bash", "-c", script, "new-root", str(root), *shown]
    return subprocess.run(command, env=os.environ | outer, capture_output=True, text=True, timeout=TIMEOUT)


@pytest.mark.long
def test_the_main_job_ends_well(tmp_path: Path) -> None:
    done = _stand_in(tmp_path, _job()["entrypoint"])
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "runs" / "smoke"
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["steps"], summary["world_size"]) == (20, 2)
    assert (run / "summary.json").stat().st_uid == UID
    assert (run / "model" / "config.json").is_file()


def test_only_the_volumes_can_be_written(tmp_path: Path) -> None:
    places = "/ /usr /etc /etc/lwo-dist /opt/lwo /tmp /runs /scratch /dev/shm " + str(REPOSITORY)
    probe = f'id -u; for place in {places}; do if (: >"$place/probe") 2>/dev/null; then echo "$place"; fi; done; true'
    done = _stand_in(tmp_path, probe)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == [str(UID), "/tmp", "/runs", "/scratch", "/dev/shm"]
