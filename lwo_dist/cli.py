"""The command line: parses, calls, and turns a UserError into one line on stderr and exit code
2.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from .config import Config
from .config.reading import load_config
from .errors import UserError
from .stop import EXIT_CODE, Stopped

if TYPE_CHECKING:
    from .cluster.jobs import Jobs

# Everything below the parser is imported by the command that needs it: `lwo-dist --help` waits for
# no torch.

__all__ = ["main"]

_PATIENCE_S = 30
_DATABASES = ("sqlite:", "postgresql", "mysql", "mssql")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; exceptions other than these pass through.

    Returns:
        The exit code: 0, 2 after bad input, 75 after a stop that the same command goes on from, 130
            after Ctrl-C;
        `submit` ends with that of the job.
    """
    try:
        arguments = _parser().parse_args(argv)
        code: int | None = arguments.command(arguments)
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            # Each rank of a host finds the same fault, and torchrun ends them all when the first
            # one exits: that must be the one that says it. Whoever is still here afterwards has a
            # fault of its own.
            time.sleep(_PATIENCE_S)
        print(f"lwo-dist: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            print(f"lwo-dist: {stopped}; {_go_on(_config(arguments), stopped)}", file=sys.stderr)
        return EXIT_CODE
    except KeyboardInterrupt:
        return 130
    return code or 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="lwo-dist", description="Layer-wise optimisation of code models on clusters."
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="tune a code model on a source tree")
    train.description = (
        "Tune a code model; on Ray (a local one, or RAY_ADDRESS), or as a rank that torchrun has"
        " started."
    )
    _add_config_arguments(train)
    train.set_defaults(command=_train)

    submit = commands.add_parser(
        "submit", help="train on a Ray cluster that is elsewhere, and follow the job"
    )
    submit.description = (
        "Send what git tracks in this folder, but no data and no secrets, and the config to a Ray"
        " cluster; train there."
    )
    _add_config_arguments(submit)
    _add_cluster_arguments(submit)
    submit.add_argument("--detach", action="store_true", help="do not follow the job")
    submit.add_argument(
        "--working-dir", type=Path, default=Path(), metavar="DIR", help="default: this folder"
    )
    submit.set_defaults(command=_submit)

    jobs = commands.add_parser("jobs", help="list, follow or stop the jobs of a Ray cluster")
    actions = jobs.add_subparsers(title="actions", required=True, metavar="ACTION")
    for name, text in (
        ("list", "newest first"),
        ("logs", "what a job writes"),
        ("stop", "save a checkpoint and end"),
    ):
        action = actions.add_parser(name, help=text)
        _add_cluster_arguments(action)
        action.set_defaults(command=_jobs, action=name)
        if name != "list":
            action.add_argument(
                "job", metavar="JOB", help="the job's id, or its run_name: then the newest"
            )
        if name == "logs":
            action.add_argument(
                "-f", "--follow", action="store_true", help="to the job's end, with its exit code"
            )

    replay = commands.add_parser("replay", help="send what a run could not send to MLflow")
    replay.add_argument(
        "spool", type=Path, metavar="SPOOL", help="the spool in the run's folder, or that folder"
    )
    replay.add_argument("--uri", help="MLflow tracking URI; unset: where the run meant to send to")
    replay.set_defaults(command=_replay)

    export = commands.add_parser("export", help="write a checkpoint as a plain Hugging Face folder")
    export.add_argument("run", metavar="RUN", help="the run's folder or URL, <storage>/<run_name>")
    export.add_argument(
        "--to", type=Path, metavar="DIR", help="default: RUN/model; for a URL ./RUN_NAME"
    )
    export.add_argument("--step", type=int, help="which checkpoint; default: the newest")
    export.add_argument(
        "--dtype", choices=("fp32", "bf16"), default="fp32", help="default: %(default)s"
    )
    export.set_defaults(command=_export)

    checkpoints = commands.add_parser(
        "checkpoints", help="list, verify or prune the checkpoints of a run"
    )
    checkpoints.add_argument("action", choices=("list", "verify", "prune"))
    checkpoints.add_argument(
        "run", metavar="RUN", help="the run's folder or URL, <storage>/<run_name>"
    )
    checkpoints.add_argument(
        "--keep", type=int, default=1, metavar="N", help="prune: whole ones that stay, newest first"
    )
    checkpoints.set_defaults(command=_checkpoints)

    ui = commands.add_parser("ui", help="open the runs in MLflow's web pages, on this machine only")
    _add_config_arguments(ui)
    ui.add_argument("--port", type=int, default=5000, help="default: %(default)s")
    ui.set_defaults(command=_ui)
    return parser


def _add_config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-c", "--config", type=Path, metavar="FILE", help="YAML file; unset: the defaults"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings that go before the file's"
    )


def _add_cluster_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--address", required=True, metavar="URL", help="Ray's dashboard, such as http://head:8265"
    )
    parser.add_argument(
        "--insecure-token",
        action="store_true",
        help="send RAY_AUTH_TOKEN over http to another machine all the same",
    )


def _config(arguments: argparse.Namespace) -> Config:
    return load_config(arguments.config, arguments.overrides)


