"""Are two mathematical expressions equal? math-verify says so, within a time that is bounded in every thread.

Some expressions (a tower of powers, say) keep it busy for good. Its own bound is an alarm signal, which only the main
thread can set. In other threads a process of ours is asked, whose main thread sets the alarm, and which is ended where
even that does not help.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading

from tl_adapters.utils.strict_json import dumps

SECONDS = 5
"""For reading an expression, and for comparing two."""
PATIENCE = 60.0
"""Seconds after which the process is ended; its first answer includes loading math-verify."""
_PROGRAM = f"""
import json, sys
from math_verify import parse, verify
for line in sys.stdin:
    right, given = (parse(text, parsing_timeout={SECONDS}) for text in json.loads(line))
    print(json.dumps(bool(verify(right, given, timeout_seconds={SECONDS}))), flush=True)
"""


def equal(answer: str, said: str) -> bool:
    """True if math-verify finds the right answer in what was said; False where it finds another, or takes too long.

    Args:
        answer: LaTeX, as ``\\boxed{...}``.
        said: any text; a box in it counts, or else its last expression.
    """
    if threading.current_thread() is not threading.main_thread():
        return _checker.equal(answer, said)
    from math_verify import parse, verify

    right, given = (parse(text, parsing_timeout=SECONDS) for text in (answer, said))
    return bool(verify(right, given, timeout_seconds=SECONDS))


class _Checker:
    """The process, one question at a time."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[str] | None = None

    def equal(self, answer: str, said: str) -> bool:
        with self.lock:
            process = self._running()
            assert process.stdin is not None
            assert process.stdout is not None
            clock = threading.Timer(PATIENCE, process.kill)
            clock.start()
            try:
                process.stdin.write(dumps([answer, said]) + "\n")
                process.stdin.flush()
                reply = process.stdout.readline()
            except OSError:  # it has ended
                reply = ""
            finally:
                clock.cancel()
            if not reply:
                process.kill()
                process.wait()
            return reply.strip() == "true"

    def _running(self) -> subprocess.Popen[str]:
        if self.process is None or self.process.poll() is not None:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="utf-8",
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONIOENCODING": "utf-8"},
            )
        return self.process


_checker = _Checker()
