"""Runs as jobs of a remote Ray cluster: submit, follow, list, stop."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ipaddress
import logging
import os
import secrets
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lwo_dist.config import Config
from lwo_dist.config.batch import check_world_sizes
from lwo_dist.config.reading import load_config
from lwo_dist.errors import UserError, first_line, printable
from lwo_dist.files import absolute_uri
from lwo_dist.git import is_repository_url
from lwo_dist.redaction import refuse_password
from lwo_dist.run_info import job_metadata
from lwo_dist.storage import new_run_name
from lwo_dist.strategies.checks import check_config

from .packing import CONFIG_NAME, pack, refuse_credentials

__all__ = ["Jobs"]

_LOST_SECONDS = 60
"""How long `follow` tries to reach a cluster again."""
_PAUSE_SECONDS = 1
_STOPPED = 143  # as a shell says it of a process that SIGTERM ended


class Jobs:
    """The jobs of the cluster at `address`, such as http://head:8265.

    Args:
        setting: the argument or variable that gave the address, for messages.
        insecure_token: send the token over plain http, even to another machine.

    Raises:
        UserError: from here and every method: a password in the address, no cluster there, a
            missing or wrong token, or a token that would cross the network in the clear.
    """

    def __init__(self, address: str, *, setting: str = "--address", insecure_token: bool = False):
        self._setting = setting
        refuse_password(
            setting,
            address,
            "set the cluster's token in RAY_AUTH_TOKEN, and open a tunnel"
            " (ssh -L, kubectl port-forward) where a proxy asks for a password",
        )
        self._address = address.rstrip("/")
        url = urlsplit(self._address)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise UserError(
                f"{self._setting} = {address}: not a URL; give the URL of Ray's dashboard, such as"
                " http://head:8265, in --address"
            )
        token = _token()
        self._has_token = token is not None
        if token and url.scheme == "http" and not _is_loopback(url.hostname) and not insecure_token:
            raise UserError(
                f"{self._setting} = {address}: Ray's token would cross the network in the clear;"
                " use https, forward the port to this machine (ssh -L, kubectl port-forward), or"
                " pass --insecure-token"
            )
        if _is_loopback(url.hostname):  # a proxy would see the token
            os.environ["NO_PROXY"] = os.environ["no_proxy"] = (
                f"{os.environ.get('NO_PROXY', '')},{url.hostname}"
            )
        # Ray prefers these variables to the address that it is given.
        for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
            os.environ.pop(name, None)
        os.environ.setdefault("RAY_AUTH_MODE", "token" if token else "disabled")
        os.environ["RAY_RUNTIME_ENV_IGNORE_GITIGNORE"] = "1"  # `pack` has asked git already
        from ray.job_submission import JobSubmissionClient

        # These loggers set their own levels.
        for module in (
            "dashboard.modules.job.sdk",
            "dashboard.modules.dashboard_sdk",
            "_private.runtime_env.packaging",
        ):
            logging.getLogger(f"ray.{module}").setLevel(logging.WARNING)
        headers = {"Authorization": f"Bearer {token}"} if token else None
        with self._asking():
            self._client = JobSubmissionClient(self._address, headers=headers)

    def submit(self, config: Path | None, overrides: Sequence[str], folder: Path) -> str:
        """Send the code in `folder` and the config, and start `lwo-dist train` with them.

        Returns:
            The job's id.

        Raises:
            UserError: a setting that cannot hold on another machine, a run of this name that is
                already running, a credential in what would be sent.
        """
        settings, run_name = _checked(config, overrides)
        arguments = [*overrides, *([] if settings.run_name else [f"run_name={run_name}"])]
        refuse_credentials({f"the override of {o.partition('=')[0]}": o for o in arguments})
        running = [
            job
            for job in self._all()
            if not job.status.is_terminal() and _run_name(job) == run_name
        ]
        if running:
            raise UserError(
                f"run_name = {run_name}: job {running[0].submission_id} is already running; stop it"
                " first, or choose another run_name"
            )
        command = ["python", "-m", "lwo_dist.cli", "train", "-c", CONFIG_NAME, *arguments]
        with tempfile.TemporaryDirectory(prefix="lwo-dist-job-") as name:
            left_out = pack(folder, config.read_text() if config else "{}\n", Path(name))
            if left_out:
                print(f"left out: {', '.join(map(printable, left_out))}", file=sys.stderr)
            with self._asking():
                job: str = self._client.submit_job(
                    entrypoint=shlex.join(command),
                    submission_id=f"{run_name}-{secrets.token_hex(4)}",
                    runtime_env={"working_dir": name},
                    metadata=job_metadata(settings, run_name, folder),
                )
        return job

    def follow(self, job: str, write: Callable[[str], Any]) -> int:
        """Write the job's log from its start to its end.

        A lost connection is opened again, and nothing is written twice.

        Returns:
            The exit code of the job's command, 143 if it was stopped.

        Raises:
            UserError: the cluster could not be reached for a minute.
        """
        written = 0
        lost_since = None

        async def tail() -> None:
            nonlocal written
            seen = 0
            async for text in self._client.tail_job_logs(job):  # from the log's start, each time
                new = text[max(0, written - seen) :]
                seen += len(text)
                if new:
                    write(new)
                    written = seen

        while True:
            try:
                asyncio.run(tail())
                info = self._client.get_job_info(job)
                lost_since = None
                if info.status.is_terminal():
                    return _exit_code(info)
            except (
                OSError,
                RuntimeError,
            ) as error:  # aiohttp's and requests' errors of connections among them
                now = time.monotonic()
                lost_since = lost_since or now
                if now - lost_since > _LOST_SECONDS:
                    raise UserError(
                        f"{self._address} cannot be reached ({first_line(error)}); job {job} may"
                        " still be running"
                    ) from None
            time.sleep(_PAUSE_SECONDS)

    def logs(self, job: str) -> str:
        """What the job has written so far."""
        job = self.find(job)
        with self._asking():
            text: str = self._client.get_job_logs(job)
        return text

    def stop(self, job: str) -> str:
        """Ask a job to stop; it saves a checkpoint first if the cluster leaves it the time.

        Returns:
            The job's id.
        """
        job = self.find(job)
        with self._asking():
            self._client.stop_job(job)
        return job

    def lines(self) -> Iterator[str]:
        """A table of the jobs that were submitted, newest first."""
        rows = [("JOB", "STATUS", "SUBMITTED", "RUN")]
        for job in sorted(self._all(), key=lambda job: job.start_time or 0, reverse=True):
            start = datetime.datetime.fromtimestamp((job.start_time or 0) / 1000)
            rows.append(
                (
                    job.submission_id,
                    str(job.status.value),
                    f"{start:%Y-%m-%d %H:%M:%S}",
                    _run_name(job) or "-",
                )
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            yield "  ".join(
                cell.ljust(width) for cell, width in zip(row, widths, strict=True)
            ).rstrip()

    def find(self, name: str) -> str:
        """The id of a job, given that or its run_name (then the newest)."""
        jobs = self._all()
        if any(job.submission_id == name for job in jobs):
            return name
        of_run = [job for job in jobs if _run_name(job) == name]
        if not of_run:
            raise UserError(
                f"job {name}: {self._address} has no job with this id or run_name; see lwo-dist"
                " jobs list"
            )
        return str(max(of_run, key=lambda job: job.start_time or 0).submission_id)

    def _all(self) -> list[Any]:
        with self._asking():
            return [job for job in self._client.list_jobs() if job.submission_id]

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        import requests
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError:
            problem = "does not match" if self._has_token else "is not set"
            raise UserError(
                f"{self._setting} = {self._address}: Ray requires the cluster's token, and"
                f" RAY_AUTH_TOKEN {problem}; set RAY_AUTH_TOKEN to that token"
            ) from None
        except (ConnectionError, requests.RequestException) as error:
            raise UserError(
                f"{self._setting} = {self._address}: {first_line(error)}; give the URL of Ray's"
                " dashboard, such as http://head:8265"
            ) from None
        except RuntimeError as error:  # what the server answers to a request that it refuses
            raise UserError(f"{self._setting} = {self._address}: {first_line(error)}") from None


def _checked(file: Path | None, overrides: Sequence[str]) -> tuple[Config, str]:
    """The config and the run's name. Raises: UserError for a setting that cannot hold on another
    machine.
    """
    config = load_config(file, tuple(overrides))
    check_config(config, elsewhere=True)
    check_world_sizes(config)
    source = config.data.source
    if source is None:
        raise UserError(
            "data.source is not set; give a git URL, or an absolute path on the cluster"
        )
    for name in ("source", "held_out_source", "validation_source"):
        path = getattr(config.data, name)
        if path is not None and not is_repository_url(path) and not path.startswith("/"):
            raise UserError(
                f"data.{name} = {path}: a path on this machine; give a git URL, or an absolute path"
                " on the cluster"
            )
    model = config.model.name
    if not model.startswith("/") and (model.startswith((".", "~")) or Path(model).exists()):
        raise UserError(
            f"model.name = {model}: a path on this machine; give a Hugging Face id, or an absolute"
            " path on the cluster"
        )
    for name, path in (("data.cache", config.data.cache), ("tracking.uri", config.tracking.uri)):
        if path is not None and absolute_uri(path) != path:
            raise UserError(
                f"{name} = {path}: would be deleted with the job's folder; give an absolute path"
                " that all nodes of the cluster share"
            )
    if "://" not in config.storage and not config.storage.startswith("/"):
        raise UserError(
            f"storage = {config.storage}: would be deleted with the job's folder; give an"
            " absolute path that all nodes of the cluster share, or a URL such as"
            " s3://bucket/folder"
        )
    return config, config.run_name or new_run_name(config.method)


def _run_name(job: Any) -> str | None:
    name = (job.metadata or {}).get("run_name")
    return None if name is None else str(name)


def _exit_code(info: Any) -> int:
    if info.status.value == "SUCCEEDED":
        return 0
    if info.driver_exit_code:
        # A process that a signal ended has a negative code; shells say 128 + signal.
        return (
            int(info.driver_exit_code)
            if info.driver_exit_code > 0
            else 128 - int(info.driver_exit_code)
        )
    if info.status.value == "STOPPED":
        return _STOPPED
    failure = RuntimeError(info.message or "the job failed")
    print(f"lwo-dist: {first_line(failure)}", file=sys.stderr)
    return 1


def _token() -> str | None:
    """The token, looked for where Ray does and in the same order."""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    with contextlib.suppress(OSError):
        return path.read_text().strip() or None
    return None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
