"""Where runs are stored: a folder visible to all workers, or an object store with a local cache.

A process always reads and writes a local folder, `RunFolder.local`. For `s3://...`, `gs://...` and
anything else that `pyarrow.fs` opens, that folder is scratch space on the node: `push` sends files
to the store, `pull` fetches them. On a plain file system both do nothing, so callers need not
distinguish the two.
"""

from __future__ import annotations

import datetime
import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from .access import private_folder, scratch_folder
from .errors import UserError, first_line

__all__ = ["RunFolder", "is_url", "new_run_name", "storage_folder", "write_whole"]

T = TypeVar("T")

_LARGE_FOLDERS = ("layers", "checkpoints", "model")
_LEASE_FOLDER = "lease"  # each file is written on its own, and a copy would be out of date
_NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK)
_WRITTEN_BY_RAY = ("checkpoint_manager_snapshot.json", ".validate_storage_marker")


def is_url(storage: str) -> bool:
    """Whether `storage` names an object store rather than a folder."""
    return "://" in storage and not storage.startswith("file://")


def storage_folder(storage: str) -> Path:
    """The local folder of `storage`: itself, or scratch space below LWO_SCRATCH_DIR, made here.

    Raises:
        UserError: the scratch space is somebody else's, or others may use it.
    """
    if not is_url(storage):
        return Path(storage.removeprefix("file://")).expanduser().absolute()
    name = hashlib.sha256(storage.rstrip("/").encode()).hexdigest()[:12]
    return private_folder(_scratch() / name)


def _scratch() -> Path:
    chosen = os.environ.get("LWO_SCRATCH_DIR")
    if not chosen:
        return scratch_folder()
    folder = Path(chosen).expanduser().absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"LWO_SCRATCH_DIR = {chosen}: {error.strerror}; give a folder that can be written"
        ) from None
    return folder


def new_run_name(method: str) -> str:
    """A unique run name from the method, the local time and a random number.

    For example `lwo-20261126-101500-9f3a`.
    """
    return f"{method}-{datetime.datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


