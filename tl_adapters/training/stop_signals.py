"""Ctrl-C and SIGTERM during training: the run stops between two steps and saves its state."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tl_adapters.processes import processes

PASSED_ON_SECONDS = 5.0
"""How long after a signal the launcher of several processes may pass on the one that a terminal has sent to all."""

log = logging.getLogger(__name__)


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set, for a loop that checks it between steps.

    A second signal raises KeyboardInterrupt at once. Outside the main thread, which alone receives signals, the event
    is never set.
    """
    stop, first = threading.Event(), 0.0
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def request_stop(number: int, frame: Any) -> None:
        nonlocal first
        if stop.is_set():
            if processes().count > 1 and time.monotonic() - first < PASSED_ON_SECONDS:
                return
            raise KeyboardInterrupt
        first = time.monotonic()
        stop.set()
        log.warning(
            "Stopping after this step. Another signal stops at once and loses the steps since the last saved state."
        )

    handlers = {number: signal.signal(number, request_stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
