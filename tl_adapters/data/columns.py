"""How the columns of a row become a conversation, and what happens to rows that cannot be used."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

from tl_adapters.config import DataConfig
from tl_adapters.data.conversations import THINKING_FIELDS, Conversation, Message, thinking_of
from tl_adapters.data.traces import DataError
from tl_adapters.utils.reading import shown

log = logging.getLogger(__name__)

CONVERSATION_COLUMNS = ("messages", "conversations", "conversation")
PROMPT_COLUMNS = ("prompt", "question", "problem")
RESPONSE_COLUMNS = ("response", "completion", "generation")
THINKING_COLUMNS = THINKING_FIELDS
SYSTEM_COLUMNS = ("system",)
DOMAIN_COLUMNS = ("domain",)
REPUBLISH_COLUMN = "republish"
"""Names of columns that are read where the configuration names none; the first one that a row has is taken."""
_ROLES = {"human": "user", "gpt": "assistant"}
"""Names of roles in ShareGPT's format, and what they are called here."""
LOGGED_ROWS = 5
"""How many of the dropped rows are logged one by one; all of them are counted."""


class RowConversation(list[Message]):
    """A conversation, with the location of the row that it was read from."""

    def __init__(self, turns: Sequence[Message], location: str) -> None:
        super().__init__(turns)
        self.location = location


class UnusableRows:
    """Rows that cannot be used: either the first one raises an error, or all are dropped and counted."""

    def __init__(self, config: DataConfig) -> None:
        self.drop = config.bad_rows == "drop"
        self.rows: dict[str, str] = {}
        """Location of every row that was dropped, and the reason."""
        self._ignored = False

    @contextmanager
    def ignored(self) -> Iterator[None]:
        """Context in which rows that cannot be used are skipped: they are not counted and raise nothing."""
        self._ignored = True
        try:
            yield
        finally:
            self._ignored = False

    def add(self, location: str, error: DataError) -> None:
        """Count a row that cannot be used. Raises DataError, which names the remedy, unless rows are dropped."""
        if self._ignored:
            return
        message = str(error) if str(error).startswith(location) else f"{location}: {error}"
        message += "" if message.endswith(".") else "."
        if not self.drop:
            raise DataError(
                f"{message} Fix the row, or drop and count such rows (data.bad_rows: drop; --bad-rows drop, also with "
                "train --resume)."
            ) from error
        if location not in self.rows:
            self.rows[location] = message
            if len(self.rows) <= LOGGED_ROWS:
                log.warning("Dropped: %s", message)


