"""Write all of it or nothing: to a temporary name beside the goal, then rename; and one process in a folder."""

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

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class FolderExistsError(UserError, FileExistsError):
    """A folder that would have to be overwritten; nothing is."""


class DiskFullError(UserError, OSError):
    """There is no room for a file; nothing half-written is left."""


class FolderBusyError(UserError, RuntimeError):
    """Another process is at work in a folder."""


def require_absent(path: str | Path) -> None:
    """Raises FolderExistsError where there is something already; to be asked before hours of work."""
    if Path(path).exists():
        raise FolderExistsError(f"{path} exists already; choose another name or remove it first.")


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A fresh folder to fill; it becomes ``path`` when the block ends well and vanishes when it does not.

    Its files are on the disk, not in a cache, before it gets its name: a power cut leaves all of it or nothing.
    Raises FolderExistsError where ``path`` exists already, and DiskFullError.
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
            partial.chmod(0o755)  # mkdtemp makes folders for the owner alone
            os.replace(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """No other process enters the folder meanwhile. Raises FolderBusyError where one is in it already."""
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise FolderBusyError(f"Another process is at work in {folder}. Wait for it or stop it.") from None
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def write_text(path: str | Path, text: str) -> None:
    """Write a text file; whoever reads ``path`` sees the old text or the new one, never a part.

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
    """Remove what a killed process left under the temporary names of ``path``."""
    for partial in path.parent.glob(f"{_prefix(path)}*"):
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


@contextmanager
def room_for(path: Path) -> Iterator[None]:
    """Say in one line that the disk is full, whichever library finds out. Raises DiskFullError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        code = getattr(error, "errno", None)
        full = code in _NO_ROOM or any(f"os error {c}" in str(error) for c in _NO_ROOM)
        if isinstance(error, DiskFullError) or not full:
            raise
        raise DiskFullError(
            f"There is no room to write {path} ({error}). Nothing half-written is left there; free some space first."
        ) from error


def _prefix(path: Path) -> str:
    return f".{path.name}."


def _sync(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
