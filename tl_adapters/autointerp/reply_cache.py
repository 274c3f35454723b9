"""Replies of a model, cached on the disk by question and read as strict JSON.

A reply's file is named by the hash of server, model, parameters and messages, and holds them, so that a person can read
the question. Only the owner can read it. It is written atomically, before the reply is used. A reply that turns out to
be unusable is marked so: it stays as a record of what was asked, and the next run asks the question again.

The first release hashed no server. Its replies were paid for, so the first server that is asked a question takes over
the reply to it, unless that holds no JSON.
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
from typing import Any, Literal

from tl_adapters.utils.files import locked, make_folder, remove_own, require_writable, write_text
from tl_adapters.utils.reading import Record, UnreadableFileError, read_record
from tl_adapters.utils.strict_json import dumps

log = logging.getLogger(__name__)

LENGTH_LIMITS = ("max_tokens", "max_completion_tokens")
"""Parameters that limit the length of a reply, under the names that servers know."""
MAX_TAGS = 20
"""Tags in a reply behind each of which its JSON is looked for."""
_FIRST_RELEASE_LIMIT = 1024
"""The default of max_tokens in the first release, whose hashes depend on it."""


class CachedReply(Record):
    """The content of a reply's file."""

    schema_version: Literal[1, 2] = 1
    """1 in the first release, whose files have neither this key nor a server."""
    server: str | None = None
    """Base address."""
    model: str
    """Name of the model at that address."""
    parameters: dict[str, Any]
    """Parameters of the request."""
    messages: tuple[dict[str, str], ...]
    """The conversation that was sent."""
    reply: str
    """The model's reply."""
    unusable: str | None = None
    """The reason why the reply is not used; None where it is."""

    def hash(self) -> str:
        """The name, without its ending, of the file that this record belongs into."""
        question = {"model": self.model, "parameters": self.parameters, "messages": list(self.messages)}
        return _hash(question) if self.server is None else _question_hash({"server": self.server, **question})


class ReplyCache:
    """Replies by question.

    A question is {"server", "model", "parameters", "messages"}. Questions that differ only in limits of the reply's
    length count as the same: a complete reply is the same under a larger limit, and a truncated one is not cached.

    Args:
        folder: folder of the cache; None caches nothing.

    Raises WriteError where nothing can be written into the folder, before any reply is paid for.
    """

    def __init__(self, folder: str | Path | None) -> None:
        self.folder = None if folder is None else Path(folder)
        self._lock, self._question_locks = threading.Lock(), defaultdict[str, threading.Lock](threading.Lock)
        if self.folder is not None:
            require_writable(self.folder)
            for existing in self.folder.glob("[0-9a-f][0-9a-f]"):
                make_folder(existing, private=True)  # everybody could read those of the first release

    def file(self, question: Mapping[str, Any]) -> Path | None:
        """The file of the reply to a question; None without a folder."""
        return None if self.folder is None else self._path(_question_hash(question))

    def reply(self, question: Mapping[str, Any], ask: Callable[[], tuple[str, bool]]) -> tuple[str, bool, bool]:
        """The reply to a question, from the cache or else from ``ask``.

        Threads that have the same question at the same time wait for one of them to ask it.

        Args:
            question: the question.
            ask: gets the reply, and whether it was truncated at its limit.

        Returns:
            The reply, whether it was truncated, and whether it came from the cache.

        Raises what ``ask`` raises, and WriteError.
        """
        path = self.file(question)
        if path is None:
            return *ask(), False
        with self._lock:
            question_lock = self._question_locks[path.name]
        with question_lock:
            self._adopt_first_release(question, path)
            cached = _usable_reply(path)
            if cached is not None:
                return cached, False, True
            text, truncated = ask()
            if not truncated:
                self._write(path, question, text)
            return text, truncated, False

    def mark_unusable(self, question: Mapping[str, Any], reason: str) -> None:
        """Mark the cached reply to a question as unusable: it stays in its file, and the question is asked again."""
        path = self.file(question)
        if path is not None and (text := _usable_reply(path)) is not None:
            self._write(path, question, text, unusable=reason)

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / name[:2] / f"{name}.json"

    def _write(self, path: Path, question: Mapping[str, Any], reply: str, **unusable: str) -> None:
        for folder in (path.parents[1], path.parent):
            if not folder.exists():
                make_folder(folder, private=True)
        record = {"schema_version": 2, **question, "reply": reply, **unusable}
        write_text(path, dumps(record, indent=1) + "\n", private=True)

    def _adopt_first_release(self, question: Mapping[str, Any], path: Path) -> None:
        """Take over a reply of the first release, which one server may do, under a lock of the reply's file."""
        if path.exists():
            return
        without_server = _without(question, "server")
        for parameters in ({}, {"max_tokens": _FIRST_RELEASE_LIMIT}):
            old = self._path(_hash({**without_server, "parameters": {**question["parameters"], **parameters}}))
            if not old.is_file():
                continue
            with locked(old):
                if (text := _usable_reply(old)) is not None and _is_json(text):
                    self._write(path, question, text)
                    remove_own(old)
                    return


def _usable_reply(path: Path) -> str | None:
    """The usable reply in a file; None where there is none. What a damaged file held is asked for again."""
    if not path.is_file():
        return None
    try:
        record = read_record(CachedReply, path, "The question is asked again.")
    except UnreadableFileError as error:
        log.warning("%s", error)
        return None
    if record.hash() != path.stem:
        log.warning("%s holds the reply to another question than its name says. The question is asked again.", path)
        return None
    return None if record.unusable is not None else record.reply


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


def _is_json(reply: str) -> bool:
    """Whether a reply holds JSON; one that was cut does not."""
    try:
        read_json(reply)
    except ValueError:
        return False
    return True


def _question_hash(question: Mapping[str, Any]) -> str:
    parameters = {name: value for name, value in question["parameters"].items() if name not in LENGTH_LIMITS}
    return _hash({**question, "parameters": parameters})


def _without(question: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in question.items() if key != name}


def _hash(question: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()
