"""Atomic writes of files and folders, under a temporary name that is then renamed, and a lock on a folder."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from tl_adapters.errors import UserError

_DISK_FULL_CODES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class FolderExistsError(UserError, FileExistsError):
    """The destination exists already; nothing was overwritten."""


class DiskFullError(UserError, OSError):
    """The disk is full; no partly written file is left."""


class FolderBusyError(UserError, RuntimeError):
    """Another process is writing to a folder."""


def require_absent(path: str | Path) -> None:
    """Raise FolderExistsError where the path exists; to be called before hours of work."""
    if Path(path).exists():
        raise FolderExistsError(f"{path} exists already; choose another name or remove it first.")


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A new folder to fill, which becomes ``path`` when the block succeeds and is removed when it fails.

    Its files are flushed to disk before it is renamed, so a power failure leaves all of it or nothing. Raises
    FolderExistsError where ``path`` exists already, and DiskFullError.
    """
    path = Path(path)
    require_absent(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=_prefix(path), dir=path.parent))
    try:
        with room_for(path):
            yield partial
            for file in partial.rglob("*"):
                if file.is_file():
                    _sync(file)
            partial.chmod(0o755)  # mkdtemp creates folders that only the owner can read
            os.replace(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold a lock on a folder. Raises FolderBusyError where another process holds it."""
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise FolderBusyError(f"Another process is writing to {folder}. Wait for it or stop it.") from None
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically: a reader of ``path`` sees the old text or the new one, never a part.

    Raises DiskFullError.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{_prefix(path)}partial")
    try:
        with room_for(path):
            partial.write_text(text, encoding="utf-8")
            _sync(partial)
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def remove_partials(path: Path) -> None:
    """Remove the temporary files and folders of ``path`` that a killed process has left."""
    for partial in path.parent.glob(f"{_prefix(path)}*"):
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


@contextmanager
def room_for(path: Path) -> Iterator[None]:
    """Turn the errors of a full disk, of whichever library, into a DiskFullError with one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        code = getattr(error, "errno", None)
        full = code in _DISK_FULL_CODES or any(f"os error {c}" in str(error) for c in _DISK_FULL_CODES)
        if isinstance(error, DiskFullError) or not full:
            raise
        raise DiskFullError(
            f"The disk is too full to write {path} ({error}). No partly written file is left; free some space first."
        ) from error


def _prefix(path: Path) -> str:
    return f".{path.name}."


def _sync(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