class ConversationColumns:
    """Reads conversations from records, by the columns that a configuration names or the usual ones."""

    def __init__(self, config: DataConfig) -> None:
        self._conversation = [config.conversation_column] if config.conversation_column else CONVERSATION_COLUMNS
        self._prompt = [config.prompt_column] if config.prompt_column else PROMPT_COLUMNS
        self._response = [config.response_column] if config.response_column else RESPONSE_COLUMNS
        self._domain = [config.domain_column] if config.domain_column else DOMAIN_COLUMNS
        self._thinking = [config.thinking_column] if config.thinking_column else THINKING_COLUMNS
        self._system = [config.system_column] if config.system_column else SYSTEM_COLUMNS
        self.bad_rows = UnusableRows(config)
        self._prefers_pairs = config.prompt_column is not None

    def conversation(self, record: Any, location: str) -> Conversation:
        """The conversation that a record holds. Raises DataError, which names the ``location``, if it holds none."""
        if not isinstance(record, Mapping):
            raise DataError(f"{location}: found {shown(record)}; a line must be a JSON object.")
        turns = None if self._prefers_pairs else _first_column(record, self._conversation)
        if turns is None:
            prompt, response = _first_column(record, self._prompt), _first_column(record, self._response)
            if prompt is None or response is None:
                raise DataError(
                    f"{location}: no question and response in the columns {_shown_names(record)}. Known are "
                    f"{', '.join(PROMPT_COLUMNS)} with {', '.join(RESPONSE_COLUMNS)}, or turns in "
                    f"{', '.join(CONVERSATION_COLUMNS)}; name other columns with prompt_column, response_column or "
                    "conversation_column."
                )
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        turns = self._with_columns(turns, record)
        messages = _normalized_turns(turns, location)
        domain = _first_column(record, self._domain)
        if domain is not None:
            _require_unicode(str(domain), location)
            messages = [*messages[:-1], {**messages[-1], "domain": str(domain)}]
        republish = record.get(REPUBLISH_COLUMN)
        if republish is not None and not isinstance(republish, bool):  # 0 equals False, and is none
            raise DataError(f"{location}: {REPUBLISH_COLUMN} is {shown(republish)}; allowed are true and false.")
        if republish is False:
            messages = [*messages[:-1], {**messages[-1], "republish": False}]
        return RowConversation(messages, location)

    def _with_columns(self, turns: Any, record: Mapping[str, Any]) -> Any:
        """Turns with the contents of separate columns: the system turn, and the thinking of the last turn."""
        if not isinstance(turns, (list, tuple)) or not turns or not all(isinstance(turn, Mapping) for turn in turns):
            return turns
        thinking, system = _first_column(record, self._thinking), _first_column(record, self._system)
        if thinking is not None and not any(turns[-1].get(field) for field in THINKING_FIELDS):
            turns = [*turns[:-1], {**turns[-1], THINKING_FIELDS[0]: thinking}]
        if system not in (None, "") and turns[0].get("role", turns[0].get("from")) != "system":
            turns = [{"role": "system", "content": system}, *turns]
        return turns

    def read(self, record: Any, location: str) -> Conversation | None:
        """Like `conversation`, but returns None for a row that cannot be used and is dropped."""
        try:
            return self.conversation(record, location)
        except DataError as error:
            self.bad_rows.add(location, error)
            return None


def _first_column(record: Mapping[str, Any], names: Sequence[str]) -> Any:
    """The content of the first of the named columns that is not empty; None if there is none."""
    return next((record[name] for name in names if record.get(name) is not None), None)


def _normalized_turns(turns: Any, location: str) -> Conversation:
    """Turns with the keys "role" and "content", and thinking in the first of `THINKING_FIELDS`. Raises DataError."""
    if not isinstance(turns, (list, tuple)) or not all(isinstance(turn, Mapping) for turn in turns):
        raise DataError(f"{location}: turns are {type(turns).__name__}; allowed is a list of {{role, content}}.")
    messages = []
    for turn in turns:
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        thinking = thinking_of(turn)
        if content is None and thinking is not None:
            content = ""  # the response was cut off while the model was thinking
        if not isinstance(role, str) or not isinstance(content, str):
            raise DataError(f"{location}: a turn holds {_shown_names(turn)}; role and content must be text.")
        if not isinstance(thinking, str | None):
            raise DataError(f"{location}: a turn's thinking is {type(thinking).__name__}; it must be text.")
        for text in (role, content, thinking or ""):
            _require_unicode(text, location)
        message = {"role": _ROLES.get(role, role), "content": content}
        messages.append(message if thinking is None else {**message, THINKING_FIELDS[0]: thinking})
    roles = [message["role"] for message in messages]
    if "user" not in roles or roles[-1] != "assistant":
        raise DataError(
            f"{location}: roles are {shown(roles)}; the last turn must be an assistant's response to a user."
        )
    if not (messages[-1]["content"] + messages[-1].get(THINKING_FIELDS[0], "")).strip():
        raise DataError(f"{location}: the response is empty.")
    return messages


def _shown_names(names: Iterable[Any]) -> str:
    """Names in an error, which a damaged row may have in any number and length."""
    listed = [str(name)[:40] for name in islice(names, 20)]
    return ", ".join(listed) + (", ..." if len(listed) == 20 else "")


def _require_unicode(text: str, location: str) -> None:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can hold an unpaired surrogate, which no tokenizer can read
            raise DataError(f"{location}: {error}; the text is not Unicode.") from error
