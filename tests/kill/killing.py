"""Runs a subcommand in a process, kills it at a random moment, runs it again, and compares what is there.

Half of the kills come after a random time. Moments between two writes are rare among those, so the other half come at a
random one of the calls that open, flush, rename or remove.
"""

from __future__ import annotations

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
VOLATILE = {"seconds", "create_time_ms", "id", "sha256", "took", "size"}
"""Keys of JSON files that two equal runs do not share: times, what depends on them, and the name of a run."""
TIMED_PAGES = ("report.html",)
"""Pages that show times."""


@dataclass
class Tally:
    """What became of the kills of one subcommand."""

    kills: int = 0
    at_calls: int = 0
    """Kills at a call that writes; the others came after a random time."""
    finished: int = 0
    """Processes that had finished before they were killed."""
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
    whole = _fresh(prepared, work / "folder", subcommand)
    log = work / "calls"
    started = time.perf_counter()
    code = _run(subcommand, whole, count_calls_in=log)
    seconds, calls = time.perf_counter() - started, int(log.read_text() or 0)
    if code != 0:
        tally.failures.append(f"not killed, it ends with {code}: {_last_words(whole)}")
        return tally
    expected = contents(whole)
    for number in range(kills):
        folder = _fresh(prepared, work / "folder", subcommand)
        if number % 2:
            code = _run(subcommand, folder, die_at_call=rng.randint(1, calls))
            tally.at_calls += 1
        else:
            code = _run(subcommand, folder, die_after=rng.uniform(0, seconds))
        tally.kills += code == -signal.SIGKILL
        tally.finished += code == 0
        code = _run(subcommand, folder)
        if code != 0:
            tally.failures.append(f"kill {number}: run again, it ends with {code}: {_last_words(folder)}")
            continue
        found = contents(folder)
        if different := sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name)):
            tally.failures.append(f"kill {number}: {len(different)} files differ, such as {different[:4]}")
        if left := leftovers(folder):
            tally.failures.append(f"kill {number}: left behind: {left[:4]}")
    return tally


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
        return {key: _lasting(item) for key, item in value.items() if key not in VOLATILE}
    return [_lasting(item) for item in value] if isinstance(value, list) else value


def _fresh(prepared: Path, folder: Path, subcommand: Subcommand) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    ignored = () if subcommand.needs_run else ("run",)
    shutil.copytree(prepared, folder, ignore=lambda _, names: [name for name in names if name in ignored])
    return folder


def _last_words(folder: Path) -> str:
    return (folder.parent / "stderr").read_text(errors="replace").strip()[-300:].replace("\n", " | ")


def _run(
    subcommand: Subcommand,
    folder: Path,
    *,
    die_after: float | None = None,
    die_at_call: int | None = None,
    count_calls_in: Path | None = None,
) -> int:
    """Exit status of a process that runs the subcommand in a folder; negative where a signal ended it."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.chdir(folder)
            for stream, name in ((1, "stdout"), (2, "stderr")):
                descriptor = os.open(folder.parent / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(descriptor, stream)
                os.close(descriptor)
            made = _watch(die_at_call)
            code = subcommand.run(folder) or 0
            if count_calls_in is not None:
                count_calls_in.write_text(str(len(made)))
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        finally:
            with suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
    if die_after is not None:
        end = time.perf_counter() + die_after
        while time.perf_counter() < end:
            if (status := os.waitpid(child, os.WNOHANG))[0]:
                return os.waitstatus_to_exitcode(status[1])
            time.sleep(0.002)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _watch(die_at_call: int | None) -> list[None]:
    """Count the calls that write from now on, in this process, and die before the one of that number."""
    made: list[None] = []

    def watched(call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            made.append(None)
            if len(made) == die_at_call:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **options)

        return counted

    for name in CALLS:
        setattr(os, name, watched(getattr(os, name)))
    return made
