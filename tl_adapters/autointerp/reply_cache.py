"""Replies of a model, cached on the disk by question and read as strict JSON.

A reply's file is named by the hash of server, model, parameters and messages, and holds them, so that a person can read
the question. The file is written atomically, before the reply is used. A reply that turns out to be unusable is marked
so, and the question is asked again by the next run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from tl_adapters.utils.files import remove_own, write_text
from tl_adapters.utils.strict_json import dumps

log = logging.getLogger(__name__)

LENGTH_LIMITS = ("max_tokens", "max_completion_tokens")
"""Parameters that limit the length of a reply, under the names that servers know."""

MAX_TAGS = 20
"""Tags in a reply behind each of which its JSON is looked for."""


class ReplyCache:
    """Replies by question.

    A question is {"server", "model", "parameters", "messages"}. Questions that differ only in limits of the reply's
    length count as the same: a complete reply is the same under a larger limit, and a truncated one is not cached.

    Args:
        folder: folder of the cache; None caches nothing.
    """

    def __init__(self, folder: str | Path | None) -> None:
        self.folder = None if folder is None else Path(folder)
        self._lock, self._question_locks = threading.Lock(), defaultdict[str, threading.Lock](threading.Lock)

    def file(self, question: Mapping[str, Any]) -> Path | None:
        """The file of the reply to a question; None without a folder."""
        return None if self.folder is None else self._path(_hash(_unlimited(question)))

    def reply(self, question: Mapping[str, Any], ask: Callable[[], tuple[str, bool]]) -> tuple[str, bool, bool]:
        """The reply to a question, from the cache or else from ``ask``.

        Threads that have the same question at the same time wait for one of them to ask it.

        Args:
            question: the question.
            ask: gets the reply, and whether it was truncated at its limit.

        Returns:
            The reply, whether it was truncated, and whether it came from the cache.

        Raises what ``ask`` raises, and DiskFullError.
        """
        path = self.file(question)
        if path is None:
            return *ask(), False
        with self._lock:
            question_lock = self._question_locks[path.name]
        with question_lock:
            self._adopt_first_release(question, path)
            cached = _read(path)
            if cached is not None:
                return cached, False, True
            text, truncated = ask()
            if not truncated:
                write_text(path, dumps({**question, "reply": text}, indent=1) + "\n")
            return text, truncated, False

    def mark_unusable(self, question: Mapping[str, Any], reason: str) -> None:
        """Mark the cached reply to a question as unusable: it stays in its file, and the question is asked again."""
        path = self.file(question)
        if path is not None and (text := _read(path)) is not None:
            write_text(path, dumps({**question, "reply": text, "unusable": reason}, indent=1) + "\n")

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / name[:2] / f"{name}.json"

    def _adopt_first_release(self, question: Mapping[str, Any], path: Path) -> None:
        """Rename a reply that the first release cached, whose file names did not depend on the server."""
        if path.exists():
            return
        for parameters in (question["parameters"], {**question["parameters"], "max_tokens": 1024}):
            old = self._path(_hash({**_without(question, "server"), "parameters": parameters}))
            if (text := _read(old)) is not None:
                write_text(path, dumps({**question, "reply": text}, indent=1) + "\n")
                remove_own(old)  # so that no other server adopts it too
                return


def read_json(reply: str) -> Any:
    """The JSON of a reply, which may have thinking before it and a code fence around it, and nothing else.

    Raises ValueError. The texts of these errors are sent to the model, so cached replies are found by them; see
    `Endpoint.ask_all`.
    """
    error = ValueError("it is empty")
    for body in _after_thinking(reply):
        try:
            return _strict_json(body)
        except ValueError as problem:
            error = problem
    raise error


def _after_thinking(reply: str) -> Iterator[str]:
    """The whole reply, and the text after each `</think>`, since a text in the JSON may contain that tag itself."""
    yield reply
    for tag in islice(re.finditer("</think>", reply), MAX_TAGS):
        yield reply[tag.end() :]


def _strict_json(text: str) -> Any:
    body = text.strip()
    opening, _, rest = body.partition("\n")
    if opening.strip() in ("```", "```json") and rest.endswith("```"):
        body = rest.removesuffix("```")

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no JSON")

    try:
        return json.loads(body, parse_constant=refuse)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is no JSON ({error})") from error
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _unlimited(question: Mapping[str, Any]) -> dict[str, Any]:
    parameters = {name: value for name, value in question["parameters"].items() if name not in LENGTH_LIMITS}
    return {**question, "parameters": parameters}


def _without(question: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in question.items() if key != name}


def _hash(question: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()


def _read(path: Path) -> str | None:
    """The usable reply in a file; None where there is none."""
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        reply, unusable = record["reply"], "unusable" in record
    except (ValueError, KeyError, TypeError):
        reply, unusable = None, False
    if not isinstance(reply, str):
        log.warning("%s is damaged; the question is asked again.", path)
        return None
    return None if unusable else reply
