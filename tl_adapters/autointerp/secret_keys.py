"""Removes an API key from texts and log records, in every spelling in which a server may return it.

A server that echoes a request can spell the key as it is, as JSON, URLs or HTML escape it, also repeatedly, or as a
part of base64, as the header of basic authentication has it.
"""

from __future__ import annotations

import base64
import logging
import re

MIN_ERROR_KEY, MIN_REPLY_KEY = 4, 8
"""Characters of the shortest key that is removed from errors, and from replies.

A shorter key ("none", "EMPTY") is a placeholder, and removing it would damage ordinary words.
"""
_MIN_BASE64 = 8
"""Characters of the shortest base64 that is looked for; fewer occur by chance."""

_NAMED = {'"': "quot", "&": "amp", "'": "apos", "<": "lt", ">": "gt"}
"""Characters that HTML escapes by name."""


class SecretKey:
    """A key, or "" for none, that is shown nowhere.

    Args:
        value: the key.
    """

    def __init__(self, value: str) -> None:
        self.value = value
        spellings = [value, *_base64_parts(value)] if len(value) >= MIN_ERROR_KEY else []
        self._pattern = re.compile("|".join(map(_escaped, spellings))) if spellings else None

    def __bool__(self) -> bool:
        return bool(self.value)

    def __repr__(self) -> str:
        return "SecretKey([key])" if self.value else "SecretKey()"

    def removed_from(self, text: str) -> str:
        """The text of an error, with "[key]" in place of the key in every spelling."""
        return self._pattern.sub("[key]", text) if self._pattern else text

    def removed_from_reply(self, text: str) -> str:
        """The text of a reply, with "[key]" in place of the key, unless that is too short to be a secret."""
        return self.removed_from(text) if len(self.value) >= MIN_REPLY_KEY else text


class KeyFilter(logging.Filter):
    """Removes a key from the records of a logger, such as those of response headers that httpcore writes."""

    def __init__(self, key: SecretKey) -> None:
        super().__init__()
        self._key = key

    def filter(self, record: logging.LogRecord) -> bool:
        """Remove the key from a record, and let it pass."""
        record.msg, record.args = self._key.removed_from(record.getMessage()), ()
        return True


def _escaped(text: str) -> str:
    """A pattern for a text each of whose characters may be escaped as in JSON, URLs or HTML, up to eight times.

    Bounded repetition keeps the search linear in the length of a server's text.
    """
    return "".join(map(_escaped_character, text))


def _escaped_character(character: str) -> str:
    code = ord(character)
    backslashes = "{0,8}" if character in "\"'/\\" else "{0}"
    name = rf"|{_NAMED[character]}" if character in _NAMED else ""
    return (
        rf"(?:\\{backslashes}{re.escape(character)}|\\{{1,8}}(?:u00|x)(?i:{code:02x})|%(?:25){{0,8}}(?i:{code:02x})"
        rf"|&(?:amp;){{0,8}}(?:#0{{0,8}}{code}|#[xX]0{{0,8}}(?i:{code:x}){name});)"
    )


def _base64_parts(key: str) -> set[str]:
    """What base64 of any text that contains the key has in common, for each place at which the key may begin."""
    parts = set()
    for before in range(3):
        encoded = base64.b64encode(b"\0" * before + key.encode()).decode()
        # The characters at both ends depend on the neighbors of the key, too.
        first, last = -(-8 * before // 6), 8 * (before + len(key)) // 6
        if len(part := encoded[first:last]) >= _MIN_BASE64:
            parts |= {part, part.replace("+", "-").replace("/", "_")}
    return parts
