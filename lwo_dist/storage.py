"""Where runs live: a folder that all workers see, or an object store with a local copy of what is
needed.

A process always reads and writes a local folder, `RunFolder.local`. For `s3://...`, `gs://...` and
whatever else `pyarrow.fs` opens, that folder is scratch space of the node: `push` sends files to
the store, `pull` fetches them. On a plain file system both do nothing, so that nobody above asks
which of the two it is.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from .errors import UserError

__all__ = ["RunFolder", "is_url", "storage_folder", "write_whole"]

T = TypeVar("T")


def is_url(storage: str) -> bool:
    """Whether `storage` names an object store, and not a folder."""
    return "://" in storage and not storage.startswith("file://")


def storage_folder(storage: str) -> Path:
    """The local folder of `storage`: itself, or this node's scratch space for it (below
    LWO_SCRATCH_DIR).
    """
    if not is_url(storage):
        return Path(storage.removeprefix("file://")).expanduser().absolute()
    scratch = os.environ.get("LWO_SCRATCH_DIR")
    base = Path(scratch) if scratch else Path(tempfile.gettempdir()) / f"lwo_dist-{os.getuid()}"
    return base / hashlib.sha256(storage.rstrip("/").encode()).hexdigest()[:12]


class RunFolder:
    """One run's folder. Names are paths relative to it, with `/` between their parts."""

    def __init__(self, storage: str, run_name: str):
        """Raises: UserError where no file system fits the URL."""
        self.local = storage_folder(storage) / run_name
        self.url = f"{storage.rstrip('/')}/{run_name}" if is_url(storage) else None
        self._fs: Any = None
        self._base = ""
        if self.url is not None:
            self._fs, self._base = _open(storage, run_name)

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
        """Names of the folders in folder `name`, sorted; where it lives for good."""
        if self._fs is None:
            return sorted(path.name for path in (self.local / name).glob("*") if path.is_dir())
        # An object store has no folders: they are where their files' names say.
        prefix = f"{self._base}/{name}/"
        return sorted(
            {
                path.removeprefix(prefix).partition("/")[0]
                for path in self._find(name)
                if prefix in path
            }
        )

    def files(self, name: str) -> list[str]:
        """Names of all files in or below folder `name`, relative to the run's folder, sorted."""
        if self._fs is None:
            found = [path for path in (self.local / name).rglob("*") if path.is_file()]
            return sorted(path.relative_to(self.local).as_posix() for path in found)
        return sorted(path.removeprefix(f"{self._base}/") for path in self._find(name))

    def push(self, names: Iterable[str]) -> None:
        """Send local files to the store, in this order. Raises: OSError."""
        if self._fs is None:
            return
        for name in names:
            with (self.local / name).open("rb") as source:
                self._reach(lambda n=name, s=source: self._upload(n, s))  # type: ignore[misc]

    def pull(self, name: str) -> Path:
        """A file of the store as a local file, fetched anew. Raises: OSError, FileNotFoundError
        too.
        """
        path = self.local / name
        if self._fs is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            self._reach(lambda: self._download(name, temporary))
            temporary.rename(path)
        return path

    def remove(self, names: Iterable[str]) -> None:
        """Remove files, here and in the store, in this order; one that is gone already is fine."""
        for name in names:
            (self.local / name).unlink(missing_ok=True)
            if self._fs is not None:
                with suppress(FileNotFoundError):
                    self._reach(lambda n=name: self._fs.delete_file(f"{self._base}/{n}"))  # type: ignore[misc]

    def remove_folder(self, name: str, *, first: str = "") -> None:
        """Remove a folder with all its files, `first` before the others."""
        self.remove([f"{name}/{first}"] if first else [])
        self.remove(self.files(name))
        shutil.rmtree(self.local / name, ignore_errors=True)

    def push_small(self) -> None:
        """Send all but the layer store: what the run says of itself. Raises: OSError."""
        if self._fs is not None:
            found = [path for path in self.local.rglob("*") if path.is_file()]
            self.push(
                name for path in found if _is_small(name := path.relative_to(self.local).as_posix())
            )

    def fetch_small(self) -> None:
        """Fetch what `push_small` sent, as far as it is not here. Raises: OSError."""
        if self._fs is not None:
            for name in self.files(""):
                if _is_small(name) and not (self.local / name).exists():
                    self.pull(name)

    def check_writable(self) -> None:
        """Raises: UserError where nothing can be written."""
        place, probe = self.local.parent, f".probe-{os.getpid()}"
        try:
            place.mkdir(parents=True, exist_ok=True)
            (place / probe).touch()
            (place / probe).unlink()
        except OSError as error:
            raise UserError(
                f"storage = {place}: {error.strerror}; give a folder that can be written"
            ) from None
        if self._fs is None:
            return
        try:
            self.local.mkdir(exist_ok=True)
            (self.local / probe).touch()
            self.push([probe])
            self.remove([probe])
        except OSError as error:
            raise UserError(
                f"storage = {self.url}: {_first_line(error)}; give a bucket that exists and"
                " credentials that may write there (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY,"
                " AWS_ENDPOINT_URL, ...)"
            ) from None
        finally:
            (self.local / probe).unlink(missing_ok=True)

    def _find(self, name: str) -> list[str]:
        from pyarrow.fs import FileSelector, FileType

        selector = FileSelector(
            f"{self._base}/{name}".rstrip("/"), allow_not_found=True, recursive=True
        )
        found = self._reach(lambda: self._fs.get_file_info(selector))
        return [info.path for info in found if info.type == FileType.File]

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
        """Call the store; what it raises is an OSError that says so."""
        try:
            return call()
        except FileNotFoundError:
            raise
        except (
            Exception
        ) as error:  # pyarrow raises OSError, and ArrowInvalid for what it refuses itself
            raise OSError(f"{self.url}: {_first_line(error)}") from error


def write_whole(path: Path, data: bytes) -> None:
    """Write a local file whole or not at all, on the disk itself when it returns. Raises:
    OSError.
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
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems refuse it, and keep order by themselves
            os.fsync(folder)
    finally:
        os.close(folder)


def _is_small(name: str) -> bool:
    top = name.partition("/")[0]
    rays = (
        "checkpoint_manager_snapshot.json",
        ".validate_storage_marker",
    )  # which Ray writes into the store itself
    return top not in ("layers", "checkpoints", "model", *rays) and not name.endswith(".tmp")


def _open(storage: str, run_name: str) -> tuple[Any, str]:
    from pyarrow.fs import FileSystem

    try:
        fs, path = FileSystem.from_uri(storage)
    except Exception as error:
        raise UserError(
            f"storage = {storage}: {_first_line(error)}; give a folder, or a URL such as"
            " s3://bucket/folder"
        ) from None
    return fs, f"{path.rstrip('/')}/{run_name}"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
