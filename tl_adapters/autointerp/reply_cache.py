"""Replies of a model: kept on the disk under what was asked, and read as strict JSON.

A reply's file is named by the hash of server, model, parameters and messages, and holds them, so that a person can read
what was asked. It is written whole or not at all, before anything uses it; one that turns out to be of no use is marked
so, and asked for again by whoever comes next.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tl_adapters.utils.files import write_text
from tl_adapters.utils.strict_json import dumps

log = logging.getLogger(__name__)

LENGTH_LIMITS = ("max_tokens", "max_completion_tokens")
"""Parameters that bound the length of a reply, under the names that servers know."""


class ReplyCache:
    """Replies by what was asked.

    A question is {"server", "model", "parameters", "messages"}. Limits of the reply's length do not tell one question
    from another: a reply that came to its end is the same under a larger limit, and a cut one is not kept.

    Args:
        folder: where they are; None keeps nothing.
    """

    def __init__(self, folder: str | Path | None) -> None:
        self.folder = None if folder is None else Path(folder)
        self._lock, self._asking = threading.Lock(), defaultdict[str, threading.Lock](threading.Lock)

    def file(self, question: Mapping[str, Any]) -> Path | None:
        """Where the reply to a question is kept."""
        return None if self.folder is None else self._path(_name(_unlimited(question)))

    def reply(self, question: Mapping[str, Any], ask: Callable[[], tuple[str, bool]]) -> tuple[str, bool, bool]:
        """The reply to a question, whether it was cut, and whether it was kept already.

        ``ask`` gets the reply, and whether it was cut at its limit, where none is kept. Threads that have the same
        question at the same time wait for one of them to ask it. Raises what ``ask`` raises, and DiskFullError.
        """
        path = self.file(question)
        if path is None:
            return *ask(), False
        with self._lock:
            mine = self._asking[path.name]
        with mine:
            self._take_over(question, path)
            kept = _read(path)
            if kept is not None:
                return kept, False, True
            text, cut = ask()
            if not cut:
                write_text(path, dumps({**question, "reply": text}, indent=1) + "\n")
            return text, cut, False

    def refuse(self, question: Mapping[str, Any], reason: str) -> None:
        """Note that the kept reply to a question cannot be used: it stays to be read, and is asked for again."""
        path = self.file(question)
        if path is not None and (text := _read(path)) is not None:
            write_text(path, dumps({**question, "reply": text, "unusable": reason}, indent=1) + "\n")

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / name[:2] / f"{name}.json"

    def _take_over(self, question: Mapping[str, Any], path: Path) -> None:
        """A reply that the first release kept, whose names told no server from another, becomes this server's."""
        if path.exists():
            return
        for parameters in (question["parameters"], {**question["parameters"], "max_tokens": 1024}):
            old = self._path(_name({**_without(question, "server"), "parameters": parameters}))
            if (text := _read(old)) is not None:
                write_text(path, dumps({**question, "reply": text}, indent=1) + "\n")
                old.unlink(missing_ok=True)  # it is one server's only
                return


def read_json(reply: str) -> Any:
    """A reply as JSON. Nothing else may stand there but thinking before it and one fence around it.

    Raises ValueError that says what is wrong.
    """
    error = ValueError("it is empty")
    for body in _after_thinking(reply):
        try:
            return _strict_json(body)
        except ValueError as problem:
            error = problem
    raise error


def _after_thinking(reply: str) -> Iterator[str]:
    """The reply, and what follows each of its `</think>`: a text of the JSON may name that tag itself."""
    yield reply
    start = 0
    while (found := reply.find("</think>", start)) >= 0:
        start = found + len("</think>")
        yield reply[start:]


def _strict_json(text: str) -> Any:
    body = text.strip()
    fenced = re.fullmatch(r"```(?:json)?\s*\n(.*)\n\s*```", body, flags=re.DOTALL)

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no JSON")

    try:
        return json.loads(fenced.group(1) if fenced else body, parse_constant=refuse)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is no JSON ({error})") from error
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _unlimited(question: Mapping[str, Any]) -> dict[str, Any]:
    parameters = {name: value for name, value in question["parameters"].items() if name not in LENGTH_LIMITS}
    return {**question, "parameters": parameters}


def _without(question: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in question.items() if key != name}


def _name(question: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()


def _read(path: Path) -> str | None:
    """The usable reply of a file; None where there is none."""
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        reply, refused = record["reply"], "unusable" in record
    except (ValueError, KeyError, TypeError):
        reply, refused = None, False
    if not isinstance(reply, str):
        log.warning("%s is damaged; the question is asked again.", path)
        return None
    return None if refused else reply
