"""SHA-256 of files, computed once: large files are remembered by path, size and times, as a build system does.

The memory is a JSON file under HF_HOME (which lies in XDG_CACHE_HOME, or ~/.cache), and only a convenience: where it
cannot be read or written, files are hashed anew. Small files are always hashed anew.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HOME

from tl_adapters.utils.files import write_text
from tl_adapters.utils.strict_json import dumps

log = logging.getLogger(__name__)

REMEMBERED_FROM = 2**20
"""Bytes from which a file's hash is remembered; smaller files are hashed in a millisecond."""
SETTLED = 2.0
"""Seconds since a file's last change before its hash is remembered: a file system's clock may not tell two changes
that are closer together apart."""
MOST_REMEMBERED = 20_000
"""Entries kept, the latest ones."""


def file_hash(path: str | Path) -> str:
    """The SHA-256 of a file's bytes, 64 hex digits; of a large file that has not changed, as it was remembered.

    Raises OSError where it cannot be read.
    """
    path = Path(path).resolve()  # the hub's cache links to its blobs
    if path.stat().st_size < REMEMBERED_FROM:
        return _digest(path)
    facts = _facts(path)
    entry = _remembered().get(str(path))
    if entry is not None and entry[:-1] == facts:
        return str(entry[-1])
    digest = _digest(path)
    if _facts(path) == facts and time.time() - path.stat().st_mtime > SETTLED:
        _remember(str(path), [*facts, digest])
    return digest


def memory_file() -> Path:
    """Where hashes are remembered."""
    return Path(HF_HOME) / "tl_adapters" / "file_hashes.json"


def _facts(path: Path) -> list[int]:
    """What changes when a file does: its size, its times and its place on the disk."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remembered() -> dict[str, list[Any]]:
    try:
        found = json.loads(memory_file().read_text(encoding="utf-8"))
        return {path: list(entry) for path, entry in found.items() if len(entry) == 5}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def _remember(path: str, entry: list[Any]) -> None:
    """Add an entry. Of processes that write at the same time one wins; the other's files are hashed once more."""
    entries = {known: kept for known, kept in _remembered().items() if known != path}
    entries[path] = entry
    try:
        write_text(memory_file(), dumps(dict(list(entries.items())[-MOST_REMEMBERED:])))
    except OSError as error:
        log.debug("hashes of files are not remembered: %s", error)