class RunFolder:
    """One run's folder. File names are relative to it, with `/` between their parts.

    Args:
        storage: a folder, `file://` folder or URL of an object store.
        run_name: the name of the run's folder.

    Raises:
        UserError: no pyarrow file system supports the URL.

    Attributes:
        local: the folder on this machine.
        url: the folder in the object store; None on a plain file system.
    """

    def __init__(self, storage: str, run_name: str):
        self.local = storage_folder(storage) / run_name
        self.url = f"{storage.rstrip('/')}/{run_name}" if is_url(storage) else None
        self._fs: Any = None
        self._objects: Any = None  # the same folder, for conditional writes; opened when needed
        self._base = ""
        if self.url is not None:
            opened = _open(storage, run_name)
            self._fs = opened[0]
            self._base = opened[1]

    @classmethod
    def at(cls, run: str) -> RunFolder:
        """The run at a path or URL, such as `runs/NAME`."""
        storage, _, name = run.rstrip("/").rpartition("/")
        if is_url(run):
            return cls(storage, name)
        path = Path(run).expanduser().absolute()
        return cls(str(path.parent), path.name)

    def __str__(self) -> str:
        return self.url or str(self.local)

    def folders(self, name: str) -> list[str]:
        """Names of the folders in folder `name`, sorted; from the store if there is one."""
        if self._fs is None:
            return sorted(path.name for path in (self.local / name).glob("*") if path.is_dir())
        # An object store has no folders; they are derived from file names.
        prefix = f"{self._base}/{name}/"
        return sorted(
            {
                path.removeprefix(prefix).partition("/")[0]
                for path in self._find(name)
                if prefix in path
            }
        )

    def files(self, name: str) -> list[str]:
        """Names of all files in or below folder `name`, sorted; from the store if there is one."""
        if self._fs is None:
            found = [path for path in (self.local / name).rglob("*") if path.is_file()]
            return sorted(path.relative_to(self.local).as_posix() for path in found)
        return sorted(path.removeprefix(f"{self._base}/") for path in self._find(name))

    def push(self, names: Iterable[str]) -> None:
        """Send local files to the store, in this order; do nothing without a store.

        Raises:
            OSError
        """
        if self._fs is None:
            return
        for name in names:
            with (self.local / name).open("rb") as source:
                self._reach(lambda n=name, s=source: self._upload(n, s))  # type: ignore[misc]

    def pull(self, name: str) -> Path:
        """Fetch a file from the store, replacing any local copy. Returns its local path.

        Raises:
            FileNotFoundError: the store has no such file.
            OSError: the store cannot be reached.
        """
        path = self.local / name
        if self._fs is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            try:
                self._reach(lambda: self._download(name, temporary))
                temporary.rename(path)
            finally:
                temporary.unlink(missing_ok=True)
        return path

    def create(self, name: str, data: bytes) -> bool:
        """Write a file that does not exist yet, whole; it is in the storage when this returns.

        Returns:
            False if the storage has a file of that name; it is unchanged.

        Raises:
            OSError
        """
        path = self.local / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if self._fs is None:
            return _create_whole(path, data)
        if not self._reach(lambda: self._put_new(name, data)):
            return False
        write_whole(path, data)
        return True

    def read(self, name: str) -> bytes | None:
        """What the storage has under `name` now, not a copy of it; None if there is no such file.

        Raises:
            OSError
        """
        try:
            if self._fs is None:
                return (self.local / name).read_bytes()
            return self._reach(lambda: self._read(name))
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes) -> None:
        """Write or replace a small file in the storage.

        Raises:
            OSError
        """
        path = self.local / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_bytes(data)
        temporary.rename(path)
        self.push([name])

    def remove(self, names: Iterable[str]) -> None:
        """Remove files locally and in the store, in this order; missing files are skipped.

        Raises:
            OSError
        """
        for name in names:
            (self.local / name).unlink(missing_ok=True)
            if self._fs is not None:
                with suppress(FileNotFoundError):
                    self._reach(lambda n=name: self._fs.delete_file(f"{self._base}/{n}"))  # type: ignore[misc]

    def remove_folder(self, name: str, *, first: str = "") -> None:
        """Remove a folder with all its files.

        Args:
            first: a file to remove before the others, so that an interrupted removal leaves a
                folder without it.
        """
        self.remove([f"{name}/{first}"] if first else [])
        self.remove(self.files(name))
        shutil.rmtree(self.local / name, ignore_errors=True)

    def push_small(self) -> None:
        """Send all files except layers, checkpoints and model: the record of the run.

        Raises:
            OSError
        """
        if self._fs is not None:
            found = [path for path in self.local.rglob("*") if path.is_file()]
            self.push(
                name for path in found if _is_small(name := path.relative_to(self.local).as_posix())
            )

    def fetch_small(self) -> None:
        """Fetch what `push_small` sent; existing local files are kept.

        Raises:
            OSError
        """
        if self._fs is not None:
            for name in self.files(""):
                if _is_small(name) and not (self.local / name).exists():
                    self.pull(name)

    def check_writable(self) -> None:
        """Write and remove a file, locally and in the store. Raises: UserError on failure."""
        probe = f".probe-{os.getpid()}"
        folder = self.local.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / probe).touch()
            (folder / probe).unlink()
        except OSError as error:
            raise UserError(
                f"storage = {folder}: {error.strerror}; give a folder that can be written"
            ) from None
        if self._fs is None:
            return
        try:
            self.local.mkdir(exist_ok=True)
            (self.local / probe).touch()
            self.push([probe])
            overwrites = self.create(probe, b"not empty")
            self.remove([probe])
        except OSError as error:
            raise UserError(
                f"storage = {self.url}: {first_line(error)}; give a bucket that exists and"
                " credentials that may write there (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY,"
                " AWS_ENDPOINT_URL, ...)"
            ) from None
        finally:
            (self.local / probe).unlink(missing_ok=True)
        if overwrites:
            raise UserError(
                f"storage = {self.url}: this store ignores the condition of a write"
                " (If-None-Match), so two runs of one name could overwrite each other; give a"
                " store that knows it, or a folder"
            )

    def _find(self, name: str) -> list[str]:
        from pyarrow.fs import FileSelector, FileType

        selector = FileSelector(
            f"{self._base}/{name}".rstrip("/"), allow_not_found=True, recursive=True
        )
        found = self._reach(lambda: self._fs.get_file_info(selector))
        return [info.path for info in found if info.type == FileType.File]

    def _read(self, name: str) -> bytes:
        with self._fs.open_input_stream(f"{self._base}/{name}") as source:
            data: bytes = source.read()
        return data

    def _put_new(self, name: str, data: bytes) -> bool:
        """A conditional write, which pyarrow does not have."""
        import obstore

        if self._objects is None:
            self._objects = _open_conditional(str(self.url), getattr(self._fs, "region", None))
        try:
            obstore.put(self._objects, name, data, mode="create")
        except obstore.exceptions.AlreadyExistsError:
            return self._read(name) == data  # a request that was sent twice is ours
        return True

    def _upload(self, name: str, source: Any) -> None:
        with self._fs.open_output_stream(f"{self._base}/{name}") as target:
            shutil.copyfileobj(source, target, 16 * 2**20)

    def _download(self, name: str, target: Path) -> None:
        with (
            self._fs.open_input_stream(f"{self._base}/{name}") as source,
            target.open("wb") as file,
        ):
            shutil.copyfileobj(source, file, 16 * 2**20)

    def _reach(self, call: Callable[[], T]) -> T:
        """Call the store; every failure becomes an OSError that names the run's URL."""
        try:
            return call()
        except FileNotFoundError:
            raise
        except Exception as error:  # pyarrow raises OSError, but ArrowInvalid for a bad request
            raise OSError(f"{self.url}: {first_line(error)}") from error


