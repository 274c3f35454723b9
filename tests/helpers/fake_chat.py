"""A chat server on this machine that answers as a test specifies, and records the requests."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from helpers.loopback_server import LoopbackServer, Request, Response

KEY = "sk-a-key-that-must-never-be-seen-anywhere"


@dataclass(frozen=True)
class Says:
    """The server's response to one request."""

    text: str = ""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    body: str | None = None  # instead of a chat completion
    usage: dict[str, Any] | None = field(default_factory=lambda: {"total_tokens": 10})

    def response(self) -> Response:
        completion = {"choices": [{"message": {"role": "assistant", "content": self.text}}], "usage": self.usage}
        body = json.dumps(completion) if self.body is None else self.body
        return Response(body, self.status, self.headers, delay=self.delay)


class FakeChat:
    """Replies to each request with what ``answer`` returns for its messages; a text is an ordinary reply.

    An answer may also be a `Response` of the server below, which misbehaves in all ways that TCP allows.
    """

    def __init__(self, answer: Callable[[list[dict[str, str]]], str | Says | Response]) -> None:
        self.answer, self.asked, self.headers, self.times = answer, [], [], []
        self.server = LoopbackServer(self._reply)

    def __enter__(self) -> FakeChat:
        self.server.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.__exit__(*error)

    def _reply(self, request: Request) -> Response:
        body = request.json()
        self.asked.append({"path": request.path, **body})
        self.headers.append(request.headers)
        self.times.append(request.time)
        says = self.answer(body["messages"])
        says = Says(says) if isinstance(says, str) else says
        return says.response() if isinstance(says, Says) else says

    @property
    def most_at_once(self) -> int:
        return self.server.most_at_once

    @property
    def url(self) -> str:
        return f"{self.server.url}/v1"

    @property
    def questions(self) -> list[str]:
        """The last message of each request."""
        return [asked["messages"][-1]["content"] for asked in self.asked]
