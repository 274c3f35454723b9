"""SHA-256 of files; those of large files are cached by path, size and times, as a build system does.

The cache is a JSON file under HF_HOME (in XDG_CACHE_HOME, or ~/.cache). Where it cannot be read or written, files are
hashed again; small files always are.
"""

from __future__ import annotations

import hashlib
import logging
import time
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HOME

from tl_adapters.utils.files import FolderBusyError, locked, write_text
from tl_adapters.utils.reading import UnreadableFileError, read_json_object
from tl_adapters.utils.strict_json import dumps

log = logging.getLogger(__name__)

CACHED_FROM_BYTES = 2**20
"""Size from which the hash of a file is cached; smaller files are hashed in a millisecond."""
SETTLED_SECONDS = 2.0
"""Time since the last change of a file before its hash is cached: the clock of a file system may not distinguish two
changes that are closer together."""
MAX_CACHED_HASHES = 20_000
"""Number of cached hashes; the latest ones stay."""


def file_hash(path: str | Path) -> str:
    """The SHA-256 of a file's bytes, in 64 hex digits; from the cache for a large file that has not changed.

    Raises OSError where the file cannot be read.
    """
    path = Path(path).resolve()  # the hub's cache consists of links to its blobs
    if path.stat().st_size < CACHED_FROM_BYTES:
        return _digest(path)
    facts = _facts(path)
    entry = _cached_hashes().get(str(path))
    if entry is not None and entry[:-1] == facts:
        return str(entry[-1])
    digest = _digest(path)
    if _facts(path) == facts and time.time() - path.stat().st_mtime > SETTLED_SECONDS:
        _cache_hash(str(path), [*facts, digest])
    return digest


def hash_cache_file() -> Path:
    """The file in which hashes are cached."""
    return Path(HF_HOME) / "tl_adapters" / "file_hashes.json"


def _facts(path: Path) -> list[int]:
    """Properties that change with a file: its size, its times and its inode."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _cached_hashes() -> dict[str, list[Any]]:
    try:
        entries = read_json_object(hash_cache_file())
    except UnreadableFileError:
        return {}
    return {path: entry for path, entry in entries.items() if isinstance(entry, list) and len(entry) == 5}


def _cache_hash(path: str, entry: list[Any]) -> None:
    """Add an entry; a cache that cannot be written is left as it is."""
    try:
        with locked(hash_cache_file()):
            entries = {other: values for other, values in _cached_hashes().items() if other != path}
            entries[path] = entry
            write_text(hash_cache_file(), dumps(dict(list(entries.items())[-MAX_CACHED_HASHES:])))
    except (OSError, FolderBusyError) as error:
        log.debug("hashes of files are not cached: %s", error)
