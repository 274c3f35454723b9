"""Runs a subcommand in a process, kills it at a random moment or refuses its writes, runs it again, and compares.

Half of the kills come after a random time. Moments between two writes are rare among those, so the other half come at a
random one of the calls that open, flush, rename or remove.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kill.subcommands import Subcommand

from tl_adapters.utils import files

CALLS = ("open", "fsync", "replace", "rename", "unlink", "rmdir", "mkdir")
CREATING = ("open", "fsync", "replace", "rename", "mkdir")
"""Those of them that a full or a read-only disk refuses; open only where it makes a file."""
AGAIN = "again"
"""File that tells a subcommand that it runs again."""
VOLATILE = {"seconds", "create_time_ms", "id", "sha256", "took", "size"}
"""Keys of JSON files that two equal runs do not share: times, what depends on them, and the name of a run."""
TIMED_PAGES = ("report.html",)
"""Pages that show times."""


@dataclass
class Tally:
    """What became of one subcommand."""

    kills: int = 0
    """Processes that were killed, or refused with one error."""
    at_calls: int = 0
    """Kills at a call that writes; the others came after a random time."""
    finished: int = 0
    """Processes that finished."""
    failures: list[str] = field(default_factory=list)


def kill_often(subcommand: Subcommand, prepared: Path, work: Path, kills: int, seed: int) -> Tally:
    """Kill a subcommand ``kills`` times, each time from a fresh folder, and run it again.

    Args:
        subcommand: what is run.
        prepared: folder with the inputs, and with the run that it works on.
        work: folder to work in; emptied.
        kills: how often it is killed.
        seed: of the moments.
    """
    rng, tally = random.Random(f"{seed}-kill"), Tally()
    whole = _whole(subcommand, prepared, work, tally)
    for number in range(kills if whole else 0):
        folder = _fresh(prepared, work / "folder", subcommand)
        if number % 2:
            code = _wait(_start(subcommand, folder, at_call=rng.randint(1, whole.calls)))
            tally.at_calls += 1
        else:
            code = _wait(_start(subcommand, folder), rng.uniform(0, whole.seconds))
        tally.kills += code == -signal.SIGKILL
        tally.finished += code == 0
        _run_again(subcommand, folder, whole, tally, f"kill {number}")
    return tally


def refuse_often(subcommand: Subcommand, prepared: Path, work: Path, cases: int, seed: int) -> Tally:
    """Let the system refuse every write from a random one on, as a full or a read-only disk does, and run it again.

    The subcommand must end with one error, or succeed where only a cache could not be written. Arguments as for
    `kill_often`.
    """
    rng, tally = random.Random(f"{seed}-refuse"), Tally()
    whole = _whole(subcommand, prepared, work, tally)
    for number in range(cases if whole else 0):
        folder = _fresh(prepared, work / "folder", subcommand)
        code = errno.ENOSPC if number % 2 else errno.EROFS
        what = f"refusal {number} ({errno.errorcode[code]})"
        ended = _wait(_start(subcommand, folder, at_call=rng.randint(1, whole.creating), refusal=code))
        tally.kills += ended == 2
        tally.finished += ended == 0
        words = (work / "stderr").read_text(errors="replace")
        if "Traceback" in words or ended not in (0, 2) or (ended == 2 and "error: " not in words):
            tally.failures.append(f"{what}: it ends with {ended}: {_last_words(folder)}")
        _run_again(subcommand, folder, whole, tally, what)
    return tally


def run_two_at_once(subcommand: Subcommand, prepared: Path, work: Path, cases: int, seed: int) -> Tally:
    """Start a subcommand twice at the same time in one folder; each succeeds or is refused, and one succeeds."""
    tally = Tally()
    whole = _whole(subcommand, prepared, work, tally)
    for number in range(cases if whole else 0):
        folder = _fresh(prepared, work / "folder", subcommand)
        children = [_start(subcommand, folder, stream=f"{name}-") for name in ("first", "second")]
        codes = [_wait(child) for child in children]
        words = [(work / f"{name}-stderr").read_text(errors="replace").strip() for name in ("first", "second")]
        tally.kills += codes.count(2)
        tally.finished += codes.count(0)
        refused = [text for text, code in zip(words, codes, strict=True) if code == 2]
        if 0 not in codes or not set(codes) <= {0, 2} or any("error: " not in text for text in refused):
            tally.failures.append(f"pair {number}: they end with {codes}: {[text[-200:] for text in words]}")
        _run_again(subcommand, folder, whole, tally, f"pair {number}")
    return tally


@dataclass
class _Whole:
    """A process that nothing stopped."""

    contents: dict[str, str]
    seconds: float
    calls: int
    """Calls that write."""
    creating: int
    """Those of them that a full or a read-only disk refuses."""


def _whole(subcommand: Subcommand, prepared: Path, work: Path, tally: Tally) -> _Whole | None:
    folder, log = _fresh(prepared, work / "folder", subcommand), work / "calls"
    started = time.perf_counter()
    if code := _wait(_start(subcommand, folder, count_in=log)):
        tally.failures.append(f"not stopped, it ends with {code}: {_last_words(folder)}")
        return None
    calls, creating = map(int, log.read_text().split())
    return _Whole(contents(folder), time.perf_counter() - started, calls, creating)


def _run_again(subcommand: Subcommand, folder: Path, whole: _Whole, tally: Tally, what: str) -> None:
    (folder / AGAIN).touch()
    if code := _wait(_start(subcommand, folder)):
        tally.failures.append(f"{what}: run again, it ends with {code}: {_last_words(folder)}")
        return
    (folder / AGAIN).unlink()
    found = contents(folder)
    if different := sorted(name for name in {*found, *whole.contents} if found.get(name) != whole.contents.get(name)):
        tally.failures.append(f"{what}: {len(different)} files differ, such as {different[:4]}")
    if left := leftovers(folder):
        tally.failures.append(f"{what}: left behind: {left[:4]}")


def contents(folder: Path) -> dict[str, str]:
    """Name of every file -> hash of its bytes, or for JSON of its values without times and the name of the run."""
    return {str(path.relative_to(folder)): _content(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def leftovers(folder: Path) -> list[str]:
    """Temporary files and locks."""
    ours = lambda name: files._TEMPORARY.fullmatch(name) or name.endswith(".lock")  # noqa: E731
    return [str(path.relative_to(folder)) for path in folder.rglob(".*") if ours(path.name)]


def _content(path: Path) -> str:
    data = path.read_bytes()
    if path.name in TIMED_PAGES or path.name in ("stdout", "stderr"):
        return "a page with times"
    if path.suffix == ".json":
        data = json.dumps(_lasting(json.loads(data)), sort_keys=True).encode()
    return hashlib.sha256(data).hexdigest()


def _lasting(value: Any) -> Any:
    if isinstance(value, dict):
        if "cached" in value:  # what a call of the judge has cost: replies that a killed one paid for cost nothing
            return {}
        return {key: _lasting(item) for key, item in value.items() if key not in VOLATILE}
    return [_lasting(item) for item in value] if isinstance(value, list) else value


def _fresh(prepared: Path, folder: Path, subcommand: Subcommand) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(prepared, folder)
    if subcommand.without:
        shutil.rmtree(folder / subcommand.without)
    return folder


def _last_words(folder: Path) -> str:
    return (folder.parent / "stderr").read_text(errors="replace").strip()[-300:].replace("\n", " | ")


def _start(
    subcommand: Subcommand,
    folder: Path,
    *,
    at_call: int | None = None,
    refusal: int | None = None,
    count_in: Path | None = None,
    stream: str = "",
) -> int:
    """The number of a new process that runs the subcommand in a folder.

    Args:
        subcommand: what is run.
        folder: where; its parent holds the process's output.
        at_call: the process dies at this call that writes, or from this call on the system refuses.
        refusal: the error with which the system refuses.
        count_in: file for the number of calls.
        stream: prefix of the names of the output's files.
    """
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        os.chdir(folder)
        for descriptor, name in ((1, "stdout"), (2, "stderr")):
            opened = os.open(folder.parent / f"{stream}{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(opened, descriptor)
            os.close(opened)
            setattr(sys, name, open(descriptor, "w", closefd=False))  # noqa: SIM115 (pytest may have put its own there)
        made = _watch(at_call, refusal)
        code = subcommand.run(folder) or 0
        if count_in is not None:
            count_in.write_text(f"{len(made)} {sum(made)}")
    except BaseException as error:
        print(f"Traceback: {type(error).__name__}: {error}", file=sys.stderr)
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    raise AssertionError


def _wait(child: int, kill_after: float | None = None) -> int:
    """Exit status of a process; negative where a signal ended it."""
    if kill_after is not None:
        end = time.perf_counter() + kill_after
        while time.perf_counter() < end:
            if (status := os.waitpid(child, os.WNOHANG))[0]:
                return os.waitstatus_to_exitcode(status[1])
            time.sleep(0.002)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _watch(at_call: int | None, refusal: int | None) -> list[bool]:
    """Count the calls that write from now on, in this process; die at one of them, or refuse from it on.

    Returns a list that grows by one for each call, which says whether a full disk refuses it.
    """
    made: list[bool] = []

    def watched(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            creates = name in CREATING and (name != "open" or bool(args[1] & os.O_CREAT))
            made.append(creates)
            if refusal is None and len(made) == at_call:
                os.kill(os.getpid(), signal.SIGKILL)
            if refusal is not None and creates and sum(made) >= (at_call or 0):
                raise OSError(refusal, os.strerror(refusal))
            return call(*args, **options)

        return counted

    for name in CALLS:
        setattr(os, name, watched(name, getattr(os, name)))
    return made
