"""Where runs are stored: a folder visible to all workers, or an object store with a local cache.

A process always reads and writes a local folder, `RunFolder.local`. For `s3://...`, `gs://...` and
`abfs://...`, that folder is scratch space on the node: `push` sends files to the store, `pull`
fetches them. On a plain file system both do nothing, so callers need not distinguish the two.
"""

from __future__ import annotations

import datetime
import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from .access import private_folder, scratch_path
from .config.run import NO_PASSWORD
from .errors import DamagedError, UserError, first_line, printable
from .files import (
    contained,
    create_whole,
    entries_of,
    is_plain,
    is_regular,
    make_folder,
    refresh,
    temporary_beside,
    walk,
    write_whole,
)
from .redaction import refuse_password
from .units import human_bytes

__all__ = ["RunFolder", "is_url", "new_run_name", "storage_folder", "storage_path"]

T = TypeVar("T")

_LARGE_FOLDERS = ("layers", "checkpoints", "model", "adapter")
_MAX_SMALL_BYTES = 2 * 2**30
"""Of each other file; metrics.jsonl of a long run has some hundred MB."""
_CHUNK_BYTES = 16 * 2**20
_LEASE_FOLDER = "lease"  # always read from the store: a local copy would be stale
_WRITTEN_BY_RAY = ("checkpoint_manager_snapshot.json", ".validate_storage_marker")


def is_url(storage: str) -> bool:
    """Whether `storage` names an object store rather than a folder."""
    return "://" in storage and not storage.startswith("file://")


def storage_folder(storage: str) -> Path:
    """The local folder of `storage`: itself, or a scratch directory below LWO_SCRATCH_DIR, which is
    created.

    Raises:
        UserError: the scratch directory belongs to another user, or is open to others.
    """
    path = storage_path(storage)
    if not is_url(storage):
        return path
    if not os.environ.get("LWO_SCRATCH_DIR"):
        private_folder(path.parent)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"LWO_SCRATCH_DIR = {path.parent}: {error.strerror}; give a writable folder"
        ) from None
    return private_folder(path)


def storage_path(storage: str) -> Path:
    """The path of `storage_folder`; nothing is created or checked."""
    if not is_url(storage):
        return Path(storage.removeprefix("file://")).expanduser().absolute()
    scratch = Path(os.environ.get("LWO_SCRATCH_DIR") or scratch_path()).expanduser().absolute()
    return scratch / hashlib.sha256(storage.rstrip("/").encode()).hexdigest()[:12]


def new_run_name(method: str) -> str:
    """A unique run name from the method, the local time and a random number.

    For example `lwo-20261126-101500-9f3a`.
    """
    return f"{method}-{datetime.datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


