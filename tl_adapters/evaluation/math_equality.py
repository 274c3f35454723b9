"""Equality of two mathematical expressions by math-verify, within a bounded time in every thread.

Some expressions (a tower of powers, for example) keep math-verify busy without end. Its own time limit is an alarm
signal, which only the main thread can set. In other threads a subprocess is used instead: its main thread sets the
alarm, and the subprocess is killed where even that does not help.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading

from tl_adapters.utils.strict_json import dumps

MATH_VERIFY_SECONDS = 5
"""Time limit for parsing an expression, and for comparing two."""
SUBPROCESS_SECONDS = 60.0
"""Time after which the subprocess is killed; its first reply includes loading math-verify."""
_PROGRAM = f"""
import json, sys
from math_verify import parse, verify
for line in sys.stdin:
    right, given = (parse(text, parsing_timeout={MATH_VERIFY_SECONDS}) for text in json.loads(line))
    print(json.dumps(bool(verify(right, given, timeout_seconds={MATH_VERIFY_SECONDS}))), flush=True)
"""


def equal(answer: str, text: str) -> bool:
    """Whether math-verify finds the right answer in a text; False where it finds another one or takes too long.

    Args:
        answer: the right answer in LaTeX, as ``\\boxed{...}``.
        text: any text; a box in it counts, or else its last expression.
    """
    if threading.current_thread() is not threading.main_thread():
        return _subprocess_checker.equal(answer, text)
    from math_verify import parse, verify

    right, given = (parse(part, parsing_timeout=MATH_VERIFY_SECONDS) for part in (answer, text))
    return bool(verify(right, given, timeout_seconds=MATH_VERIFY_SECONDS))


class _SubprocessChecker:
    """A subprocess that compares one pair of expressions at a time; it starts with the first comparison."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[str] | None = None

    def equal(self, answer: str, text: str) -> bool:
        with self.lock:
            process = self._running_process()
            assert process.stdin is not None
            assert process.stdout is not None
            timer = threading.Timer(SUBPROCESS_SECONDS, process.kill)
            timer.start()
            try:
                process.stdin.write(dumps([answer, text]) + "\n")
                process.stdin.flush()
                reply = process.stdout.readline()
            except OSError:  # the subprocess has ended
                reply = ""
            finally:
                timer.cancel()
            if not reply:
                process.kill()
                process.wait()
            return reply.strip() == "true"

    def _running_process(self) -> subprocess.Popen[str]:
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


_subprocess_checker = _SubprocessChecker()
