"""The one place where files are written, renamed and removed; tests/test_structure.py holds that no other module does.

* **Whole or not at all.** A file or folder is written under a temporary name, flushed to the disk and renamed, so a
  reader, a kill or a power failure sees the old content or the new one. Inside a folder that `new_folder` is still
  filling, files are written directly, because the folder's own rename makes them appear.
* **No shared names.** A temporary name contains host, process and a random part. What a process that no longer exists
  has left is cleaned by the next writer in the same folder.
* **No lost changes.** Whoever changes a file by what it holds does so under `locked`; whoever works in a folder for
  long holds `alone_in`.
* **No way out.** A name out of a file of others may lead anywhere, so such names become paths only by `plain_file`.
* **One error.** What the system refuses is a `WriteError` that names the path and what to do.
"""

from __future__ import annotations

import errno
import hashlib
import os
import platform
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from fnmatch import fnmatch
from itertools import chain, count
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from tl_adapters.errors import UserError

LOCK_SECONDS = 60.0
"""Longest time that `locked` waits for another process, which holds such a lock for milliseconds."""
ABANDONED_SECONDS = 7 * 86_400.0
"""Age from which leftovers of another host, whose processes cannot be seen from here, are removed."""

_MAX_NAME_BYTES = 255
_DISK_FULL_CODES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_ADVICE = {
    errno.EACCES: "you may not write there; choose another place, or change its permissions",
    errno.EPERM: "you may not write there; choose another place, or change its permissions",
    errno.EROFS: "it is on a read-only file system; choose another place",
    errno.ENOTDIR: "a file is where a folder is needed; choose another place",
    errno.EEXIST: "a file is where a folder is needed; choose another place",
    errno.EISDIR: "a folder is where a file is needed; choose another name, or move the folder away",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
}
_HOST = re.sub(r"\W", "", platform.node())[:24] or "host"
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<host>\w+)-(?P<pid>\d+)-[0-9a-f]{8}\.(?P<state>partial|replaced|removed)")
_LONGEST_NAME = 120  # of the name within a temporary name, so that the whole stays below the system's 255 bytes


class FolderExistsError(UserError, FileExistsError):
    """The destination exists already; nothing was overwritten."""


class WriteError(UserError, OSError):
    """The system refuses to write, rename or remove; no partly written file is left."""


class DiskFullError(WriteError):
    """The disk is full; no partly written file is left."""


class FolderBusyError(UserError, RuntimeError):
    """Another process is writing to a file or folder."""


class UnsafeFileError(UserError, ValueError):
    """A file name, or a link, that leads out of the folder that it belongs to."""


# -- what is asked before the work ------------------------------------------------------------------------------------


def require_absent(path: str | Path) -> None:
    """Raise FolderExistsError where the path exists; to be called before hours of work."""
    if os.path.lexists(path):
        raise FolderExistsError(f"{path} exists already; choose another name or remove it first.")


def require_writable(folder: str | Path) -> None:
    """Raise WriteError where nothing can be written into ``folder``, or where it cannot be made; nothing is left."""
    existing = Path(folder)
    with writing(existing):
        with suppress(FileNotFoundError):
            existing.lstat()  # refuses a name that is too long, and a file on the way
        while not os.path.lexists(existing):
            existing = existing.parent
        probe = _temporary(existing / "probe", "partial")
        probe.touch(exist_ok=False)
        probe.unlink()


def next_free_name(path: str | Path, suffix: str = "") -> Path:
    """Return ``path``, or the first of name-2, name-3, ... beside it that does not exist.

    Args:
        path: a file or folder.
        suffix: the end of the name that stays at the end, such as ".html".
    """
    path = Path(path)
    stem = path.name.removesuffix(suffix)
    later = (path.with_name(f"{stem}-{n}{suffix}") for n in count(2))
    return next(name for name in chain([path], later) if not os.path.lexists(name))


# -- writing ----------------------------------------------------------------------------------------------------------


def write_text(path: str | Path, text: str, *, private: bool = False) -> None:
    """Write a text file as UTF-8, whole or not at all.

    Args:
        path: the file; its folder is made where it does not exist, and a file that is there is replaced.
        text: the content; halves of characters (lone surrogates), which UTF-8 lacks, become "?".
        private: only the owner can read the file.

    Raises:
        WriteError: the system refuses; the old file, if any, is as it was.
    """
    write_bytes(path, text.encode("utf-8", "replace"), private=private)