def write_whole(path: Path, data: bytes) -> None:
    """Write a local file completely or not at all; it is on disk when this returns.

    Raises:
        OSError: nothing was written; an older file of that name is unchanged.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems refuse it but keep the order
            os.fsync(folder)
    finally:
        os.close(folder)


def _create_whole(path: Path, data: bytes) -> bool:
    """`write_whole` for a file that must not exist; False if it does."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write_whole(temporary, data)
        try:
            os.link(temporary, path)
        except FileExistsError:
            # NFS may send a request twice: then the link is ours.
            return temporary.stat().st_nlink > 1
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            with suppress(FileExistsError), path.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                return True
            return False
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)
    return True


def _is_small(name: str) -> bool:
    if name.endswith(".tmp"):
        return False
    return name.partition("/")[0] not in (*_LARGE_FOLDERS, _LEASE_FOLDER, *_WRITTEN_BY_RAY)


def _open_conditional(url: str, region: str | None) -> Any:
    from obstore.store import from_url

    scheme, _, rest = url.partition("://")
    region_of: dict[str, Any] = {"region": region} if scheme == "s3" and region else {}
    return from_url(
        f"{'gs' if scheme == 'gcs' else scheme}://{rest}",
        client_options={"allow_http": True},  # only for an endpoint that says so
        **region_of,
    )


def _open(storage: str, run_name: str) -> tuple[Any, str]:
    from pyarrow.fs import FileSystem

    try:
        fs, path = FileSystem.from_uri(storage)
    except Exception as error:
        raise UserError(
            f"storage = {storage}: {first_line(error)}; give a folder, or a URL such as"
            " s3://bucket/folder"
        ) from None
    return fs, f"{path.rstrip('/')}/{run_name}"
