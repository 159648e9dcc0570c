"""What the pods' containers run in: the built image's root file system, or this machine's folders
in its place.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import site
import sys
from pathlib import Path

from .container import Image
from .manifests import REPOSITORY

__all__ = ["lwo_dist_image", "postgres_image"]

DOCKERFILE = REPOSITORY / "launch" / "Dockerfile"
# What the image's folder of commands holds -> the module that is behind it.
_COMMANDS = {"lwo-dist": "lwo_dist.cli", "ray": "ray.scripts.scripts", "mlflow": "mlflow"}


def lwo_dist_image(folder: Path) -> Image:
    """LWO_IMAGE_ROOT names the root file system of the built image; else `folder` gets a stand-in.

    Environment, entry point and working directory are the Dockerfile's either way.
    """
    environment, entrypoint = {"PATH": "/usr/local/bin:/usr/bin:/bin"}, list[str]()
    working_dir, command = "/", list[str]()
    text = re.sub(r"\\\n", " ", DOCKERFILE.read_text())
    for line in text[text.rindex("\nFROM ") :].splitlines():
        keyword, _, words = line.partition(" ")
        if keyword == "ENV":
            for pair in shlex.split(words):
                name, _, value = pair.partition("=")
                environment[name] = re.sub(r"\$(\w+)", lambda match: environment[match[1]], value)
        elif keyword == "WORKDIR":
            working_dir = words
        elif keyword == "ENTRYPOINT":
            entrypoint = _words(words)
        elif keyword == "CMD":
            command = _words(words)
    if root := os.environ.get("LWO_IMAGE_ROOT"):
        return Image(Path(root), environment, entrypoint, command, working_dir)
    _stand_in(folder, Path(environment["PATH"].split(":")[0]))
    packages = [
        *site.getsitepackages(),
        *(path for path in sys.path if path.endswith("site-packages")),
    ]
    # Not the whole checkout: the image has no git work tree around its packages.
    borrowed = dict.fromkeys(
        ["/usr", sys.base_prefix, sys.prefix, *packages, str(REPOSITORY / "lwo_dist")]
    )
    if shutil.which(entrypoint[0]) is None:
        entrypoint = []
    environment |= {"PYTHONPATH": str(REPOSITORY), "LWO_TINY_CODE": "small"}
    return Image(folder, environment, entrypoint, command, working_dir, tuple(borrowed))


def _words(exec_form: str) -> list[str]:
    return [word.strip(' "') for word in exec_form.strip(" []").split(",")]


def _stand_in(root: Path, commands: Path) -> None:
    import datasets

    _this_system(root)
    commands = root / commands.relative_to("/")
    commands.mkdir(parents=True)
    # Not links: Python finds its environment by the path that it was started by.
    scripts = {"python": sys.executable} | {
        name: f"{sys.executable} -m {what}" for name, what in _COMMANDS.items()
    }
    for name, script in scripts.items():
        (commands / name).write_text(f'#!/bin/sh\nexec {script} "$@"\n')
        (commands / name).chmod(0o755)
    (root / "opt/lwo/example-source").symlink_to(Path(datasets.__file__).parent)


def postgres_image(folder: Path) -> Image:
    """Debian's server behind what the official image's entry point does with POSTGRES_*; raises
    FileNotFoundError.
    """
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    if not programs:
        raise FileNotFoundError("no PostgreSQL server (Debian: postgresql)")
    _this_system(folder)
    with (folder / "etc/passwd").open("a") as users:
        users.write("postgres-of-image:x:999:999::/var/lib/postgresql:/bin/sh\n")
    (folder / "entrypoint").write_text(_POSTGRES)
    (folder / "entrypoint").chmod(0o755)
    path = f"{programs[-1].parent}:/usr/bin:/bin"
    return Image(folder, {"PATH": path}, ["/entrypoint"], ["postgres"], borrowed=("/usr",))


_POSTGRES = """#!/bin/sh
set -e
if [ ! -s "$PGDATA/PG_VERSION" ]; then
  printf %s "$POSTGRES_PASSWORD" >/tmp/password
  initdb --username="$POSTGRES_USER" --pwfile=/tmp/password \\
    --auth-local=trust --auth-host=scram-sha-256
  rm /tmp/password
  echo "host all all all scram-sha-256" >>"$PGDATA/pg_hba.conf"
  pg_ctl --wait \\
    --options="-c listen_addresses= -c unix_socket_directories=/var/run/postgresql" start
  createdb --host=/var/run/postgresql --username="$POSTGRES_USER" "$POSTGRES_DB"
  pg_ctl --wait stop
fi
exec "$@" -c listen_addresses='*' -c unix_socket_directories=/var/run/postgresql
"""


def _this_system(root: Path) -> None:
    """A root with this machine's /etc, and links to its /usr, which is borrowed."""
    root.mkdir(parents=True)
    for name in ("bin", "sbin", "lib", "lib32", "lib64"):
        if Path("/", name).is_symlink():
            (root / name).symlink_to(Path("/", name).readlink())
    secret = shutil.ignore_patterns("shadow*", "gshadow*", "sudoers*", "ssh", "private")
    shutil.copytree(
        "/etc", root / "etc", symlinks=True, ignore=secret, ignore_dangling_symlinks=True
    )