def write_bytes(path: str | Path, content: bytes | Iterable[bytes], *, private: bool = False) -> None:
    """Write bytes, or pieces of bytes one after the other, as `write_text` writes text."""
    with _replacing(Path(path)) as partial:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600 if private else 0o666)
        with os.fdopen(descriptor, "wb") as file:
            file.writelines([content] if isinstance(content, bytes) else content)


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file as `write_text` writes text; tensors are made contiguous."""
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with _replacing(Path(path)) as partial:
        save_file(contiguous, partial, None if metadata is None else dict(metadata))


def write_table(
    path: str | Path,
    columns: Mapping[str, Any],
    batches: Iterable[Mapping[str, Sequence[Any]]],
    metadata: Mapping[str, str],
) -> None:
    """Write a Parquet file as `write_text` writes text, with a row group for each batch of columns.

    Args:
        path: the file.
        columns: name of each column -> the type of its values: int, float, str, list[float] or list[str].
        batches: the values of all columns, some rows at a time; only one batch is held in memory.
        metadata: texts that the file's schema holds.
    """
    import pyarrow as pa  # takes most of a second
    from pyarrow.parquet import ParquetWriter

    types = {int: pa.int64(), float: pa.float64(), str: pa.string()}
    types |= {list[float]: pa.list_(pa.float64()), list[str]: pa.list_(pa.string())}
    schema = pa.schema([(name, types[kind]) for name, kind in columns.items()], dict(metadata))
    with _replacing(Path(path)) as partial, ParquetWriter(partial, schema) as writer:
        for batch in batches:
            writer.write_table(pa.table({name: _as_unicode(batch[name]) for name in columns}, schema))


def _as_unicode(value: Any) -> Any:
    """A value in which halves of characters, which UTF-8 lacks, are "?"."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    return [_as_unicode(item) for item in value] if isinstance(value, list | tuple) else value