class RunFolder:
    """One run's folder. File names are relative to it, with `/` between their parts.

    A run may come from anybody, so `path` checks every name before use. A name that is not a plain
    relative path, or passes through a symlink, is refused; listings leave it out with a warning.

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
        self._objects: Any = None  # the same folder, for conditional writes; opened on first use
        self._base = ""
        self._has_warned = False
        if self.url is not None:
            opened = _open(storage, run_name)
            self._fs = opened[0]
            self._base = opened[1]

    @classmethod
    def at(cls, run: str) -> RunFolder:
        """The run at a path or URL, such as `runs/NAME`.

        Raises:
            UserError: a URL with a password in it, or that no file system supports.
        """
        storage, _, name = run.rstrip("/").rpartition("/")
        if is_url(run):
            refuse_password("RUN", run, NO_PASSWORD)
            return cls(storage, name)
        path = Path(run).expanduser().absolute()
        return cls(str(path.parent), path.name)

    def __str__(self) -> str:
        return self.url or str(self.local)

    def path(self, name: str) -> Path:
        """The local path of `name`; it need not exist.

        Raises:
            DamagedError: `name` is not plain, or passes through a symlink.
        """
        return contained(self.local, name)

    def file(self, name: str) -> Path:
        """The local path of a file, which need not exist.

        Raises:
            DamagedError: `name` is not plain, passes through a symlink, or is not a regular file.
        """
        path = self.path(name)
        if path.exists() and not path.is_file():
            raise DamagedError(f"{name} is not a regular file")
        return path

    def refuse_links(self) -> None:
        """Refuse a folder with symlinks: a resumed run would write through them.

        Raises:
            UserError: naming the first symlink.
        """
        for path in walk(self.local):
            if path.is_symlink():
                raise UserError(
                    f"{path} is a symlink, which a run's folder must not contain; replace it with"
                    " its target, or choose another run_name"
                )

    def folders(self, name: str) -> list[str]:
        """Names of the folders in folder `name`, sorted; from the store if there is one."""
        if self._fs is None:
            entries = entries_of(self.path(name))
            found = [entry.name for entry in entries if entry.is_dir() or entry.is_symlink()]
            sound = self._sound(f"{name}/{entry}" for entry in found)
            return sorted(path.removeprefix(f"{name}/") for path in sound)
        # An object store has no folders; they are derived from file names.
        inner = [path.removeprefix(f"{name}/") for path in self.files(name)]
        return sorted({path.partition("/")[0] for path in inner if "/" in path})

    def files(self, name: str) -> list[str]:
        """Names of all files in or below folder `name`, sorted; from the store if there is one."""
        if self._fs is None:
            folder = self.path(name) if name else self.local
            found = (path for path in walk(folder) if path.is_symlink() or path.is_file())
            return sorted(self._sound(path.relative_to(self.local).as_posix() for path in found))
        prefix = f"{self._base}/"
        # A path outside the run is rejected like an invalid name.
        return sorted(
            self._sound(
                path.removeprefix(prefix) if path.startswith(prefix) else f"/{path}"
                for path in self._find(name)
            )
        )

    def push(self, names: Iterable[str]) -> None:
        """Send local files to the store, in this order; do nothing without a store.

        Raises:
            OSError
        """
        if self._fs is None:
            return
        for name in names:
            with self.path(name).open("rb") as source:
                self._reach(lambda n=name, s=source: self._upload(n, s))  # type: ignore[misc]

    def pull(self, name: str, *, limit: int | None = None) -> Path:
        """Fetch a file from the store, replacing any local copy. Returns its local path.

        Args:
            limit: the most bytes that are fetched.

        Raises:
            DamagedError: `name` is not plain, its local path is not a regular file, or the file in
                the store is larger than `limit`.
            FileNotFoundError: the store has no such file.
            OSError: the store cannot be reached.
        """
        path = self.file(name)
        if self._fs is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = temporary_beside(path)
            try:
                self._reach(lambda: self._download(name, temporary, limit))
                temporary.rename(path)
            finally:
                temporary.unlink(missing_ok=True)
        return path

    def create(self, name: str, data: bytes) -> bool:
        """Create a file atomically; it is in the storage when this returns.

        Returns:
            False if the storage already has a file of that name; it is unchanged.

        Raises:
            OSError
        """
        path = self.path(name)
        make_folder(path.parent)
        if self._fs is None:
            return create_whole(path, data)
        if not self._reach(lambda: self._put(name, data, is_new=True)):
            return False
        write_whole(path, data)
        return True

    def read(self, name: str, *, limit: int) -> bytes | None:
        """The first `limit` bytes of `name` in the storage, not of a local copy; None if it is
        missing.

        Raises:
            DamagedError: `name` leads through a symlink, or is not a regular file.
            OSError
        """
        try:
            if self._fs is not None:
                return self._reach(lambda: self._read(name, limit))
            try:
                return self._read_local(name, limit)
            except OSError as error:
                if error.errno != errno.ESTALE:
                    raise
                return self._read_local(name, limit)  # NFS: replaced since it was opened
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes) -> None:
        """Write or replace a small file in the storage.

        Raises:
            OSError
        """
        path = self.file(name)
        if self._fs is not None:
            self._reach(lambda: self._put(name, data))
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_beside(path)
        with temporary.open("xb") as file:
            file.write(data)
        temporary.rename(path)

    def remove(self, names: Iterable[str]) -> None:
        """Remove files locally and in the store, in this order; missing files are skipped.

        Raises:
            OSError
        """
        for name in names:
            contained(self.local, name, may_be_link=True).unlink(missing_ok=True)
            if self._fs is not None:
                with suppress(FileNotFoundError):
                    self._reach(lambda n=name: self._fs.delete_file(f"{self._base}/{n}"))  # type: ignore[misc]

    def remove_folder(self, name: str, *, first: str = "") -> None:
        """Remove a folder with all its files.

        Args:
            first: a file to remove before the others, so that an interrupted removal leaves a
                folder without it.
        """
        folder = contained(self.local, name, may_be_link=True)
        if folder.is_symlink():
            folder.unlink()  # not its target
        self.remove([f"{name}/{first}"] if first else [])
        self.remove(self.files(name))
        shutil.rmtree(folder, ignore_errors=True)

    def push_small(self) -> None:
        """Send all files except layers, checkpoints and model: the record of the run.

        Raises:
            OSError
        """
        if self._fs is not None:
            found = (path for path in walk(self.local) if is_regular(path))
            names = (path.relative_to(self.local).as_posix() for path in found)
            self.push(name for name in self._sound(names) if _is_small(name))

    def fetch_small(self) -> None:
        """Fetch what `push_small` sent; existing local files are kept.

        Raises:
            DamagedError: a file is too large for one of these.
            OSError
        """
        if self._fs is not None:
            for name in self.files(""):
                if not _is_small(name):
                    continue
                try:
                    if not self.path(name).exists():
                        self.pull(name, limit=_MAX_SMALL_BYTES)
                except (FileNotFoundError, FileExistsError, NotADirectoryError):
                    self._warn(name)  # a folder marker, or a key below a name that is also a file

    def check_writable(self) -> None:
        """Write and remove a file, locally and in the store. Raises: UserError on failure."""
        probe = f".probe-{secrets.token_hex(8)}"
        folder = self.local.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / probe).touch()
            (folder / probe).unlink()
        except OSError as error:
            raise UserError(
                f"storage = {folder}: {error.strerror}; give a writable folder"
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
                " (If-None-Match), so two runs of the same name could overwrite each other; give a"
                " store that supports it, or a folder"
            )

    def _sound(self, names: Iterable[str]) -> Iterator[str]:
        """The valid names; warns of the first invalid one."""
        for name in names:
            if is_plain(name) and not (self._fs is None and (self.local / name).is_symlink()):
                yield name
            else:
                self._warn(name)

    def _warn(self, name: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            print(
                f"warning: {self}: ignored {printable(name[:100])!r} (a symlink or an invalid name)"
                " and any others like it",
                flush=True,
            )

    def _find(self, name: str) -> list[str]:
        from pyarrow.fs import FileSelector, FileType

        selector = FileSelector(
            f"{self._base}/{name}".rstrip("/"), allow_not_found=True, recursive=True
        )
        found = self._reach(lambda: self._fs.get_file_info(selector))
        return [info.path for info in found if info.type == FileType.File]

    def _read_local(self, name: str, limit: int) -> bytes:
        refresh(self.path(name).parent)
        with self.file(name).open("rb") as file:
            return file.read(limit)

    def _read(self, name: str, limit: int) -> bytes:
        with self._fs.open_input_stream(f"{self._base}/{name}") as source:
            data: bytes = source.read(limit)
        return data

    def _put(self, name: str, data: bytes, *, is_new: bool = False) -> bool:
        """Write an object in one request, which pyarrow does not offer; False if `is_new` and there
        is another one.
        """
        import obstore

        if self._objects is None:
            self._objects = _open_conditional(str(self.url), getattr(self._fs, "region", None))
        try:
            obstore.put(self._objects, name, data, mode="create" if is_new else "overwrite")
        except obstore.exceptions.AlreadyExistsError:
            return self._read(name, len(data) + 1) == data  # our own request, repeated
        return True

    def _upload(self, name: str, source: Any) -> None:
        with self._fs.open_output_stream(f"{self._base}/{name}") as target:
            shutil.copyfileobj(source, target, _CHUNK_BYTES)

    def _download(self, name: str, target: Path, limit: int | None) -> None:
        with (
            self._fs.open_input_stream(f"{self._base}/{name}") as source,
            target.open("wb") as file,
        ):
            while chunk := source.read(_CHUNK_BYTES):
                file.write(chunk)
                if limit is not None and file.tell() > limit:
                    raise DamagedError(
                        f"{name} is larger than {human_bytes(limit)}, too large for such a file;"
                        f" remove it from {self}"
                    )

    def _reach(self, call: Callable[[], T]) -> T:
        """Call the store; every failure becomes an OSError that names the run's URL."""
        try:
            return call()
        except (FileNotFoundError, DamagedError):
            raise
        except Exception as error:  # pyarrow raises OSError, but ArrowInvalid for a bad request
            raise OSError(f"{self.url}: {first_line(error)}") from error


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
        client_options={"allow_http": True},  # used only if the endpoint is http
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
