"""Runs a reader on damaged files and counts what it does: accepts, refuses with our error, or anything else."""

from __future__ import annotations

import logging
import resource
import shutil
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

from fuzz.mutations import damaged

from tl_adapters.errors import UserError

SECONDS_PER_CASE = 5.0
MEMORY = 2 * 2**30
"""Bytes by which the address space may grow while files are read."""
LONGEST_MESSAGE = 2000
"""Characters of an error; one that quotes a whole file is a failure."""


@dataclass(frozen=True)
class Reader:
    """A function that reads files, with valid files to damage."""

    name: str
    write: Callable[[Path], None]
    """Writes valid files into a new folder."""
    damaged: tuple[str, ...]
    """Patterns of the files to damage."""
    read: Callable[[Path], Any]
    """Reads the folder's files, and uses what it has read as a subcommand would."""
    from_strangers: bool
    """Whether such files are downloaded or passed on: 10,000 cases instead of 1,000."""
    before_reading: Callable[[Path], None] | None = None
    """Changes the damaged files once more: hashes of what they hold are computed again, as a stranger would."""


@dataclass(frozen=True)
class Stray:
    """A failure: an exception that is no UserError, a hang, an error of thousands of characters, or without a file."""

    case: int
    file: str
    what: str
    place: str


@dataclass
class Tally:
    """Counts of one reader's cases."""

    cases: int = 0
    accepted: int = 0
    refused: int = 0
    strays: list[Stray] = field(default_factory=list)

    @property
    def places(self) -> dict[tuple[str, str], list[Stray]]:
        """Failures by exception class and place."""
        by_place: dict[tuple[str, str], list[Stray]] = {}
        for stray in self.strays:
            by_place.setdefault((stray.what.partition(":")[0], stray.place), []).append(stray)
        return by_place


class TooSlowError(BaseException):
    """A case took longer than SECONDS_PER_CASE. No code under test catches a BaseException of this class."""


def fuzz(reader: Reader, folder: Path, cases: int, seed: int = 0, first: int = 0) -> Tally:
    """Read damaged files; the case numbers run from ``first``.

    Args:
        reader: the reader and its files.
        folder: a folder in which valid files are made, which must not exist.
        cases: number of damaged files.
        seed, first: determine, with the reader's name, how files are damaged.
    """
    reader.write(folder)
    originals = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    damageable = sorted({path for pattern in reader.damaged for path in folder.glob(pattern)})
    assert damageable, f"{reader.name} has no files {reader.damaged}"
    contents = [originals[path] for path in damageable]
    tally = Tally()
    with _quiet(), _limited_memory():
        reader.read(folder)  # what is not damaged must be read
        _restore(folder, originals)
        for case in range(first, first + cases):
            rng = Random(f"{seed} {reader.name} {case}")
            path = rng.choice(damageable)
            changed = damaged(path.suffix, originals[path], contents, rng)
            if changed is None:
                path.unlink()
            else:
                path.write_bytes(changed)
            _run_case(reader, folder, case, path, tally)
            _restore(folder, originals)
    return tally


def _run_case(reader: Reader, folder: Path, case: int, path: Path, tally: Tally) -> None:
    tally.cases += 1
    stray = lambda what, place="": Stray(case, str(path.relative_to(folder)), what, place)  # noqa: E731
    try:
        if reader.before_reading is not None:
            reader.before_reading(folder)
        with _alarm():
            reader.read(folder)
        tally.accepted += 1
    except UserError as error:
        tally.refused += 1
        if len(str(error)) > LONGEST_MESSAGE:
            tally.strays.append(stray(f"an error of {len(str(error)):,} characters", _place(error)))
        elif str(folder) not in str(error):
            tally.strays.append(stray(f"an error that names no file: {error}", _place(error)))
    except (Exception, TooSlowError) as error:
        tally.strays.append(stray(f"{type(error).__name__}: {str(error)[:200]}", _place(error)))


def _place(error: BaseException) -> str:
    """The innermost line of the package in a traceback."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/tl_adapters/" in f.filename]
    if not frames:
        frames = list(traceback.extract_tb(error.__traceback__))
    return f"{frames[-1].filename.rpartition('tl_adapters/')[2]}:{frames[-1].lineno}" if frames else ""


def _restore(folder: Path, originals: dict[Path, bytes]) -> None:
    for path in folder.rglob("*"):
        if path not in originals and path.is_file():
            path.unlink()
    for path, content in originals.items():
        if not path.is_file() or path.stat().st_size != len(content) or path.read_bytes() != content:
            if path.is_dir():
                shutil.rmtree(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


@contextmanager
def _alarm() -> Iterator[None]:
    def stop(signum: int, frame: FrameType | None) -> None:
        raise TooSlowError(f"longer than {SECONDS_PER_CASE} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS_PER_CASE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


@contextmanager
def _limited_memory() -> Iterator[None]:
    """Allocations beyond MEMORY fail within this context, as failures of the case that made them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").is_file() else 0
    if pages:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without log lines and warnings, of which there would be one for every file."""
    previous = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