def append_text(path: str | Path, text: str) -> None:
    """Add to the end of a file, which is made where it does not exist, and return when the text is on the disk.

    Raises WriteError; the file then ends where it ended before.
    """
    data = memoryview(text.encode("utf-8", "replace"))
    with writing(Path(path)), open(path, "ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        try:
            while data:
                data = data[file.write(data) :]
            os.fsync(file.fileno())
        except OSError:
            file.truncate(end)
            raise


def copy_file(source: str | Path, path: str | Path) -> None:
    """Copy a file's bytes, as `write_bytes` writes them."""
    with open(source, "rb") as file:
        write_bytes(path, iter(lambda: file.read(2**20), b""))


def make_folder(path: str | Path, *, private: bool = False) -> None:
    """Make a folder, and those above it, where it does not exist.

    Args:
        path: the folder.
        private: only the owner can enter it, also where it existed before.

    Raises WriteError.
    """
    path = Path(path)
    with writing(path):
        path.mkdir(0o700 if private else 0o777, parents=True, exist_ok=True)
        if private and path.stat().st_mode & 0o077:
            path.chmod(0o700)


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A new folder to fill, which becomes ``path`` when the block succeeds and is removed when it fails.

    Raises FolderExistsError where ``path`` exists already, and WriteError.
    """
    path = Path(path)
    require_absent(path)
    with working_folder(path) as partial:
        yield partial
        with writing(path):
            _sync_tree(partial, path)
            try:
                os.rename(partial, path)
            except OSError:
                require_absent(path)  # another process may have made it meanwhile
                raise
            _sync(path.parent)


@contextmanager
def replaced_folder(path: str | Path, own: Iterable[str]) -> Iterator[Path]:
    """As `new_folder`, but a folder that is there is replaced, as `replace_folder` does it."""
    with working_folder(path) as partial:
        yield partial
        replace_folder(partial, path, own)


def replace_folder(fresh: str | Path, path: str | Path, own: Iterable[str]) -> None:
    """Give a complete folder the name ``path``, in place of an earlier one of this package.

    A process that is killed between the two renames leaves the earlier folder under a temporary name, from which the
    next writer brings it back.

    Args:
        fresh: the complete folder.
        path: its name from now on.
        own: patterns of the names that this package writes into such a folder. Whatever else is there is the user's,
            and is copied into the new folder before the earlier one goes.

    Raises:
        WriteError: the system refuses; the earlier folder is as it was.
    """
    fresh, path, own = Path(fresh), Path(path), tuple(own)
    earlier = _temporary(path, "replaced")
    with writing(path):
        if path.is_dir():
            for entry in path.iterdir():
                if not any(fnmatch(entry.name, pattern) for pattern in own) and not _TEMPORARY.fullmatch(entry.name):
                    copy = shutil.copytree if entry.is_dir() else shutil.copy2
                    copy(entry, fresh / entry.name)
        _sync_tree(fresh, path)
        if path.is_dir():
            os.rename(path, earlier)
        try:
            os.rename(fresh, path)
        except BaseException:
            if earlier.is_dir():
                os.rename(earlier, path)
            raise
        _sync(path.parent)
        shutil.rmtree(earlier, ignore_errors=True)


def name_new(work: str | Path, path: str | Path) -> None:
    """Give a complete file or folder out of a `working_folder` its name, which must be free.

    Raises FolderExistsError and WriteError.
    """
    work, path = Path(work), Path(path)
    require_absent(path)
    with writing(path):
        _sync_tree(work, path)
        os.rename(work, path)
        _sync(path.parent)


@contextmanager
def working_folder(path: str | Path) -> Iterator[Path]:
    """A folder with a temporary name beside ``path``, removed at the end of the block unless it was renamed."""
    path = Path(path)
    partial = _temporary(path, "partial")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent)
        partial.mkdir()
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder in the system's place for temporary files, removed at the end of the block."""
    with tempfile.TemporaryDirectory(prefix="tl_adapters-") as folder:
        yield Path(folder)


# -- removing ---------------------------------------------------------------------------------------------------------


def remove_own(path: str | Path) -> None:
    """Remove a file or folder that this package wrote; one that does not exist is no error. Raises WriteError.

    A folder is renamed first, so that no half of it is ever found under its name; not where a full disk refuses that.
    """
    path = Path(path)
    with writing(path):
        if not path.is_dir() or path.is_symlink():
            path.unlink(missing_ok=True)
            return
        removed = _temporary(path, "removed")
        try:
            os.rename(path, removed)
        except OSError:
            removed = path
        shutil.rmtree(removed, ignore_errors=removed != path)


def remove_leftovers(folder: str | Path) -> None:
    """Remove the temporary files and folders in ``folder`` whose process no longer exists; every writer does."""
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if (name := _TEMPORARY.fullmatch(entry.name)) and _is_abandoned(Path(entry.path), name):
                _remove_leftover(Path(entry.path), name)


def _remove_leftover(leftover: Path, name: re.Match[str]) -> None:
    if name["state"] == "replaced":  # the only copy, where its process was killed before the new folder had its name
        with suppress(OSError):
            os.rename(leftover, leftover.with_name(name["name"]))  # refused where there is a new folder
            return
    if leftover.is_dir():
        shutil.rmtree(leftover, ignore_errors=True)
    else:
        leftover.unlink(missing_ok=True)


def _is_abandoned(leftover: Path, name: re.Match[str]) -> bool:
    """Whether the process that made a temporary file or folder is gone; its number may belong to a later process."""
    try:
        changed = leftover.lstat().st_mtime
        if name["host"] != _HOST:
            return time.time() - changed > ABANDONED_SECONDS
        process = psutil.Process(int(name["pid"]))
        return process.status() == psutil.STATUS_ZOMBIE or process.create_time() > changed + 1
    except psutil.NoSuchProcess:
        return True
    except (OSError, psutil.Error):
        return False


# -- names out of files -----------------------------------------------------------------------------------------------


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
        if not is_plain_name(name):
            raise UnsafeFileError(
                f"{folder} names the file {str(name)[:100]!r}. A file of a folder is named without '/', '\\' and "
                "'..', so that it cannot be outside. The folder is damaged, or was made to mislead: get it from a "
                "source that you trust."
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


def is_plain_name(name: object) -> bool:
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


# -- locks ------------------------------------------------------------------------------------------------------------


@contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Hold the lock of a file while it is read, changed and written; other processes and threads wait.

    Not reentrant. Raises FolderBusyError where another process holds it for a minute, and WriteError.
    """
    path = Path(path)
    make_folder(path.parent)
    with _held(
        path.with_name(_stem(path, "lock")), LOCK_SECONDS, f"Another process has been changing {path} for long."
    ):
        yield


@contextmanager
def alone_in(folder: str | Path, lock: str = ".lock") -> Iterator[None]:
    """Hold a lock on a folder, or on a part of the work in it that ``lock`` names; the folder must exist.

    Raises FolderBusyError where another process holds it, and WriteError.
    """
    with _held(Path(folder) / lock, 0.0, f"Another process is writing to {folder}."):
        yield


@contextmanager
def _held(file: Path, seconds: float, busy: str) -> Iterator[None]:
    """Hold a lock, whose file exists only while it is held.

    A process that waits may get the lock of a file that its holder has removed; filelock notices that and tries again.
    """
    lock = FileLock(file, timeout=seconds, poll_interval=0.01)
    with writing(file.parent):
        try:
            lock.acquire()
        except Timeout:
            raise FolderBusyError(f"{busy} Wait for it or stop it.") from None
    try:
        yield
    finally:
        with suppress(OSError):
            file.unlink()
        lock.release()


# -- the ground they stand on -----------------------------------------------------------------------------------------


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the system refuses, through whichever library, into a WriteError that names ``path``.

    A name that is not UTF-8 is refused as well: safetensors writes such a file, and cannot read it.
    """
    if any("\ud800" <= character <= "\udfff" for character in str(path)):
        raise WriteError(f"{path} cannot be written: the name is not UTF-8; choose another.")
    try:
        yield
    except UserError:
        raise
    except (OSError, SafetensorError) as error:
        code = getattr(error, "errno", None)
        if found := re.search(r"os error (\d+)", str(error)):
            code = int(found[1])
        if code in _DISK_FULL_CODES:
            raise DiskFullError(
                f"The disk is too full to write {_final(path)} ({error}). No partly written file is left; free some "
                "space first."
            ) from error
        advice = _ADVICE.get(code or 0, "look at the disk and the folder, and try again")
        raise WriteError(f"{_final(path)} cannot be written ({error}): {advice}.") from error


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A name to write a file under, which becomes ``path`` when the block succeeds and is removed when it fails."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if _is_being_filled(path.parent):
            yield path
            return
        remove_leftovers(path.parent)
        if path.exists() and not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        partial = _temporary(path, "partial")
        try:
            yield partial
            _sync(partial)
            os.replace(partial, path)
            _sync(path.parent)
        finally:
            partial.unlink(missing_ok=True)


def _temporary(path: Path, state: str) -> Path:
    """A name beside ``path`` that no other process and no other call uses."""
    return path.with_name(_stem(path, f"{_HOST}-{os.getpid()}-{secrets.token_hex(4)}.{state}"))


def _stem(path: Path, suffix: str) -> str:
    name, content = path.name, os.fsencode(path.name)
    if len(content) > _LONGEST_NAME:
        name = hashlib.sha256(content).hexdigest()[:32]
    return f".{name}.{suffix}"


def _is_being_filled(folder: Path) -> bool:
    """Whether a folder, or one above it, still has a temporary name."""
    return any(_TEMPORARY.fullmatch(part) for part in folder.parts)


def _final(path: Path) -> Path:
    """A path as it will be when the folders that are being filled have their names."""
    names = ((part, _TEMPORARY.fullmatch(part)) for part in path.parts)
    return Path(*(name["name"] if name else part for part, name in names))


def _sync(path: Path) -> None:
    """Flush a file, or the names in a folder, without which a power failure may undo a rename.

    Not every system can flush a folder.
    """
    with suppress(OSError) if path.is_dir() else nullcontext():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _sync_tree(folder: Path, path: Path) -> None:
    """Flush everything in a folder that becomes ``path``, unless that is within a folder that is flushed later."""
    if not _is_being_filled(path.parent):
        for file in (*folder.rglob("*"), folder):
            _sync(file)
