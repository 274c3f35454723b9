"""Replies of a model: kept on the disk under what was asked, and read as strict JSON.

A reply's file is named by the hash of model, parameters and messages, and holds them, so that a person can read what
was asked. It is written whole or not at all, before anything uses it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tl_adapters.atomic import write_text
from tl_adapters.strict_json import dumps

log = logging.getLogger(__name__)


class ReplyCache:
    """Replies by what was asked.

    Args:
        folder: where they are; None keeps nothing.
    """

    def __init__(self, folder: str | Path | None) -> None:
        self.folder = None if folder is None else Path(folder)
        self._lock, self._asking = threading.Lock(), defaultdict[str, threading.Lock](threading.Lock)

    def file(self, question: Mapping[str, Any]) -> Path | None:
        """Where the reply to a question (model, parameters, messages) is kept."""
        name = _name(question)
        return None if self.folder is None else self.folder / name[:2] / f"{name}.json"

    def reply(self, question: Mapping[str, Any], ask: Callable[[], str]) -> tuple[str, bool]:
        """The reply to a question, and whether it was kept already; ``ask`` gets it where it was not.

        Threads that have the same question at the same time wait for one of them to ask it. Raises what ``ask`` raises,
        and DiskFullError.
        """
        path = self.file(question)
        if path is None:
            return ask(), False
        with self._lock:
            mine = self._asking[path.name]
        with mine:
            kept = _read(path)
            if kept is not None:
                return kept, True
            text = ask()
            write_text(path, dumps({**question, "reply": text}, indent=1) + "\n")
            return text, False


def read_json(reply: str) -> Any:
    """A reply as JSON. Nothing else may stand there but thinking before it and one fence around it.

    Raises ValueError that says what is wrong.
    """
    body = reply.rpartition("</think>")[2].strip()
    fenced = re.fullmatch(r"```(?:json)?\s*\n(.*)\n\s*```", body, flags=re.DOTALL)

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no JSON")

    try:
        return json.loads(fenced.group(1) if fenced else body, parse_constant=refuse)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is no JSON ({error})") from error
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _name(question: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()


def _read(path: Path) -> str | None:
    if not path.is_file():
        return None
    try:
        reply = json.loads(path.read_text(encoding="utf-8"))["reply"]
    except (ValueError, KeyError, TypeError):
        reply = None
    if not isinstance(reply, str):
        log.warning("%s is damaged; the question is asked again.", path)
        return None
    return reply
