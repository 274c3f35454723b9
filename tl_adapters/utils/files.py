"""Atomic writes of files and folders, a lock on a folder, and file names that were read from a file.

A name out of a file of others may lead anywhere, so such names become paths only by `plain_file`.
"""

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

_MAX_NAME_BYTES = 255
_DISK_FULL_CODES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class FolderExistsError(UserError, FileExistsError):
    """The destination exists already; nothing was overwritten."""


class DiskFullError(UserError, OSError):
    """The disk is full; no partly written file is left."""


class FolderBusyError(UserError, RuntimeError):
    """Another process is writing to a folder."""


class UnsafeFileError(UserError, ValueError):
    """A file name, or a link, that leads out of the folder that it belongs to."""


def plain_file(folder: str | Path, *names: str) -> Path:
    """The path of a file in ``folder``, or in folders within it; it need not exist.

    Links within the folder are followed, and links of the Hugging Face cache, whose files are links to its blobs.

    Args:
        folder: may itself be a link.
        names: the name of the file, or first those of the folders that lead to it; each without separators.

    Raises UnsafeFileError for a name such as "../x" or "/etc/x", for a link that leads elsewhere, and for devices and
    pipes.
    """
    for name in names:
        if not _is_plain_name(name):
            raise UnsafeFileError(
                f"{folder} names the file {name!r}. A file of a folder is named without '/', '\\' and '..', so that it "
                "cannot be outside. The folder is damaged, or was made to mislead: get it from a source that you trust."
            )
    path = Path(folder, *names)
    actual = Path(os.path.realpath(path))
    if not actual.is_relative_to(os.path.realpath(folder)) and not _is_hub_blob(actual):
        raise UnsafeFileError(
            f"{path} is a link to {actual}, outside of its folder, and such links are not followed. If you made it "
            "yourself, put a copy of the file there (cp -rL copies a whole folder without links)."
        )
    if actual.exists() and not (actual.is_file() or actual.is_dir()):
        raise UnsafeFileError(f"{path} is neither a file nor a folder, but a device or a pipe. Remove it.")
    return path


def _is_plain_name(name: object) -> bool:
    """Whether a value is the name of a file, and no path."""
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and len(name.encode(errors="replace")) <= _MAX_NAME_BYTES
        and name.isprintable()
        and not any(separator in name for separator in "/\\")
    )


def _is_hub_blob(path: Path) -> bool:
    """Whether a file is a blob of the Hugging Face cache: models--USER--NAME/blobs/HASH."""
    return path.parent.name == "blobs" and path.parents[1].name.startswith(("models--", "datasets--"))


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