def _train(arguments: argparse.Namespace) -> None:
    config = _config(arguments)
    # A moving bar garbles the log of a job; workers inherit this.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        from .run import prepare_and_run as train
    else:
        from .cluster.ray_train import train
    summary = train(config)
    if summary is None:  # Not rank 0.
        return
    from .training.results import format_summary

    print(format_summary(summary))
    if config.tracking.enabled:
        program = sys.argv[0] if Path(sys.argv[0]).name == "lwo-dist" else "lwo-dist"
        file = ["-c", str(arguments.config)] if arguments.config else []
        store = [
            override
            for override in arguments.overrides
            if override.startswith(("storage=", "tracking."))
        ]
        print(f"MLflow: {shlex.join([program, 'ui', *file, *store])}")


def _go_on(config: Config, stopped: Stopped) -> str:
    if stopped.checkpoint is None:
        return "the same command starts anew"
    name = "" if config.run_name else f" with run_name={stopped.checkpoint.parents[1].name}"
    return f"the same command{name} goes on from there"


def _submit(arguments: argparse.Namespace) -> int:
    from .cluster.jobs import Jobs

    jobs = Jobs(arguments.address, insecure_token=arguments.insecure_token)
    job = jobs.submit(arguments.config, arguments.overrides, arguments.working_dir)
    print(f"job {job}", flush=True)
    if arguments.detach:
        print(_later(arguments, job))
        return 0
    return _follow(arguments, jobs, job)


def _jobs(arguments: argparse.Namespace) -> int:
    from .cluster.jobs import Jobs

    jobs = Jobs(arguments.address, insecure_token=arguments.insecure_token)
    if arguments.action == "list":
        for line in jobs.lines():
            print(line)
    elif arguments.action == "stop":
        print(f"stopping {jobs.stop(arguments.job)}")
    elif arguments.follow:
        return _follow(arguments, jobs, jobs.find(arguments.job))
    else:
        sys.stdout.write(jobs.logs(arguments.job))
    return 0


def _follow(arguments: argparse.Namespace, jobs: Jobs, job: str) -> int:
    """Follow to the end; Ctrl-C asks what is to become of the job, and leaves it alone where there
    is nobody to ask.
    """

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    try:
        return jobs.follow(job, write)
    except KeyboardInterrupt:
        answer = ""
        if sys.stdin.isatty():
            with suppress(EOFError, KeyboardInterrupt):
                answer = input("\nd: detach, the job runs on; s: stop the job [d] ").strip().lower()
        if answer not in ("s", "stop"):
            print(f"\n{_later(arguments, job)}")
            return 130
        jobs.stop(job)
        print(f"stopping {job}", flush=True)
        return jobs.follow(job, lambda text: None)


def _later(arguments: argparse.Namespace, job: str) -> str:
    where = f"--address {shlex.quote(arguments.address)}"
    return (
        f"follow it: lwo-dist jobs logs -f {where} {job}\nstop it: lwo-dist jobs stop {where} {job}"
    )


def _replay(arguments: argparse.Namespace) -> None:
    from .tracking.mlflow import replay

    print(f"sent {replay(arguments.spool, arguments.uri)} metric points")


def _export(arguments: argparse.Namespace) -> None:
    from .checkpoint.manage import export_run
    from .storage import RunFolder

    print(
        "model:"
        f" {export_run(RunFolder.at(arguments.run), arguments.to, arguments.step, arguments.dtype)}"
    )


def _checkpoints(arguments: argparse.Namespace) -> None:
    from .checkpoint import manage
    from .storage import RunFolder

    run = RunFolder.at(arguments.run)
    if arguments.action == "list":
        lines = manage.list_checkpoints(run)
    elif arguments.action == "verify":
        lines = manage.verify_checkpoints(run)
    else:
        lines = manage.prune_checkpoints(run, arguments.keep)
    for line in lines:
        print(line, flush=True)


def _ui(arguments: argparse.Namespace) -> None:
    from .redaction import redact
    from .storage import storage_folder
    from .tracking.mlflow import experiment_page, tracking_uri

    config = _config(arguments)
    uri = tracking_uri(config.tracking, storage_folder(config.storage))
    if uri.startswith(("http://", "https://")):
        print(
            f"{experiment_page(config.tracking, uri)} shows the runs of experiment"
            f" {config.tracking.experiment}"
        )
        return
    if not uri.startswith(_DATABASES):
        raise UserError(
            f"tracking.uri = {redact(uri)} has no pages; give a server (http://HOST:PORT) or a"
            " database (sqlite:////FILE, postgresql://HOST/NAME)"
        )
    database = Path(uri.removeprefix("sqlite:///"))
    if uri.startswith("sqlite:///") and not database.is_file():
        raise UserError(
            f"storage = {config.storage}: no runs there ({database}); give -c FILE or storage=DIR"
            " as in training"
        )
    # Two processes and 0.5 GB instead of MLflow's ten: one person looks at it. The address, which
    # may hold a password, not on the command line, which every user of the machine can read.
    command = ["-m", "mlflow", "server", "--host", "127.0.0.1", "--workers", "1"]
    environment = os.environ | {
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_BACKEND_STORE_URI": uri,
    }
    print(
        f"http://127.0.0.1:{arguments.port} shows the runs in {redact(uri)}; Ctrl-C ends it",
        flush=True,
    )
    os.execve(
        sys.executable, [sys.executable, *command, "--port", str(arguments.port)], environment
    )


if __name__ == "__main__":
    sys.exit(main())
