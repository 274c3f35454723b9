"""Conversations, the fields that hold a turn's thinking, and documents, which are conversations as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Message = Mapping[str, Any]
"""One turn: {"role": "user" or "assistant" or "system", "content": text}. An assistant's turn may hold its thinking in
a separate field (`THINKING_FIELDS`), and a response may name its "domain" and say that its text is not to be shown in
public ("republish": False)."""
Conversation = Sequence[Message]
"""Turns, the last of which is the assistant's response, thinking included."""

THINKING_FIELDS = ("reasoning_content", "reasoning", "thinking")
"""Names of the field that holds a turn's thinking (DeepSeek's and vLLM's API, Qwen3's template, TRL, gpt-oss)."""


@dataclass(frozen=True)
class Document:
    """A conversation as text."""

    prompt: str
    """The text that the model reads before it responds."""
    response: str
    """The text that the model then writes, its end token included."""
    thinking: int
    """Number of characters of the response that are thinking, tags included."""
    domain: str = ""
    """The subject of the document (math, code, ...), where the data names one."""
    republish: bool = True
    """Whether its text may be shown in public."""


def thinking_of(message: Mapping[str, Any]) -> Any:
    """The thinking that a turn holds in a separate field, or None. It is text where the turn is a `Message`."""
    return next((message[field] for field in THINKING_FIELDS if message.get(field)), None)
