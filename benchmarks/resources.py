"""Time and memory of one call in this process."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


class Taken(NamedTuple):
    """What a call took."""

    seconds: float
    """Seconds on the clock."""
    bytes: int
    """The most memory during the call beside what was there before it."""


def measured(act: Callable[[], object]) -> Taken:
    """Time of one call, and the most memory beside what was there before it. Linux only."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
    before, started = _memory("VmRSS"), time.perf_counter()
    act()
    return Taken(time.perf_counter() - started, _memory("VmHWM") - before)


def _memory(name: str) -> int:
    """A line of this process's memory in bytes: VmRSS is what it has, VmHWM the most it had."""
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith(name))
